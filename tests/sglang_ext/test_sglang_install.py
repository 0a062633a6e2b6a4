"""Which methods of SGLang are patched, what is said of those that do not fit, and what the scheduler then does."""

import functools
import importlib.metadata
import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from indexer_kernels.top_k import PlannedTopK
from sglang_ext.settings import SERVE_MODES, Settings
from sglang_ext.stage import Stage

pytest.importorskip("sglang")
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_indexer_kpool import IndexerKPool
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_ext import sglang_hooks
from tests.sglang_ext.patched_indexer import SWITCH_TARGET, TARGETS, unpatched_sglang

SWITCH = internal_state.SchedulerInternalStateController


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    with unpatched_sglang():
        yield


def install(settings: Settings) -> Stage:
    stage = Stage(settings, {"SGLANG_EXT_RUNTIME_SWITCH": str(settings.runtime_switch)})
    sglang_hooks.install(stage)
    HookRegistry.apply_hooks()
    return stage


# verify


@pytest.mark.parametrize("runtime_switch", [False, True])
def test_this_sglang_fits(runtime_switch):
    assert sglang_hooks.verify(runtime_switch) == []


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.5.23", True), ("0.5.18", True), ("0.5.23.post1", True), ("0.5.17", False), ("0.5.24", False), ("0.6.0", False)]
    + [("0.5.2", False), ("1.5.23", False)],
)
def test_version(monkeypatch, version, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"sglang": version}[name])
    problems = sglang_hooks.verify()
    assert len(problems) == (0 if fits else 1)
    assert fits or (version in problems[0] and "0.5.23" in problems[0] and "0.5.18" in problems[0])


def test_more_parameters_at_the_end(monkeypatch):
    """A wrapped-around method's new parameter would be lost on the way; an AFTER hook passes everything on."""

    def topk(self, forward_batch, layer_id, q_fp8, weights, metadata, more=None): ...

    def state(self, recv_req, more=None): ...

    monkeypatch.setattr(Scheduler, "get_internal_state", state)
    assert sglang_hooks.verify() == []
    monkeypatch.setattr(Indexer, "_get_topk_paged", topk)
    [sentence] = sglang_hooks.verify()
    assert "Indexer._get_topk_paged has parameters" in sentence and "'more'" in sentence


@pytest.mark.parametrize(
    ("owner", "name", "changed"),
    [
        (Indexer, "_get_topk_paged", lambda self, forward_batch, layer_id, q_fp8, metadata, weights: None),
        (Indexer, "_get_topk_ragged", lambda self, forward_batch, layer_id, q_fp8, weights, metadata: None),
        (Indexer, "__init__", lambda self, config: None),
        (Scheduler, "get_internal_state", lambda self: None),
        (ForwardBatch, "init_new", classmethod(lambda cls, model_runner, batch: None)),
        (SWITCH, "_update_handlers", lambda: None),
    ],
)
def test_a_changed_signature_is_one_sentence(monkeypatch, owner, name, changed):
    monkeypatch.setattr(owner, name, changed)
    [sentence] = sglang_hooks.verify(runtime_switch=True)
    assert f"{owner.__qualname__}.{name} has parameters" in sentence and "expected" in sentence
    assert str(tuple(inspect.signature(getattr(owner, name)).parameters)) in sentence


@pytest.mark.parametrize(("owner", "name"), [(Indexer, "_get_topk_ragged"), (Scheduler, "get_internal_state")])
def test_a_missing_method_is_one_sentence(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    [sentence] = sglang_hooks.verify()
    assert f"{owner.__qualname__}.{name} is not there" in sentence and "AttributeError" in sentence


def test_a_missing_module_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sglang_hooks, "SCHEDULER", "sglang.srt.managers.planner.Scheduler")
    [sentence] = sglang_hooks.verify()
    assert "sglang.srt.managers.planner.Scheduler.get_internal_state is not there" in sentence


