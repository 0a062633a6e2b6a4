"""Shadow sampling of decode: eager steps are compared, graphs are not touched; and the guard's place in a batch."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry

from indexer_kernels import select_ragged
from sglang_ext import sglang_hooks
from sglang_ext.guard import POLL_EVERY
from sglang_ext.overlap import Key
from sglang_ext.settings import Settings
from sglang_ext.shadow import Sample
from sglang_ext.stage import Model, Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import LAYER, TOP_K
from tests.support.inputs import Batch, make_batch, slots_of

LENGTHS = [300, 64, 170, 65, 20, 210]
PAD = 3


class Native:
    """SGLang's own method: what native selects, in slots, -1 in rows that only pad; notes its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answer = torch.empty(0)

    def __call__(self, *given: Any, **named: Any) -> torch.Tensor:
        assert not named
        self.calls.append(given)
        return self.answer


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(LENGTHS, 1, num_heads=8, seed=21)


@pytest.fixture
def native(batch) -> Native:
    native = Native()
    native.answer = torch.full((len(LENGTHS) + PAD, TOP_K), -1, dtype=torch.int32)
    for row, positions in enumerate(chosen(batch, "native")):
        native.answer[row, : len(positions)] = torch.tensor(slots_of(batch, row, sorted(positions)))
    return native


@pytest.fixture
def stage(native, monkeypatch) -> Iterator[Stage]:
    budget = {"backend": "reference", "route_block": 64, "active_heads": 2}
    settings = Settings(mode="native", decode_mode="misa", **budget, shadow_rate=1.0, guard_overlap=0.999)
    stage = Stage(settings, {})
    stage._models.add(Model(8, 128, TOP_K))
    with sut.unpatched_sglang():
        monkeypatch.setattr(Indexer, "_get_topk_paged", lambda *given: native(*given))
        sglang_hooks.install(stage)
        HookRegistry.apply_hooks()
        assert sglang_hooks.unapplied(stage) == []
        yield stage


def chosen(batch: Batch, mode: str) -> list[set[int]]:
    params = Settings(route_block=64, active_heads=2).params(TOP_K)
    return [set(row) - {-1} for row in select_ragged(mode, *batch.ragged, params, backend="reference").tolist()]


def shares(batch: Batch, rows: list[int]) -> list[float]:
    ours, native = chosen(batch, "misa"), chosen(batch, "native")
    return [len(ours[row] & native[row]) / len(native[row]) for row in rows if LENGTHS[row] > TOP_K]


def found(batch: Batch) -> Any:
    return sut.metadata(batch, [1] * len(LENGTHS))


def test_an_eager_step_is_compared(stage, native, batch):
    metadata = found(batch)
    got = sut.paged(batch, metadata, pad=PAD)
    want = shares(batch, list(range(len(LENGTHS))))
    assert len(want) == 4 and min(want) < 1
    [(key, total)] = stage.shadow.overlaps.read(wait=True).items()
    assert key == Key("decode", "misa", LAYER) and total.rows == 4, "rows with nothing to choose do not count"
    assert total.mean == pytest.approx(sum(want) / 4, abs=1e-6)
    [given] = native.calls
    assert len(given) == 6 and given[2] == LAYER and given[5] is metadata and given[3].shape[0] == len(LENGTHS) + PAD
    stage.shadow = None
    assert torch.equal(sut.paged(batch, found(batch), pad=PAD), got) and len(native.calls) == 1


def test_a_part_of_the_rows(stage, native, batch):
    stage.shadow._rows = 3
    sut.paged(batch, found(batch), pad=PAD)
    want = shares(batch, [0, 2, 4])
    [total] = stage.shadow.overlaps.read(wait=True).values()
    assert total.rows == len(want) == 2 and total.mean == pytest.approx(sum(want) / 2, abs=1e-6)


