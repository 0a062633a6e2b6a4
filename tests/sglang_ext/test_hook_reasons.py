"""Why SGLang's own indexer serves a call: every reason, in both phases, met on its real classes; and what runs else."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext import policy
from sglang_ext.settings import Settings, load_settings
from sglang_ext.stage import Stage
from tests.support.brute_force import brute_force
from tests.support.compare import assert_same_selection
from tests.support.inputs import Batch, make_batch
from tests.support.stage_calls import MISA

pytest.importorskip("sglang", reason="the sglang extra is not installed")
from sglang.srt.layers.attention.dsa import dsa_indexer
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_ext import sglang_hooks
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import TOP_K

LAYERS = range(8)
NATIVE = object()  # what SGLang's own indexer answers here
STRICT = replace(MISA, strict=True)


@dataclass
class Served:
    """SGLang with the hooks applied, around recorders in place of its own methods."""

    stage: Stage
    pool: sut.Pool
    backend: SimpleNamespace
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def counted(self) -> set[tuple[str, str, str]]:
        return {(one["phase"], one["mode"], one["reason"]) for one in self.stage.counters.snapshot()["calls"]}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """serve(settings, batch): install the plugin for them."""
    with sut.unpatched_sglang():

        def make(settings: Settings, batch: Batch, **pool: Any) -> Served:
            served = Served(
                Stage(settings, {}),
                sut.Pool(batch.k_pages, LAYERS, **pool),
                SimpleNamespace(hisparse_coordinator=None),
            )

            def recorder(name: str) -> Callable[..., Any]:
                def original(*args: Any, **kwargs: Any) -> Any:
                    served.calls.append((name, args, kwargs))
                    return NATIVE

                return original

            for name in ("_get_topk_ragged", "_get_topk_paged"):
                setattr(dsa_indexer.Indexer, name, recorder(name))
            monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: served.pool)
            monkeypatch.setattr(dsa_indexer, "get_attn_backend", lambda: served.backend)
            sglang_hooks.install(served.stage)
            HookRegistry.apply_hooks()
            assert sglang_hooks.unapplied(served.stage) == []
            return served

        yield make


@pytest.fixture(scope="module")
def batch() -> Batch:
    """A chunk after a prefix, a whole short prompt, one row: what a mixed batch is made of."""
    return make_batch([300, 40, 70], [9, 40, 1], num_heads=8, seed=5)


@pytest.fixture(scope="module")
def steps() -> Batch:
    """One row per request."""
    return make_batch([300, 40, 65, 1], 1, num_heads=8, seed=6)


def forward_of(mode: ForwardMode, **fields: Any) -> SimpleNamespace:
    """What the plugin looks at in a ForwardBatch."""
    return SimpleNamespace(forward_mode=mode, **fields)


def inputs_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """q_fp8 and weights [.., H, 1]."""
    return batch.q, batch.weights.unsqueeze(-1)


def extend(batch: Batch, metadata: Any, layer: int = 0, indexer: Any = None, forward: Any = None) -> Any:
    """The patched _get_topk_ragged, called as forward_cuda calls it."""
    indexer = sut.indexer() if indexer is None else indexer
    forward = forward_of(ForwardMode.EXTEND) if forward is None else forward
    return indexer._get_topk_ragged(False, forward, layer, *inputs_of(batch), metadata)


def step(batch: Batch, metadata: Any, indexer: Any = None) -> Any:
    """The patched _get_topk_paged in decode."""
    indexer = sut.indexer() if indexer is None else indexer
    return indexer._get_topk_paged(forward_of(ForwardMode.DECODE), 0, *inputs_of(batch), metadata)


def to_positions(out: torch.Tensor, batch: Batch, form: str) -> torch.Tensor:
    """The entries of `form` as positions in their request; an entry in no page of the request fails."""
    positions = torch.full_like(out, -1)
    for row, entries in enumerate(out.tolist()):
        pages = batch.page_table[batch.row_request[row]].tolist()
        for column, entry in enumerate(entries):
            if entry >= 0:
                slot = pages.index(entry // 64) * 64 + entry % 64 if form == "slot" else None
                positions[row, column] = {"position": entry, "offset": entry - int(batch.ks[row]), "slot": slot}[form]
    return positions


def check(out: torch.Tensor, batch: Batch, settings: Settings, form: str = "slot") -> None:
    """out is what loops written from the mode's formulas select."""
    *tensors, ks, ke = batch.ragged
    want = brute_force(settings.mode, *tensors, ks.tolist(), ke.tolist(), **asdict(settings.params(TOP_K)))
    # looked at in the given form: as a position, an offset that moved a -1 would be one again
    assert all((row[len(some) :] == -1).all() for row, some in zip(out, want))
    assert_same_selection(to_positions(out, batch, form), want, batch.lengths, TOP_K)


