"""Shadow sampling under SGLang's real prefill method: what it measures, and that nothing else changes."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from indexer_kernels import select_ragged
from sglang_ext import sglang_hooks, sglang_shadow
from sglang_ext.overlap import BOUNDS, Key
from sglang_ext.sampling import Sampler, pick_rows
from sglang_ext.settings import Settings
from sglang_ext.shadow import Shadow
from sglang_ext.stage import Model, Stage
from tests.sglang_ext import native_on_cpu as cpu
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import TOP_K
from tests.support.inputs import Batch, make_batch

FORMS: dict[str, dict[str, Any]] = {
    "slots": {},
    "offsets": {"topk_transform_method": TopkTransformMethod.RAGGED},
    "positions": {"force_unfused_topk": True},
}
# a chunk, a prompt too short to choose from, a decoding row of a mixed batch, another chunk
LENGTHS, COUNTS = [300, 40, 170, 220], [30, 40, 1, 25]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(LENGTHS, COUNTS, num_heads=cpu.HEADS, seed=11)


@pytest.fixture(scope="module")
def installed() -> Iterator[Stage]:
    stage = Stage(Settings(backend="reference"), {})
    stage._models.add(Model(cpu.HEADS, 128, TOP_K))
    with cpu.watched(stage):
        yield stage


@pytest.fixture
def stage(installed: Stage) -> Stage:
    sut.use(installed, shadow_rate=1.0, shadow_rows=8)
    return installed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that asks for SGLang's own selection of a sample."""
    calls: list[int] = []
    real = sglang_shadow.native_prefill_rows

    def counted(*given: Any) -> torch.Tensor:
        calls.append(len(given[-1].rows))
        return real(*given)

    monkeypatch.setattr("sglang_ext.sglang_hooks.native_prefill_rows", counted)
    return calls


def selected(batch: Batch, stage: Stage, mode: str) -> list[set[int]]:
    chosen = select_ragged(mode, *batch.ragged, stage.settings.params(TOP_K), backend="reference")
    return [set(row) - {-1} for row in chosen.tolist()]


def rows_sampled(forward: int, limit: int, ends: list[int] = LENGTHS) -> list[int]:
    """Rows of the module's batch that the forward-th forward of a stage that samples all of them compares."""
    sampler = Sampler(1.0)
    for _ in range(forward):
        sampler.next()
    picked = pick_rows(LENGTHS, COUNTS, ends, TOP_K, limit, sampler.fraction())
    assert picked is not None
    request, positions = picked
    return [sum(COUNTS[:request]) + p - (LENGTHS[request] - COUNTS[request]) for p in positions]


def outcomes(stage: Stage) -> dict[str, int]:
    return stage.status()["shadow"]["forwards"]


# What SGLang is asked


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pad", [0, 3])
def test_native_rows_are_those_of_the_whole_forward(batch, form, pad):
    """SGLang's method, asked for a sample's rows, returns what it returns for them among all others, in that form."""
    with cpu.real_native(), sut.unpatched_sglang():
        found = cpu.metadata(batch, COUNTS, **FORMS[form])
        whole = cpu.prefill(batch, found, COUNTS, pad)
        shadow, requests = Shadow(Settings(shadow_rate=1.0, shadow_rows=8)), set()
        for _ in range(40):
            sample = shadow.plan_prefill(LENGTHS, COUNTS, LENGTHS, TOP_K, torch.device("cpu"))
            requests.add(sample.request)
            rows = ask(batch, found, sample, pad)
            assert rows.shape == (len(sample.rows), TOP_K)
            assert rows.sort(dim=1).values.equal(whole[sample.rows].sort(dim=1).values)
            assert sample.lengths.tolist() == [batch.lengths[row] for row in sample.rows.tolist()]
    assert requests >= {0, 3}


def ask(batch: Batch, found: Any, sample: Any, pad: int) -> torch.Tensor:
    fields = SimpleNamespace(forward_mode=ForwardMode.MIXED, seq_lens_cpu=LENGTHS, extend_seq_lens_cpu=COUNTS)
    q, weights = sut.padded(batch.q, pad), sut.padded(batch.weights, pad).unsqueeze(-1)
    of = sut.indexer(n_heads=cpu.HEADS, logits_with_pp_recv=False)
    with sut.serving(cpu.Pool(batch.k_pages)):
        return sglang_shadow.native_prefill_rows(
            Indexer._get_topk_ragged, of, False, fields, sut.LAYER, q, weights, found, sample
        )