def test_the_switch_is_looked_at_only_where_it_is_on(monkeypatch):
    monkeypatch.delattr(SWITCH, "_update_handlers")
    assert sglang_hooks.verify(False) == []
    assert len(sglang_hooks.verify(True)) == 1


def test_every_problem_is_named(monkeypatch):
    monkeypatch.delattr(Indexer, "_get_topk_ragged")
    monkeypatch.delattr(Scheduler, "get_internal_state")
    assert len(sglang_hooks.verify()) == 2


# install


@pytest.mark.parametrize("runtime_switch", [False, True])
def test_install_patches_exactly_the_targets(runtime_switch):
    before = {target: sglang_hooks.pkgutil.resolve_name(target) for target in (*TARGETS, SWITCH_TARGET)}
    stage = install(Settings(runtime_switch=runtime_switch))
    want = {*TARGETS, SWITCH_TARGET} if runtime_switch else {*TARGETS}
    assert set(HookRegistry._hooks) == HookRegistry._patched == want
    assert {target for target in before if sglang_hooks.pkgutil.resolve_name(target) != before[target]} == want
    assert sglang_hooks.unapplied(stage) == []
    assert all(hook.why for hook in sglang_hooks.wanted_hooks(runtime_switch))


# A model is built


def build(indexer_class: type = Indexer, **config: Any) -> None:
    """An indexer of a model with this config, as SGLang's models build it."""
    shape = {"hidden_size": 7168, "index_n_heads": 8, "index_head_dim": 128, "rope_head_dim": 64, "index_topk": 512}
    indexer_class(**shape, layer_id=3, config=SimpleNamespace(**config))


@pytest.fixture
def light_init() -> None:
    """Indexers without linear layers, which need SGLang's process groups."""
    for owner in (Indexer, IndexerKPool):

        @functools.wraps(owner.__init__)
        def init(
            self: Any, hidden_size: int, index_n_heads: int, index_head_dim: int, *_args: Any, **more: Any
        ) -> None:
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.n_heads, self.head_dim = index_n_heads, index_head_dim
            self.index_topk, self.layer_id = more["index_topk"], more["layer_id"]

        owner.__init__ = init


def test_a_built_indexer_brings_the_models_settings(light_init, monkeypatch):
    stage = install(Settings())
    seen = []
    start = stage.start
    monkeypatch.setattr(stage, "start", lambda *args: (seen.append(args), start(*args)))
    build(sglang_ext={"mode": "hisa"}, index_topk=512)
    [(fields, *shape)] = seen
    assert fields == {"sglang_ext": {"mode": "hisa"}, "index_topk": 512}
    assert shape == [3, 8, 128, 512, torch.device("cpu")]
    assert stage.settings.mode == "hisa"


def test_an_indexer_without_config(light_init):
    stage = install(Settings())
    Indexer(7168, 8, 128, rope_head_dim=64, index_topk=512, layer_id=3)
    assert stage.status()["indexer_layers"] == 1 and stage.settings == Settings()


def test_wrong_settings_of_a_model_end_its_building(light_init):
    install(Settings())
    with pytest.raises(ValueError, match="mode='fast'"):
        build(sglang_ext={"mode": "fast"})


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_of_the_other_indexer_class(light_init, caplog, strict):
    stage = install(Settings(mode="misa", strict=strict))
    if strict:
        with pytest.raises(RuntimeError, match="kpool"):
            build(IndexerKPool)
        return
    with caplog.at_level(logging.WARNING, "sglang_ext"):
        build(IndexerKPool)
    assert "k-pool" in caplog.text and len(stage.status()["refused"]) == 1


def test_a_hook_that_was_not_applied_ends_the_model(light_init, monkeypatch):
    """SGLang only logs such a failure."""
    with monkeypatch.context() as gone:
        gone.delattr(Scheduler, "get_internal_state")
        stage = install(Settings())
        assert sglang_hooks.unapplied(stage) == ["sglang.srt.managers.scheduler.Scheduler.get_internal_state"]
        with pytest.raises(RuntimeError, match="did not apply the hooks on .*Scheduler.get_internal_state"):
            build()