# What runs


@pytest.mark.parametrize(
    ("method", "unfused", "form"),
    [
        ("PAGED", False, "slot"),
        ("RAGGED", False, "offset"),
        ("PAGED", True, "position"),
        ("RAGGED", True, "position"),
    ],
)
def test_prefill_against_brute_force(serve, batch, method, unfused, form):
    serve(STRICT, batch)
    check(
        extend(
            batch, sut.metadata(batch, topk_transform_method=TopkTransformMethod[method], force_unfused_topk=unfused)
        ),
        batch,
        MISA,
        form,
    )


def test_decode_against_brute_force(serve, steps):
    serve(STRICT, steps)
    check(step(steps, sut.metadata(steps)), steps, MISA)


@pytest.mark.parametrize("mode", ["misa_rerank", "hisa", "group_rerank"])
def test_modes_with_a_budget_against_brute_force(serve, mode):
    """At a length where the smallest budget that settings allow still prunes."""
    batch = make_batch([2500, 200], [3, 2], num_heads=8, seed=2)
    settings = replace(STRICT, mode=mode, decode_mode=mode, candidates=2048, block_size=64, top_blocks=33)
    serve(settings, batch)
    check(extend(batch, sut.metadata(batch)), batch, settings)


def test_native_layers(serve, batch):
    served, metadata = serve(replace(STRICT, native_layers=(0, 2)), batch), sut.metadata(batch)
    results = [extend(batch, metadata, layer=layer) for layer in range(4)]
    assert [result is NATIVE for result in results] == [True, False, True, False]
    assert [args[3] for _, args, _ in served.calls] == [0, 2]
    check(results[3], batch, MISA)
    assert served.counted() == {("prefill", "misa", "configured"), ("prefill", "native", "native_layer")}


def test_layers_with_settings_of_their_own(serve, batch):
    """A mode and parameters per layer in one forward, through the real methods, in both phases."""
    own = {"0": {"mode": "native"}, "2": {"active_heads": 4}, "3": {"route_block": 128}}
    base = {name: value for name, value in STRICT.as_dict().items() if name != "layers"}
    layered = load_settings({"sglang_ext": {**base, "layers": own}}, {})
    served, metadata = serve(layered, batch), sut.metadata(batch)
    results = [extend(batch, metadata, layer=layer) for layer in range(4)]
    assert [result is NATIVE for result in results] == [True, False, False, False]
    for layer, want in ((1, MISA), (2, replace(MISA, active_heads=4)), (3, replace(MISA, route_block=128))):
        check(results[layer], batch, want)
    assert len({tuple(map(tuple, result.sort(dim=1).values.tolist())) for result in results[1:]}) == 3
    assert served.counted() == {("prefill", "misa", "configured"), ("prefill", "native", "native_layer")}


# SGLang's own


@pytest.mark.parametrize("given", [False, True])
def test_native_prefill_is_sglangs_own_call(serve, batch, given):
    served, metadata, indexer = serve(Settings(mode="native"), batch), sut.metadata(batch), sut.indexer()
    inputs, forward, result = inputs_of(batch), forward_of(ForwardMode.EXTEND), torch.zeros(1) if given else None
    more = (result,) if given else ()
    assert indexer._get_topk_ragged(False, forward, 7, *inputs, metadata, *more) is NATIVE
    [(name, args, kwargs)] = served.calls
    want = (indexer, False, forward, 7, *inputs, metadata, result)
    assert name == "_get_topk_ragged" and kwargs == {} and len(args) == len(want)
    assert all(got is expected for got, expected in zip(args, want))


