"""The hooks beside the Indexer's two methods, on SGLang's real classes (`test_hooked_indexer` has those two)."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.managers.io_struct import GetInternalStateReqOutput, SetInternalStateReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_ext import __version__, sglang_hooks
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import metadata, paged, ragged
from tests.support.inputs import make_batch


@pytest.fixture
def started() -> Iterator[Stage]:
    """A stage whose hooks are installed, with the runtime switch."""
    stage = Stage(Settings(runtime_switch=True), {})
    with sut.hooked(stage):
        sut.use(stage, runtime_switch=True)
        yield stage


def test_a_module_that_fails_to_import_is_found(monkeypatch):
    """Importing SGLang runs its code, which may fail in other ways than an ImportError."""

    def resolve_name(name: str) -> Any:
        raise OSError("libcuda.so is missing")

    monkeypatch.setattr(sglang_hooks.pkgutil, "resolve_name", resolve_name)
    problems = sglang_hooks.verify()
    assert len(problems) == len(sglang_hooks.wanted_hooks(False))
    assert all("OSError: libcuda.so is missing" in problem for problem in problems)


NO_PROMPTS = ((), (), [])  # in place of what an earlier batch had


def built(mode: ForwardMode, **changes: Any) -> SimpleNamespace:
    """A ForwardBatch of two requests, as init_new returns it."""
    lengths = {"seq_lens_cpu": torch.tensor([300, 80]), "extend_seq_lens_cpu": [20, 80]}
    return SimpleNamespace(forward_mode=mode, **lengths | changes)


@pytest.mark.parametrize(
    ("made", "tail_rows", "want"),
    [
        (built(ForwardMode.EXTEND), 8, ((300, 80), (20, 80), [350, 80])),
        (built(ForwardMode.EXTEND), 0, None),
        (built(ForwardMode.DECODE), 8, NO_PROMPTS),
        (built(ForwardMode.TARGET_VERIFY), 8, NO_PROMPTS),
        (built(ForwardMode.EXTEND, extend_seq_lens_cpu=None), 8, NO_PROMPTS),
    ],
    ids=["extend", "not_asked_for", "decode", "verify", "lengths_on_the_gpu"],
)
def test_prompts_are_noted_through_the_real_classmethod(monkeypatch, made, tail_rows, want):
    def init_new(cls: type, batch: Any, model_runner: Any, **_kwargs: Any) -> Any:
        assert cls is ForwardBatch
        return made

    stage = Stage(Settings(native_tail_rows=tail_rows), {})
    with sut.unpatched_sglang():
        ForwardBatch.init_new = classmethod(init_new)
        sglang_hooks.install(stage)
        HookRegistry.apply_hooks()
        requests = [SimpleNamespace(full_untruncated_fill_ids=range(tokens)) for tokens in (350, 80)]
        batch = SimpleNamespace(reqs=requests, decoding_reqs=None)
        assert ForwardBatch.init_new(batch, None, return_hidden_states_before_norm=False) is made
    assert stage._prompts == want


def test_traces_need_the_prompts_too(tmp_path):
    stage = Stage(Settings(), {})
    assert not stage.wants_prompts()
    sut.use(stage, trace_dir=str(tmp_path))
    assert stage.wants_prompts()


def server_info(stage: Stage) -> dict[str, Any]:
    """Our part of what a server sends: the patched Scheduler method, encoded and decoded as between its processes."""
    own = SimpleNamespace(get_internal_state=lambda _req: GetInternalStateReqOutput(internal_state={"tp_size": 8}))
    sent = msgspec.msgpack.encode(Scheduler.get_internal_state(SimpleNamespace(internal_state=own), None))
    state = msgspec.msgpack.decode(sent, type=GetInternalStateReqOutput).internal_state
    assert state["tp_size"] == 8
    return state["sglang_ext"]


def test_server_info_shows_what_ran(started):
    batch = make_batch([300], [5], num_heads=8)
    sut.use(started, decode_mode="native")
    ragged(batch, metadata(batch, [5]))
    decode = make_batch([300, 70], 1, num_heads=8)
    paged(decode, metadata(decode, [1, 1]))
    ours = server_info(started)
    assert ours["version"] == __version__ and ours["modes"] == {"prefill": "misa", "decode": "native"}
    assert ours["settings"]["route_block"] == 64
    assert [(c["phase"], c["mode"], c["reason"], c["calls"], c["rows"]) for c in ours["calls"]] == [
        ("decode", "native", "configured_native", 1, 2),
        ("prefill", "misa", "configured", 1, 5),
    ]


def switch(number: float) -> bool:
    """POST /set_internal_state from the scheduler's controller on; whether it was accepted."""
    sent = msgspec.msgpack.encode(SetInternalStateReq(server_args={sglang_hooks.RUNTIME_SWITCH_KEY: number}))
    request = msgspec.msgpack.decode(sent, type=SetInternalStateReq)
    return SchedulerInternalStateController(SimpleNamespace(), False).set_internal_state(request).updated


def test_a_switched_mode_is_what_the_next_forward_runs(started):
    batch, numbers = make_batch([300], [5], num_heads=8), server_info(started)["mode_numbers"]
    assert switch(numbers["native"])
    assert isinstance(ragged(batch, metadata(batch, [5])), sut.Recorder)
    assert switch(numbers["misa"])
    assert isinstance(ragged(batch, metadata(batch, [5])), torch.Tensor)
    assert not switch(len(numbers)) and started.settings.phase_mode("prefill") == "misa"
    decode = make_batch([300, 70], 1, num_heads=8)
    assert switch(numbers["native"])
    assert isinstance(paged(decode, metadata(decode, [1, 1])), torch.Tensor), "decode is frozen in graphs, and stays"
