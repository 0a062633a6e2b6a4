"""What the hooks check before they are installed, and what they do around SGLang's real scheduler and model classes."""

import importlib.metadata
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_indexer_kpool import IndexerKPool
from sglang.srt.managers.io_struct import GetInternalStateReqOutput, SetInternalStateReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_ext import __version__, sglang_hooks
from sglang_ext.policy import UNSUPPORTED
from sglang_ext.settings import SERVE_MODES, Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import metadata, ragged, saved_targets
from tests.support.inputs import make_batch


@pytest.fixture
def clean() -> Iterator[None]:
    """Targets and registry as they were before the test."""
    with saved_targets(Stage(Settings(runtime_switch=True), {})):
        yield


# verify


@pytest.mark.parametrize("runtime_switch", [False, True])
def test_the_installed_sglang_fits(runtime_switch):
    assert sglang_hooks.verify(runtime_switch) == []
    assert (len(sglang_hooks.wanted_hooks(True)), len(sglang_hooks.wanted_hooks(False))) == (7, 6)


def test_every_hook_says_why():
    for hook in sglang_hooks.wanted_hooks(True):
        assert len(hook.why) > 20 and hook.parameters and hook.target.startswith("sglang.srt.")


def fewer(self, forward_batch, layer_id, q_fp8, weights):
    """_get_topk_paged without metadata."""


def renamed(self, forward_batch, layer_id, q, weights, metadata):
    """_get_topk_paged with another name in it."""


def more(self, forward_batch, layer_id, q_fp8, weights, metadata, sink):
    """_get_topk_paged with a parameter at the end: the adapter could not pass it on."""


@pytest.mark.parametrize("changed", [fewer, renamed, more])
def test_a_changed_signature_is_found(monkeypatch, changed):
    monkeypatch.setattr(Indexer, "_get_topk_paged", changed)
    (problem,) = sglang_hooks.verify()
    assert "Indexer._get_topk_paged has parameters" in problem and "'metadata')" in problem


def test_a_later_parameter_of_an_observed_method_is_no_problem(monkeypatch):
    def get_internal_state(self, recv_req, detail=False):
        """As a later SGLang may have it."""

    monkeypatch.setattr(Scheduler, "get_internal_state", get_internal_state)
    assert sglang_hooks.verify() == []


def test_a_missing_target_is_found(monkeypatch):
    monkeypatch.delattr(Indexer, "_get_topk_ragged")
    monkeypatch.delattr(Scheduler, "get_internal_state")
    problems = sglang_hooks.verify()
    assert len(problems) == 2 and all("is not there (AttributeError" in problem for problem in problems)


def test_a_module_that_fails_to_import_is_found(monkeypatch):
    def resolve_name(name: str) -> Any:
        raise OSError("libcuda.so is missing")

    monkeypatch.setattr(sglang_hooks.pkgutil, "resolve_name", resolve_name)
    assert len(sglang_hooks.verify()) == 6 and "OSError: libcuda.so is missing" in sglang_hooks.verify()[0]


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.5.23", True),
        ("0.5.23.post1", True),
        ("0.5.18", True),
        ("0.5.22", True),
        ("0.5.17", False),
        ("0.5.24", False),
        ("0.6.0", False),
        ("0.5.2", False),
    ],
)
def test_versions(monkeypatch, version, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"sglang": version}[name])
    problems = sglang_hooks.verify()
    assert problems == [] if fits else len(problems) == 1 and f"sglang {version} does not fit" in problems[0]


# install


def test_installed_hooks_are_all_applied(clean):
    stage = Stage(Settings(runtime_switch=True), {})
    wanted = {hook.target for hook in sglang_hooks.wanted_hooks(True)}
    assert set(sglang_hooks.unapplied(stage)) == wanted
    sglang_hooks.install(stage)
    assert set(HookRegistry._hooks) == wanted
    HookRegistry.apply_hooks()
    assert sglang_hooks.unapplied(stage) == []


def test_a_hook_that_sglang_failed_to_apply_ends_the_start(clean, monkeypatch):
    """SGLang logs such a failure and would serve on; the first indexer that is built does not let it."""
    monkeypatch.setattr(Indexer, "__init__", sut.Recorder().method(Indexer.__init__))
    sglang_hooks.install(Stage(Settings(), {}))
    monkeypatch.delattr(Indexer, "_get_topk_paged")
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match="did not apply the hooks on .*Indexer._get_topk_paged"):
        Indexer.__init__(built())
    monkeypatch.undo()


def built() -> SimpleNamespace:
    """What the hook on __init__ reads of the indexer."""
    return SimpleNamespace(**vars(sut.indexer()), parameters=lambda: iter([torch.zeros(1)]))


@pytest.fixture
def started(monkeypatch) -> Iterator[Stage]:
    """A stage installed over stand-ins; its hook on __init__ sees every indexer that a test builds."""
    stage = Stage(Settings(runtime_switch=True), {"SGLANG_EXT_RUNTIME_SWITCH": "1"})
    with sut.hooked(stage):
        yield stage


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_an_indexers_config_sets_the_mode(started, how):
    config = SimpleNamespace(sglang_ext={"mode": "hisa", "native_layers": [0]}, hidden_size=7168)
    if how == "keyword":
        Indexer.__init__(built(), 7168, 64, config=config)
    else:
        Indexer.__init__(built(), *range(16), config)
    assert (started.settings.mode, started.settings.native_layers) == ("hisa", (0,))
    assert started.status()["indexer_layers"] == 1


