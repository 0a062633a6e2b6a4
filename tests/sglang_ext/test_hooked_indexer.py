"""The real Indexer methods of SGLang under the hooks: every path into them, every form of their result."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from indexer_kernels import select_ragged
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import TOP_K, Recorder, metadata, paged, ragged
from tests.support.compare import assert_form, assert_same_selection
from tests.support.inputs import Batch, make_batch, slots_of

# request lengths, rows per request: one prompt from its first token, later chunks or radix hits, a mixed batch whose
# last two requests decode, requests of very different length with one row alone
EXTENDS = {
    "plain": ([150], [150]),
    "several": ([150, 3, 200], [150, 3, 200]),
    "chunk": ([300, 256], [10, 64]),
    "mixed": ([300, 170, 70], [20, 1, 1]),
    "short": ([40, 1], [40, 1]),
}


@pytest.fixture(scope="module")
def installed() -> Iterator[tuple[Stage, Recorder]]:
    stage = Stage(Settings(backend="reference"), {})
    with sut.hooked(stage) as native:
        yield stage, native


@pytest.fixture
def stage(installed) -> Stage:
    sut.use(installed[0])
    return installed[0]


@pytest.fixture
def native(installed) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls that reached SGLang's own method."""
    installed[1].calls.clear()
    return installed[1].calls


def wanted(batch: Batch, stage: Stage, mode: str = "misa") -> list[set[int]]:
    """Positions per row, from the contiguous layout."""
    chosen = select_ragged(mode, *batch.ragged, stage.settings.params(TOP_K), backend="reference")
    return [set(row) - {-1} for row in chosen.tolist()]


def as_slots(batch: Batch, rows: list[set[int]]) -> list[set[int]]:
    return [set(slots_of(batch, row, sorted(positions))) for row, positions in enumerate(rows)]


def assert_rows(got: torch.Tensor, rows: list[set[int]]) -> None:
    """Row for row these entries, each once, packed first; -1 to the end of the row and in every further row."""
    assert got.dtype == torch.int32 and got.shape[1] == TOP_K
    for row, (found, want) in enumerate(zip(got.tolist(), rows)):
        first, rest = found[: len(want)], found[len(want) :]
        assert set(first) == want, f"row {row}: {sorted(set(first) ^ want)[:8]}"
        assert set(rest) <= {-1}, f"row {row}"
    assert (got[len(rows) :] == -1).all()


def counted(stage: Stage) -> list[tuple[str, str, str, int]]:
    return [(c["phase"], c["mode"], c["reason"], c["rows"]) for c in stage.counters.snapshot()["calls"]]


# Prefill


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("name", EXTENDS)
def test_prefill_returns_slots(stage, native, name, pad):
    lengths, counts = EXTENDS[name]
    batch = make_batch(lengths, counts, num_heads=8, seed=1)
    mode = ForwardMode.MIXED if name == "mixed" else ForwardMode.EXTEND
    got = ragged(batch, metadata(batch, counts), mode, pad)
    want = wanted(batch, stage)
    if name not in ("short", "plain"):
        assert want != wanted(batch, stage, "native"), "a test that native passes says nothing"
    assert got.shape[0] == sum(counts) + pad
    assert_rows(got, as_slots(batch, want))
    assert native == [] and counted(stage) == [("prefill", "misa", "configured", sum(counts))]


@pytest.mark.parametrize("method", list(TopkTransformMethod))
def test_prefill_unfused_returns_positions(stage, native, method):
    batch = make_batch([300, 170], [20, 5], num_heads=8, seed=2)
    got = ragged(batch, metadata(batch, [20, 5], topk_transform_method=method, force_unfused_topk=True))
    assert_same_selection(got, wanted(batch, stage), batch.lengths, TOP_K)
    assert native == []


def test_prefill_ragged_adds_the_offsets(stage, native):
    batch = make_batch([300, 170], [20, 5], num_heads=8, seed=2)
    # under context parallelism they are not ks: what SGLang hands over is what counts
    offsets = torch.arange(25, dtype=torch.int32) * 1000
    found = metadata(batch, [20, 5], topk_transform_method=TopkTransformMethod.RAGGED, topk_indices_offset=offsets)
    rows = [{p + 1000 * row for p in positions} for row, positions in enumerate(wanted(batch, stage))]
    assert_rows(ragged(batch, found, pad=2), rows)


@pytest.mark.parametrize("form", ["slots", "positions"])
def test_prefill_fills_a_given_result_in_place(stage, native, form):
    """SGLang's prefill graphs read it at a fixed address and ignore what is returned."""
    batch = make_batch([300, 170], [20, 5], num_heads=8, seed=3)
    out = torch.full((40, TOP_K), -1, dtype=torch.int32)
    want = wanted(batch, stage)
    found = metadata(batch, [20, 5], force_unfused_topk=form == "positions")
    assert ragged(batch, found, out=out) is out
    assert_rows(out, want if form == "positions" else as_slots(batch, want))