# Scheduler


def test_server_info_shows_the_status(monkeypatch):
    def own(self: Any, recv_req: Any) -> Any:
        return io_struct.GetInternalStateReqOutput(internal_state={"world_size": 1})

    Scheduler.get_internal_state = own
    stage = install(Settings(mode="misa", runtime_switch=True))
    stage.counters.count("prefill", "misa", "configured", 7)
    answer = object.__new__(Scheduler).get_internal_state(io_struct.GetInternalStateReq())
    assert answer.internal_state == {"world_size": 1, "sglang_ext": stage.status()}
    sent = io_struct.msgpack_decode(io_struct.msgpack_encode(answer))
    assert sent.internal_state["sglang_ext"]["calls"][0]["rows"] == 7


def switch_to(value: float) -> bool:
    """POST /set_internal_state as the scheduler answers it."""
    controller = SWITCH(SimpleNamespace(), record_step_time=False)
    request = io_struct.SetInternalStateReq(server_args={"sglang_ext_prefill_mode": value})
    return controller.set_internal_state(request).updated


def test_prefill_mode_switched_by_request():
    stage = install(Settings(mode="misa", decode_mode="misa", runtime_switch=True))
    assert switch_to(SERVE_MODES.index("hisa"))
    assert (stage.settings.phase_mode("prefill"), stage.settings.phase_mode("decode")) == ("hisa", "misa")


@pytest.mark.parametrize("value", [-1, 99, 0.5])
def test_wrong_mode_number_is_rejected(value, caplog):
    stage = install(Settings(mode="misa", runtime_switch=True))
    assert not switch_to(value)
    assert stage.settings == Settings(mode="misa", runtime_switch=True)
    handler = SWITCH(SimpleNamespace(), False)._update_handlers()["sglang_ext_prefill_mode"]
    with pytest.raises(internal_state.UpdateRejected, match="must be one of.*native"):
        handler.validate("sglang_ext_prefill_mode", value)


def test_sglangs_own_switches_stay():
    own = set(SWITCH(SimpleNamespace(), False)._update_handlers())
    install(Settings(runtime_switch=True))
    assert set(SWITCH(SimpleNamespace(), False)._update_handlers()) == own | {"sglang_ext_prefill_mode"}


def test_no_switch_unless_set():
    stage = install(Settings(mode="misa"))
    assert not switch_to(0) and stage.settings == Settings(mode="misa")


def test_sglangs_top_k_kernel_is_called_as_it_is_declared(monkeypatch):
    """Its result needs a GPU (tests/indexer_kernels/gpu); that its arguments still fit does not."""
    from sglang.kernels.ops.attention.dsv4 import topk

    plan, transform, made = inspect.signature(topk.plan_topk_v2), inspect.signature(topk.topk_transform_paged_v2), []
    monkeypatch.setattr(topk, "plan_topk_v2", lambda *args, **kw: ("plan", plan.bind(*args, **kw).arguments))
    monkeypatch.setattr(
        topk, "topk_transform_paged_v2", lambda *args, **kw: made.append(transform.bind(*args, **kw).arguments)
    )
    scores, lengths, table, out = (torch.zeros(n) for n in range(1, 5))
    sglang_hooks.sglang_top_k(scores, lengths, table, out)
    [given] = made
    names = list(transform.parameters)
    assert [given[name] for name in names[:5]] == [scores, lengths, table, out, 64]
    assert given[names[5]][0] == "plan" and lengths is next(iter(given[names[5]][1].values()))
    assert isinstance(sglang_hooks.sglang_top_k, PlannedTopK)
    sglang_hooks.sglang_top_k(scores, lengths, table, out, plan="kept")
    assert made[1][names[5]] == "kept"