def test_an_indexer_without_config_keeps_the_settings(started):
    """dots3 builds its indexer without one."""
    before = started.settings
    Indexer.__init__(built(), 7168)
    assert started.settings == before and started.status()["indexer_layers"] == 1


def test_a_wrong_setting_in_the_model_config_ends_the_start(started):
    with pytest.raises(ValueError, match="unknown setting mod "):
        Indexer.__init__(built(), config=SimpleNamespace(sglang_ext={"mod": "hisa"}))


def test_models_with_another_indexer_class(clean, monkeypatch, caplog):
    monkeypatch.setattr(IndexerKPool, "__init__", sut.Recorder().method(IndexerKPool.__init__))
    stage = Stage(Settings(mode="hisa"), {})
    sglang_hooks.install(stage)
    HookRegistry.apply_hooks()
    IndexerKPool.__init__(SimpleNamespace())
    assert stage.status()["refused"] == [f"{UNSUPPORTED['kpool']} (kpool)"]
    stage.settings = Settings(mode="hisa", strict=True)
    with pytest.raises(RuntimeError, match="k-pool"):
        IndexerKPool.__init__(SimpleNamespace())
    monkeypatch.undo()


# The batch, and its prompts


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE])
def test_prompts_are_noted_through_the_real_classmethod(clean, monkeypatch, mode):
    made = SimpleNamespace(forward_mode=mode, seq_lens_cpu=torch.tensor([300, 80]), extend_seq_lens_cpu=[20, 80])

    def init_new(cls, batch, model_runner, **kwargs):
        assert cls is ForwardBatch
        return made

    monkeypatch.setattr(ForwardBatch, "init_new", classmethod(init_new))
    stage = Stage(Settings(native_tail_rows=8), {})
    sglang_hooks.install(stage)
    HookRegistry.apply_hooks()
    requests = [SimpleNamespace(full_untruncated_fill_ids=range(n)) for n in (350, 80)]
    batch = SimpleNamespace(reqs=requests, decoding_reqs=None)
    assert ForwardBatch.init_new(batch, None, return_hidden_states_before_norm=False) is made
    assert stage._prompts == (((300, 80), (20, 80), [350, 80]) if mode is ForwardMode.EXTEND else None)
    monkeypatch.undo()


# The server's state


def internal_state(stage: Stage) -> dict[str, Any]:
    """What a server would send: the patched Scheduler method over a stand-in of the scheduler, encoded and decoded."""
    own = SimpleNamespace(get_internal_state=lambda _req: GetInternalStateReqOutput(internal_state={"tp_size": 8}))
    sent = msgspec.msgpack.encode(Scheduler.get_internal_state(SimpleNamespace(internal_state=own), None))
    return msgspec.msgpack.decode(sent, type=GetInternalStateReqOutput).internal_state


def test_server_info_shows_the_plugin(started):
    sut.use(started, runtime_switch=True)
    batch = make_batch([300], [5], num_heads=8)
    ragged(batch, metadata(batch, [5]))
    state = internal_state(started)
    assert state["tp_size"] == 8
    ours = state["sglang_ext"]
    assert ours["version"] == __version__ and ours["modes"] == {"prefill": "misa", "decode": "misa"}
    assert ours["settings"]["route_block"] == 64
    assert ours["calls"] == [{"phase": "prefill", "mode": "misa", "reason": "configured", "calls": 1, "rows": 5}]


def switch(number: float) -> bool:
    """POST /set_internal_state, from the scheduler's controller on; whether it was accepted."""
    controller = SchedulerInternalStateController(SimpleNamespace(), False)
    body = msgspec.json.encode({"server_args": {sglang_hooks.RUNTIME_SWITCH_KEY: number}})
    return controller.set_internal_state(msgspec.json.decode(body, type=SetInternalStateReq)).updated


def test_the_prefill_mode_can_be_switched(started):
    sut.use(started, runtime_switch=True)
    batch = make_batch([300], [5], num_heads=8)
    numbers = internal_state(started)["sglang_ext"]["mode_numbers"]
    assert switch(numbers["native"])
    assert started.settings.phase_mode("prefill") == "native" and started.settings.phase_mode("decode") == "misa"
    assert isinstance(ragged(batch, metadata(batch, [5])), sut.Recorder)
    assert switch(numbers["misa"]) and isinstance(ragged(batch, metadata(batch, [5])), torch.Tensor)


@pytest.mark.parametrize("number", [len(SERVE_MODES), -1, 0.5])
def test_a_switch_to_no_mode_is_rejected(started, number):
    before = started.settings
    assert not switch(number) and started.settings is before


def test_without_the_setting_sglang_rejects_the_switch(clean):
    sglang_hooks.install(Stage(Settings(), {}))
    HookRegistry.apply_hooks()
    assert not switch(0)


def test_sglangs_other_switches_still_work(started):
    handlers = SchedulerInternalStateController(SimpleNamespace(), False)._update_handlers()
    assert {"pp_max_micro_batch_size", sglang_hooks.RUNTIME_SWITCH_KEY} <= set(handlers)


def test_the_table_is_what_the_architecture_page_says():
    assert {hook.kind for hook in sglang_hooks.hooks()} == {HookType.AFTER, HookType.AROUND}
    assert [hook.target.rpartition(".")[2] for hook in sglang_hooks.hooks() if hook.kind is HookType.AROUND] == [
        "_get_topk_ragged",
        "_get_topk_paged",
    ]