# What is measured


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["misa", "hisa", "group_rerank"])
def test_totals_equal_an_independent_computation(stage, batch, mode, form):
    sut.use(stage, mode=mode, shadow_rate=1.0, shadow_rows=8, candidates=2048, top_blocks=33, block_size=64)
    big = mode != "misa"
    lengths, counts = ([2500, 2300], [12, 9]) if big else (LENGTHS, COUNTS)
    some = make_batch(lengths, counts, num_heads=cpu.HEADS, seed=12) if big else batch
    ours, native = selected(some, stage, mode), selected(some, stage, "native")
    shares, sampler = [], Sampler(1.0)
    for _ in range(6):
        request, positions = pick_rows(lengths, counts, lengths, TOP_K, 8, sampler.fraction())
        sampler.next()
        rows = [sum(counts[:request]) + p - (lengths[request] - counts[request]) for p in positions]
        shares += [len(ours[row] & native[row]) / len(native[row]) for row in rows]
        cpu.prefill(some, cpu.metadata(some, counts, **FORMS[form]), counts, pad=2)
    [(key, total)] = stage.shadow.overlaps.read(wait=True).items()
    assert key == Key("prefill", mode, sut.LAYER) and total.rows == len(shares)
    assert total.mean == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert total.at_most == tuple(sum(share <= bound for share in shares) for bound in BOUNDS)
    assert min(shares) < 1, "a mode that finds everything says nothing"
    assert stage.shadow.overlaps.read() == {key: total}, "sent after the last layer"
    assert outcomes(stage) == {"prefill/sampled": 6}


def test_all_layers_compare_the_same_rows(stage, batch, asked):
    found = cpu.metadata(batch, COUNTS)
    for layer in (1, 2, 5):
        cpu.prefill(batch, found, COUNTS, layer=layer)
    totals = stage.shadow.overlaps.read(wait=True)
    assert set(totals) == {Key("prefill", "misa", layer) for layer in (1, 2, 5)} and len(set(totals.values())) == 1
    assert asked == [8] * 3 and outcomes(stage) == {"prefill/sampled": 1}