@pytest.mark.parametrize("mode", ["misa", "misa_rerank", "hisa", "group_rerank", "native"])
def test_prefill_runs_each_mode(stage, native, mode):
    sut.use(stage, mode=mode, candidates=2112, top_blocks=17, local_tokens=64, active_heads=1)
    batch = make_batch([4000, 2100], [4, 2], num_heads=8, seed=4)
    got = ragged(batch, metadata(batch, [4, 2], force_unfused_topk=True))
    if mode == "native":
        assert (
            isinstance(got, Recorder)
            and len(native) == 1
            and counted(stage) == [("prefill", "native", "configured_native", 6)]
        )
        return
    want = wanted(batch, stage, mode)
    assert want != wanted(batch, stage, "native")
    assert_same_selection(got, want, batch.lengths, TOP_K)
    assert native == []


def test_prefill_decides_once_for_all_layers(stage):
    batch = make_batch([300], [5], num_heads=8, seed=5)
    found = metadata(batch, [5])
    first = ragged(batch, found)
    asked = SimpleNamespace(**vars(sut.indexer()) | {"head_dim": 64})
    assert torch.equal(ragged(batch, found, of=asked), first), "a later layer must not be asked again"
    assert counted(stage) == [("prefill", "misa", "configured", 10)]


def test_native_tail_rows_of_real_requests(stage, native):
    """init_new notes the prompts; the forward may run with another ForwardBatch, as SGLang's prefill graphs do."""
    sut.use(stage, native_tail_rows=4)
    counts = [20, 8, 1]
    batch = make_batch([300, 170, 120], counts, num_heads=8, seed=6)
    requests = [request(310), request(170), request(100)]
    note = hook_of(stage, "init_new")
    made = SimpleNamespace(
        forward_mode=ForwardMode.MIXED, seq_lens_cpu=torch.tensor([300, 170, 120]), extend_seq_lens_cpu=list(counts)
    )
    note(made, None, SimpleNamespace(reqs=requests, decoding_reqs=requests[2:]), None)
    got = ragged(batch, metadata(batch, counts, force_unfused_topk=True), ForwardMode.MIXED)
    misa, full = wanted(batch, stage), wanted(batch, stage, "native")
    tail = range(24, 28)  # the first prompt goes on for 10 tokens, the second ends here, the third decodes
    assert any(misa[row] != full[row] for row in tail)
    assert_same_selection(got, [full[m] if m in tail else misa[m] for m in range(29)], batch.lengths, TOP_K)
    # a forward of another batch: SGLang's warm-up
    other = make_batch([300], [20], num_heads=8, seed=6)
    ragged(other, metadata(other, [20]))
    assert counted(stage)[-1] == ("prefill", "native", "prompt_unknown", 20) and len(native) == 1


def request(prompt: int) -> SimpleNamespace:
    return SimpleNamespace(full_untruncated_fill_ids=range(prompt))


def hook_of(stage: Stage, name: str) -> Any:
    from sglang_ext import sglang_hooks

    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith("." + name)]
    return hook.make(stage)


# Decode


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("unfused", [False, True])
def test_decode(stage, native, pad, unfused):
    batch = make_batch([300, 170, 70, 1], 1, num_heads=8, seed=7)
    got = paged(batch, metadata(batch, [1] * 4, force_unfused_topk=unfused), pad=pad)
    want = wanted(batch, stage)
    assert want != wanted(batch, stage, "native") and got.shape[0] == 4 + pad
    assert_rows(got, want if unfused else as_slots(batch, want))
    assert native == [] and counted(stage) == [("decode", "misa", "configured", 4)]


def test_decode_ragged_method_has_no_offsets(stage):
    """RAGGED is a form of prefill; a decode result holds slots whatever the prefill backend is."""
    batch = make_batch([300, 170], 1, num_heads=8, seed=8)
    got = paged(batch, metadata(batch, [1, 1], topk_transform_method=TopkTransformMethod.RAGGED))
    assert_rows(got, as_slots(batch, wanted(batch, stage)))


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2])
@pytest.mark.parametrize("counts", [[3, 3], [1] * 6], ids=["eager", "graph"])
def test_verify_uses_the_expanded_rows(stage, native, mode, counts):
    batch = make_batch([300, 170], 3, num_heads=8, seed=9)
    found = metadata(batch, [3, 3], expand=True, dsa_extend_seq_lens_list=counts)
    got = paged(batch, found, mode, pad=2)
    assert_rows(got, as_slots(batch, wanted(batch, stage)))
    assert native == [] and counted(stage) == [("decode", "misa", "configured", 6)]