def test_native_decode_is_sglangs_own_call(serve, steps):
    served, metadata, indexer = serve(Settings(), steps), sut.metadata(steps), sut.indexer()
    inputs, forward = inputs_of(steps), forward_of(ForwardMode.DECODE)
    assert indexer._get_topk_paged(forward, 7, *inputs, metadata) is NATIVE
    [(name, args, kwargs)] = served.calls
    want = (indexer, forward, 7, *inputs, metadata)
    assert name == "_get_topk_paged" and kwargs == {} and len(args) == len(want)
    assert all(got is expected for got, expected in zip(args, want))
    assert served.counted() == {("decode", "native", "auto_decode_native")}


OBSTACLES: dict[str, dict[str, Any]] = {
    "index_topk": {"indexer": {"index_topk": 4096}},
    "head_dim": {"indexer": {"head_dim": 64}},
    "forced_tokens": {"indexer": {"num_local_tokens": 1}},
    "context_parallel": {"indexer": {"dsa_enable_prefill_cp": True}},
    "kv_shard": {"metadata": {"indexer_logical_page_table": torch.zeros(1)}},
    "layer_split_pool": {"pool": {"get_broadcastable_index_k_with_scale_buffer": print}},
    "page_size": {"pool": {"index_page_size": 1}},
    "hisparse": {"backend": {"hisparse_coordinator": object()}},
    "rows_mismatch": {"metadata": {"dsa_extend_seq_lens_list": [1, 1]}},
    "no_kernel": {"settings": {"backend": "gpu"}},
    "two_batch_overlap": {"settings": {"native_tail_rows": 4}, "forward": {"tbo_parent_token_range": (0, 9)}},
}
CASES = [(phase, reason) for reason in OBSTACLES for phase in ("prefill", "decode")]
CASES.remove(("decode", "two_batch_overlap"))


def meet(serve: Any, batch: Batch, steps: Batch, phase: str, reason: str, strict: bool) -> tuple[Served, Any]:
    """(served, what the call returned) of a forward with one obstacle."""
    obstacle = OBSTACLES[reason]
    some = batch if phase == "prefill" else steps
    served = serve(replace(MISA, strict=strict, **obstacle.get("settings", {})), some, **obstacle.get("pool", {}))
    served.backend.__dict__.update(obstacle.get("backend", {}))
    metadata = sut.metadata(some, **obstacle.get("metadata", {}))
    indexer = sut.indexer(**obstacle.get("indexer", {}))
    if phase == "decode":
        return served, step(some, metadata, indexer)
    return served, extend(
        some, metadata, indexer=indexer, forward=forward_of(ForwardMode.EXTEND, **obstacle.get("forward", {}))
    )


@pytest.mark.parametrize(("phase", "reason"), CASES)
def test_unsupported_is_served_by_sglang_and_counted(serve, batch, steps, phase, reason):
    served, result = meet(serve, batch, steps, phase, reason, strict=False)
    assert result is NATIVE and len(served.calls) == 1
    assert served.counted() == {(phase, "native", reason)}


@pytest.mark.parametrize(("phase", "reason"), CASES)
def test_unsupported_ends_a_strict_server(serve, batch, steps, phase, reason):
    with pytest.raises(RuntimeError, match=f"strict.*{reason}"):
        meet(serve, batch, steps, phase, reason, strict=True)


def test_every_reason_is_met_somewhere():
    # too_long needs the gpu backend's limit (test_stage.py); some are met as a model is built (test_sglang_install.py,
    # test_sglang_conflicts.py), what has to do with stored statistics in test_statistics_reasons.py
    elsewhere = {"too_long", "kpool", "no_indexer", "other_plugin"}
    elsewhere |= {"no_statistics", "statistics_memory", "statistics_lost", "block_size"}
    assert set(policy.UNSUPPORTED) - elsewhere == set(OBSTACLES)