def test_lengths_are_never_read_back(stage):
    """They are on the device; a meta tensor has no values to read."""
    sample = stage.shadow.plan_decode(6, torch.empty(6, dtype=torch.int32, device="meta"), TOP_K)
    assert sample.counts.shape == (6,)


def test_a_graph_is_not_touched(stage, native, batch, monkeypatch):
    """The metadata of the eager runs before a capture is the graph's too, and its sample must stay out of the graph."""
    metadata = found(batch)
    sut.paged(batch, metadata, pad=PAD)
    assert len(native.calls) == 1 and isinstance(metadata.attn_metadata.sglang_ext_sample, Sample)
    for where in ("shadow", "stage", "forwards"):
        monkeypatch.setattr(f"sglang_ext.{where}.capturing", lambda device: True)
    monkeypatch.setattr("sglang_ext.shadow.Mark", None)  # an event of a capture has no time
    sut.paged(batch, metadata, pad=PAD)
    sut.paged(batch, found(batch), pad=PAD)  # a batch size whose capture comes first
    assert len(native.calls) == 1
    assert stage.status()["shadow"]["forwards"] == {"decode/cuda_graph": 2, "decode/sampled": 1}


def test_runs_before_a_capture_are_no_sample(stage, native, batch):
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    with model_capture_mode():  # SGLang's own: rows that it makes up, twice for each graph
        for _ in range(2):
            sut.paged(batch, found(batch), pad=PAD)
    assert native.calls == [] and stage.status()["shadow"]["forwards"] == {}
    sut.paged(batch, found(batch), pad=PAD)
    assert stage.status()["shadow"]["forwards"] == {"decode/sampled": 1}


def test_graphs_are_counted_by_forward(stage):
    for layer in (0, 1, 60, 0, 1, 60, 1, 60, 3):
        stage.shadow._count_graph(Key("decode", "hisa", layer))
    assert stage.status()["shadow"]["forwards"] == {"decode/cuda_graph": 4}


# The guard, from a batch to the next


def next_batch(stage: Stage) -> None:
    """SGLang makes a ForwardBatch of a decode step."""
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith(".init_new")]
    hook.make(stage)(SimpleNamespace(forward_mode=ForwardMode.DECODE), None, SimpleNamespace())


def build_indexer(stage: Stage) -> None:
    """SGLang builds an indexer of layer 5."""
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith("Indexer.__init__")]
    built = SimpleNamespace(
        layer_id=5, n_heads=8, head_dim=128, index_topk=TOP_K, parameters=lambda: iter([torch.empty(0)])
    )
    hook.make(stage)(None, built)


def test_a_guard_needs_to_know_the_ranks(stage, monkeypatch):
    """Found as the model is built, not batches later."""
    build_indexer(stage)
    monkeypatch.delattr("sglang.srt.distributed.parallel_state.get_attn_tp_group")
    with pytest.raises(RuntimeError, match="guard_overlap needs SGLang's get_attn_tp_group"):
        build_indexer(stage)
    stage.shadow.guard = None
    build_indexer(stage)


def test_the_guard_returns_a_layer_to_sglangs_own(stage, native, batch, monkeypatch):
    asked: list[list[Key]] = []

    def agree(fallen: list[Key]) -> list[Key]:
        asked.append(fallen)
        return fallen

    monkeypatch.setattr("sglang_ext.sglang_hooks.agree_among_attention_ranks", agree)
    stage.shadow.guard.min_rows = 4 * POLL_EVERY - 4
    for step in range(POLL_EVERY):
        next_batch(stage)
        sut.paged(batch, found(batch), pad=PAD)
        assert len(native.calls) == step + 1
    assert asked == [[Key("decode", "misa", LAYER)]], "judged on the 31 steps before"
    assert sut.paged(batch, found(batch), pad=PAD) is native.answer
    counted = {(c["mode"], c["reason"]): c["calls"] for c in stage.counters.snapshot()["calls"]}
    assert counted == {("misa", "configured"): POLL_EVERY - 1, ("native", "guard"): 2}
