"""Shadow sampling on a GPU: SGLang's own kernels, asked for a sample's rows, and that nothing waits for the device."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from types import SimpleNamespace

from sglang.kernels.ops.kvcache.dsa_index_k_cache import GetKAndS
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_ext import sglang_shadow
from sglang_ext.overlap import Key, row_overlap
from sglang_ext.settings import Settings
from sglang_ext.shadow import Sample, Shadow
from tests.sglang_ext import native_on_cpu as cpu
from tests.sglang_ext import patched_indexer as sut
from tests.support.inputs import Batch, make_batch

pytestmark = pytest.mark.gpu

TOP_K = 2048  # SGLang's kernels take no other
LENGTHS, COUNTS = [3000, 500, 9000, 2600], [60, 20, 1, 40]
KEY = Key("prefill", "misa", sut.LAYER)
FORMS: dict[str, dict[str, Any]] = {
    "slots": {},
    "offsets": {"topk_transform_method": TopkTransformMethod.RAGGED},
    "positions": {"force_unfused_topk": True},
}


class Pool(sut.Pool):
    """Gathers keys with SGLang's kernel."""

    index_head_dim = quant_block_size = 128

    def get_index_k_scale_buffer(self, _layer: int, lengths: Any, table: Any, total: int, longest: int) -> Any:
        return GetKAndS.execute(
            self, self.pages, page_indices=table, seq_len_tensor=lengths, seq_len_sum=total, max_seq_len=longest
        )


@pytest.fixture(scope="module", params=[64, 32])
def batch(request: pytest.FixtureRequest) -> Batch:
    return make_batch(LENGTHS, COUNTS, num_heads=request.param, device="cuda", seed=31)


@pytest.fixture
def errors_where_it_waits() -> Iterator[None]:
    """torch raises where a call would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def metadata(batch: Batch, form: str) -> Any:
    """SGLang's metadata of the batch, with everything on the GPU but the lengths it keeps on the host."""
    found = cpu.metadata(batch, COUNTS, **FORMS[form])
    attention = found.attn_metadata
    moved = {
        field.name: value.cuda()
        for field in dataclasses.fields(attention)
        if isinstance(value := getattr(attention, field.name), torch.Tensor) and field.name != "indexer_seq_lens_cpu"
    }
    return dataclasses.replace(found, attn_metadata=dataclasses.replace(attention, **moved))


def arguments(batch: Batch) -> tuple[Any, ...]:
    """What `_get_topk_ragged` is given, up to the metadata."""
    lengths = torch.tensor(LENGTHS)
    fields = SimpleNamespace(forward_mode=ForwardMode.MIXED, seq_lens_cpu=lengths, extend_seq_lens_cpu=COUNTS)
    of = sut.indexer(index_topk=TOP_K, n_heads=batch.q.shape[1], logits_with_pp_recv=False)
    return of, False, fields, sut.LAYER, batch.q, batch.weights.unsqueeze(-1)


def native_rows(batch: Batch, found: Any, sample: Sample) -> torch.Tensor:
    return sglang_shadow.native_prefill_rows(Indexer._get_topk_ragged, *arguments(batch), found, sample)


def planned(shadow: Shadow) -> Sample:
    sample = shadow.plan_prefill(LENGTHS, COUNTS, LENGTHS, TOP_K, torch.device("cuda"))
    assert sample is not None
    return sample


@pytest.mark.parametrize("form", FORMS)
def test_native_rows_are_those_of_the_whole_forward(batch, form):
    found, shadow, requests = metadata(batch, form), Shadow(Settings(shadow_rate=1.0, shadow_rows=16)), set()
    with sut.serving(Pool(batch.k_pages)):
        whole = Indexer._get_topk_ragged(*arguments(batch), found)
        for _ in range(30):
            sample = planned(shadow)
            requests.add(sample.request)
            rows = native_rows(batch, found, sample)
            assert rows.shape == (len(sample.rows), TOP_K)
            # Near-equal scores may tip at the end of a row's list: the kernels tile other rows together.
            assert float(row_overlap(rows, whole[sample.rows]).min()) > 0.998
            assert float(row_overlap(whole[sample.rows], rows).min()) > 0.998
    assert requests >= {0, 3}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits(batch, form, request):
    """From the choice of rows to the copy of the totals. A wait would raise, and be counted as an error."""
    found, shadow = metadata(batch, form), Shadow(Settings(shadow_rate=1.0, shadow_rows=16))
    shadow.overlaps.prepare(torch.device("cuda"))
    with sut.serving(Pool(batch.k_pages)):
        ours = Indexer._get_topk_ragged(*arguments(batch), found)
        native_rows(batch, found, planned(shadow))  # compiles
        request.getfixturevalue("errors_where_it_waits")
        for _ in range(5):
            sample = planned(shadow)
            shadow.compare(sample, KEY, ours, lambda sample: native_rows(batch, found, sample))
            shadow.overlaps.read()
            shadow.times.read()
    assert dict(shadow.forwards) == {("prefill", "sampled"): 6}
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    shadow.overlaps.send()
    torch.cuda.synchronize()
    total = shadow.overlaps.read()[KEY]
    assert total == shadow.overlaps.read(wait=True)[KEY] and total.rows == 5 * 16 and total.mean > 0.999
    [(number, seconds)] = shadow.times.read().values()
    assert number == 5 and seconds > 0


def test_decode_reads_no_lengths(request):
    shadow, lengths = Shadow(Settings(shadow_rate=1.0, shadow_rows=2)), torch.tensor([5, 3000, 10, 4000]).int().cuda()
    ours = torch.stack([torch.randperm(4000, device="cuda")[:TOP_K] for _ in lengths]).int()
    shadow.overlaps.prepare(torch.device("cuda"))
    request.getfixturevalue("errors_where_it_waits")
    sample = shadow.plan_decode(4, lengths, TOP_K)
    assert sample is not None
    key = Key("decode", "hisa", 0)
    shadow.compare(sample, key, ours, lambda sample: ours[sample.rows].flip(1))
    torch.cuda.set_sync_debug_mode("default")
    assert dict(shadow.forwards) == {("decode", "sampled"): 1}
    assert shadow.overlaps.read(wait=True) == {}, "rows 0 and 2 see no more than is selected"


def test_device_runs_are_read_beside_the_forward(request):
    from sglang_ext.counters import Counters

    counters, device = Counters(), torch.device("cuda", torch.cuda.current_device())
    counters.prepare_device(device)
    counters.step_device("prefill", "misa", device)
    request.getfixturevalue("errors_where_it_waits")
    counters.snapshot(wait=False)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert counters.snapshot(wait=False)["device_runs"] == {"prefill/misa": 1}