def test_totals_are_sent_after_the_last_layer(stage, batch, monkeypatch):
    """And before the next sampled forward adds to them. Which layer is the last, the first forward tells."""
    sent: list[dict[int, int]] = []
    overlaps = stage.shadow.overlaps

    def send() -> None:
        sent.append({key.layer: total.rows // 8 for key, total in overlaps.read(wait=True).items()})

    monkeypatch.setattr(overlaps, "send", send)
    for _ in range(2):
        found = cpu.metadata(batch, COUNTS)
        for layer in (1, 4, 5):
            cpu.prefill(batch, found, COUNTS, layer=layer)
    assert sent[-2:] == [{1: 1, 4: 1, 5: 1}, {1: 2, 4: 2, 5: 2}]


def test_prompts_that_sglang_makes_up_for_its_graphs_are_not_measured(stage, batch, asked, monkeypatch):
    """Up to 8192 tokens of one page, for every graph: their ties would count as tokens that a mode misses."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import enable_breakable_cuda_graph
    from sglang.srt.runtime_context import get_flags

    with enable_breakable_cuda_graph():  # in capture as in every replay
        with monkeypatch.context() as capture:
            capture.setattr(get_flags().dp, "capturing_prefill_graph", True)
            for _ in range(3):
                cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
        assert asked == [] and stage.shadow.overlaps.read(wait=True) == {} and outcomes(stage) == {}
        cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
    assert asked == [8] and outcomes(stage) == {"prefill/sampled": 1}


def test_prompts_of_a_rank_that_has_none_are_not_measured(stage, batch, asked):
    """With data-parallel attention and prefill graphs SGLang turns an idle rank's batch into a prompt as long as the
    others': its keys are those of the padding page, over and over.
    """
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith(".init_new")]
    make = hook.make(stage)
    for mode, sampled in (
        (ForwardMode.IDLE, 0),
        (ForwardMode.EXTEND, 1),
        (ForwardMode.DECODE, 1),
        (ForwardMode.MIXED, 2),
    ):
        make(SimpleNamespace(forward_mode=mode), None, SimpleNamespace())
        cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
        assert len(asked) == sampled
    assert outcomes(stage) == {"prefill/sampled": 2}


def test_layers_that_are_native_are_not_measured(stage, batch, asked):
    sut.use(stage, shadow_rate=1.0, native_layers=(2,))
    found = cpu.metadata(batch, COUNTS)
    for layer in (1, 2):
        cpu.prefill(batch, found, COUNTS, layer=layer)
    assert set(stage.shadow.overlaps.read(wait=True)) == {Key("prefill", "misa", 1)} and len(asked) == 1


def test_times_of_sampled_layers(stage, batch):
    for _ in range(3):
        cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
    times = stage.shadow.times.read()
    assert {tuple(kind): number for kind, (number, _) in times.items()} == {
        ("prefill", "misa", "selection"): 3,
        ("prefill", "misa", "shadow"): 3,
    }
    assert all(seconds > 0 for _, seconds in times.values())


def test_rows_of_the_native_tail_are_left_out(stage, batch):
    sut.use(stage, shadow_rate=1.0, shadow_rows=64, native_tail_rows=10)
    ends = []
    whole = [305, 40, 1 << 40, 220]  # the first prompt goes on for five tokens, the third request decodes
    for forward in range(8):
        stage.note_prompts(LENGTHS, COUNTS, whole)
        cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
        ends.append(rows_sampled(forward, 64, [length - 10 for length in whole]))
    ours, native = selected(batch, stage, "misa"), selected(batch, stage, "native")
    shares = [len(ours[row] & native[row]) / len(native[row]) for rows in ends for row in rows]
    assert {max(rows) for rows in ends} == {24, 85}, "positions 294 and 209"
    [total] = stage.shadow.overlaps.read(wait=True).values()
    assert total.rows == len(shares) and total.mean == pytest.approx(sum(shares) / len(shares), abs=1e-6)


# What does not change


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_without_sampling(stage, batch, form, asked):
    results = []
    for rate in (0.0, 1.0):
        sut.use(stage, shadow_rate=rate)
        out = torch.full((sum(COUNTS) + 7, TOP_K), -1, dtype=torch.int32)
        assert asked == []
        got = cpu.prefill(batch, cpu.metadata(batch, COUNTS, **FORMS[form]), COUNTS, pad=3, out=out)
        assert torch.equal(got, out), "a graph reads the result where it gave it"
        results.append(out)
    assert torch.equal(*results) and asked == [30]
    assert stage.counters.snapshot()["calls"] == [
        {"phase": "prefill", "mode": "misa", "reason": "configured", "calls": 1, "rows": sum(COUNTS)}
    ], "a sample is no call of its own"


def test_off_means_off(stage, batch, asked, monkeypatch):
    sut.use(stage)
    monkeypatch.setattr("sglang_ext.shadow.Mark", None)
    found = cpu.metadata(batch, COUNTS)
    cpu.prefill(batch, found, COUNTS)
    assert stage.shadow is None and asked == [] and "shadow" not in stage.status()
    assert not hasattr(found.attn_metadata, "sglang_ext_sample")


def test_native_forwards_are_not_sampled(stage, batch, asked):
    sut.use(stage, mode="auto", shadow_rate=1.0)
    cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
    assert asked == [] and outcomes(stage) == {}


def test_the_share_of_forwards(stage, asked):
    sut.use(stage, shadow_rate=0.05, shadow_rows=2)
    some = make_batch([70], [2], num_heads=cpu.HEADS, seed=13)
    for _ in range(1024):
        cpu.prefill(some, cpu.metadata(some, [2]), [2])
    assert len(asked) == 51 == int(0.05 * 1024) and outcomes(stage) == {"prefill/sampled": 51}


def test_forwards_with_nothing_to_measure(stage, asked):
    """They do not use up the share either."""
    sut.use(stage, shadow_rate=1.0)
    short, longer = (make_batch([length], [10], num_heads=cpu.HEADS, seed=14) for length in (TOP_K, TOP_K + 1))
    for some in (short, longer):
        cpu.prefill(some, cpu.metadata(some, [10]), [10])
    assert asked == [1] and outcomes(stage) == {"prefill/short": 1, "prefill/sampled": 1}
    assert stage.shadow._samplers["prefill"].count == 1


def test_an_error_ends_the_measuring_only(stage, batch, monkeypatch, caplog):
    sut.use(stage, shadow_rate=0.0)
    want = cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS)
    sut.use(stage, shadow_rate=1.0)
    failed = []

    def fails(*_given: Any) -> torch.Tensor:
        failed.append(1)
        raise torch.cuda.OutOfMemoryError("no memory for scores")

    monkeypatch.setattr("sglang_ext.sglang_hooks.native_prefill_rows", fails)
    with caplog.at_level(logging.ERROR, "sglang_ext"):
        for _ in range(3):
            assert torch.equal(cpu.prefill(batch, cpu.metadata(batch, COUNTS), COUNTS), want)
    assert len(failed) == 1 and outcomes(stage) == {"prefill/sampled": 1, "prefill/error": 1}
    [record] = caplog.records
    assert "shadow sampling ends" in record.getMessage() and record.exc_info
    assert stage.shadow._samplers["prefill"].count == 3, "ranks count on together"


def test_other_tensors_than_the_hooks_expect_are_an_error_too(stage, batch, caplog):
    found = cpu.metadata(batch, COUNTS, indexer_seq_lens=None)
    with caplog.at_level(logging.ERROR, "sglang_ext"):
        cpu.prefill(batch, found, COUNTS)
    assert outcomes(stage) == {"prefill/sampled": 1, "prefill/error": 1} and len(caplog.records) == 1