def test_decode_follows_lengths_refreshed_in_place(stage):
    """A graph's metadata object lives on; SGLang writes the next step's lengths and pages into it."""
    batch = make_batch([300, 170], 1, num_heads=8, seed=10)
    found = metadata(batch, [1, 1])
    lengths = found.attn_metadata.cache_seqlens_int32
    lengths.copy_(torch.tensor([100, 90]))
    short = paged(batch, found)
    assert_form(
        paged(batch, metadata(batch, [1, 1], cache_seqlens_int32=lengths, force_unfused_topk=True)), [100, 90], 64
    )
    lengths.copy_(torch.tensor(batch.lengths))
    got = paged(batch, found)
    assert not torch.equal(got, short)
    assert_rows(got, as_slots(batch, wanted(batch, stage)))


# SGLang's own method


def test_native_gets_identical_arguments(stage, native):
    sut.use(stage, mode="native")
    batch = make_batch([100], [4], num_heads=8)
    out, found = torch.full((4, TOP_K), -1, dtype=torch.int32), metadata(batch, [4])
    ragged(batch, found, out=out)
    paged(batch, found)
    (first, _), (second, _) = native
    assert first[1] is False and first[3] == second[2] == sut.LAYER and first[6] is second[5] is found
    assert first[7] is out and (out == -1).all()
    assert first[4].shape == (4, 8, 128) and first[5].shape == (6, 8, 1), "nothing is sliced for SGLang's own method"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index_topk": 4096}, "index_topk"),
        ({"head_dim": 64}, "head_dim"),
        ({"num_init_tokens": 16}, "forced_tokens"),
        ({"num_local_tokens": 16}, "forced_tokens"),
        ({"dsa_enable_prefill_cp": True}, "context_parallel"),
    ],
)
def test_indexers_that_are_not_supported(stage, native, changes, reason):
    batch = make_batch([300], [4], num_heads=8)
    ragged(batch, metadata(batch, [4]), of=sut.indexer(**changes))
    paged(batch, metadata(batch, [4], expand=True), ForwardMode.TARGET_VERIFY, of=sut.indexer(**changes))
    assert len(native) == 2 and {(mode, why) for _, mode, why, _ in counted(stage)} == {("native", reason)}


def test_pools_and_backends_that_are_not_supported(stage, native):
    batch = make_batch([300], [1], num_heads=8)
    split, wide = sut.Pool(batch.k_pages), sut.Pool(batch.k_pages)
    split.get_broadcastable_index_k_with_scale_buffer = None
    wide.index_page_size = 128
    logical = metadata(batch, [1], indexer_logical_page_table=batch.page_table)
    paged(batch, metadata(batch, [1]), pool=split)
    paged(batch, metadata(batch, [1]), pool=wide)
    paged(batch, metadata(batch, [1]), hisparse_coordinator=object())
    ragged(batch, logical)
    assert [why for _, _, why, _ in counted(stage)] == ["hisparse", "layer_split_pool", "page_size", "kv_shard"]
    assert len(native) == 4


def test_older_pools_name_their_page_size_otherwise(stage, native):
    """Before 0.5.23 a pool has page_size only."""
    batch = make_batch([300], [1], num_heads=8)
    pool = SimpleNamespace(page_size=64, get_index_k_with_scale_buffer=lambda layer_id: batch.k_pages)
    paged(batch, metadata(batch, [1]), pool=pool)
    assert native == []


def test_strict_raises_where_native_would_serve(stage, native):
    sut.use(stage, strict=True)
    batch = make_batch([300], [1], num_heads=8)
    with pytest.raises(RuntimeError, match="sglang-ext \\(strict\\).*hisparse"):
        paged(batch, metadata(batch, [1]), hisparse_coordinator=object())
    assert native == []


def test_a_failing_stage_is_not_swallowed(stage, native):
    batch = make_batch([300], [1], num_heads=8)
    with pytest.raises(ValueError, match="k_pages"):
        paged(batch, metadata(batch, [1]), pool=sut.Pool(batch.k_pages[:, :100]))
    assert native == []


def test_two_batch_overlap_with_tail_rows(stage, native):
    batch = make_batch([300], [4], num_heads=8)
    ragged(batch, metadata(batch, [4]), tbo_parent_token_range=(0, 4))
    assert native == []
    sut.use(stage, native_tail_rows=4)
    ragged(batch, metadata(batch, [4]), tbo_parent_token_range=(0, 4))
    assert counted(stage) == [("prefill", "native", "two_batch_overlap", 4)]
