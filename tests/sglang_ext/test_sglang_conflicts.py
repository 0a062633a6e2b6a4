"""What happens beside another plugin's hooks, and on a model that has no indexer to hook: on SGLang's real registry."""

import functools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.settings import Settings
from sglang_ext.stage import Stage

pytest.importorskip("sglang")
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from sglang_ext import sglang_hooks
from sglang_ext.sglang_conflicts import other_hooks
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import metadata, ragged
from tests.support.inputs import make_batch

RAGGED, PAGED = sglang_hooks.SELECTING
THEIRS = object()  # what the other plugin's selection returns
NATIVE = object()
MISA = {"mode": "misa", "decode_mode": "misa", "backend": "reference", "route_block": 64, "active_heads": 2}


def theirs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return THEIRS


def passes_on(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


@pytest.fixture
def install() -> Iterator[Callable[..., Stage]]:
    """install(stage, before, after): the other plugin's hooks (target, hook, kind) registered around ours."""
    with sut.unpatched_sglang():

        @functools.wraps(Indexer.__init__)
        def init(self: Any, hidden_size: int, *_args: Any, **more: Any) -> None:
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.n_heads, self.head_dim = 8, 128
            self.index_topk, self.layer_id = 64, sut.LAYER

        Indexer.__init__ = init

        @functools.wraps(Indexer._get_topk_ragged)
        def native(*_args: Any, **_kwargs: Any) -> Any:
            return NATIVE

        Indexer._get_topk_ragged = native

        def make(stage: Stage, before: tuple[Any, ...] = (), after: tuple[Any, ...] = ()) -> Stage:
            source = HookSource("other_indexer", "other-dist")
            for target, hook, kind in before:
                HookRegistry.register(target, hook, kind, source=source)
            sglang_hooks.install(stage)
            for target, hook, kind in after:
                HookRegistry.register(target, hook, kind, source=source)
            HookRegistry.apply_hooks()
            return stage

        yield make


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this plugin warned of."""
    return [r.getMessage() for r in caplog.records if r.name == "sglang_ext" and r.levelno >= logging.WARNING]


def build() -> None:
    Indexer(7168, config=SimpleNamespace(sglang_ext=MISA))


def select() -> Any:
    batch = make_batch([300], [5], num_heads=8)
    return ragged(batch, metadata(batch, [5]))


# Two plugins


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("hook", [(theirs, HookType.AROUND), (passes_on, HookType.AROUND)])
def test_the_other_plugin_runs_and_this_one_stands_back(install, caplog, order, hook):
    stage = install(Stage(Settings(**MISA), {}), **{order: ((RAGGED, *hook),)})
    with caplog.at_level(logging.WARNING, "sglang_ext"):
        build()
    words = ("other_plugin", "plugin other_indexer has a hook (around) on", RAGGED)
    assert [all(word in line for word in words) for line in ours(caplog)] == [True]
    assert select() is (THEIRS if hook[0] is theirs else NATIVE)
    counted = {(one["mode"], one["reason"]) for one in stage.status()["calls"]}
    assert counted == (set() if (order, hook[0]) == ("after", theirs) else {("native", "other_plugin")})
    assert any("other_indexer" in line for line in stage.status()["refused"])


def test_a_replaced_method_is_served_as_it_is(install):
    def replacement(*_args: Any, **_kwargs: Any) -> Any:
        return THEIRS

    stage = install(Stage(Settings(**MISA), {}), after=((RAGGED, replacement, HookType.REPLACE),))
    build()
    assert select() is THEIRS
    assert [(one["mode"], one["reason"]) for one in stage.status()["calls"]] == [("native", "other_plugin")]


@pytest.mark.parametrize("target", [RAGGED, PAGED])
def test_a_strict_server_ends(install, target):
    install(Stage(Settings(**MISA, strict=True), {}), before=((target, theirs, HookType.AROUND),))
    config = SimpleNamespace(sglang_ext=MISA | {"strict": True})
    with pytest.raises(RuntimeError, match="strict.*another plugin hooks the same method.*other_indexer.*around"):
        Indexer(7168, config=config)


def test_nothing_is_refused_where_nothing_was_asked_for(install, caplog):
    native = {"mode": "native", "strict": True}
    install(Stage(Settings(**native), {}), before=((RAGGED, theirs, HookType.AROUND),))
    Indexer(7168, config=SimpleNamespace(sglang_ext=native))
    assert not ours(caplog)


@pytest.mark.parametrize("kind", [HookType.BEFORE, HookType.AFTER])
def test_hooks_that_decide_nothing_are_welcome(install, kind):
    """They see what is passed and returned, whoever selects."""
    seen = []
    stage = install(Stage(Settings(**MISA), {}), after=((RAGGED, lambda *args, **_kw: seen.append(len(args)), kind),))
    build()
    assert isinstance(select(), torch.Tensor) and len(seen) == 1
    assert [(one["mode"], one["reason"]) for one in stage.status()["calls"]] == [("misa", "configured")]


def test_a_hook_elsewhere_is_no_conflict(install):
    install(Stage(Settings(), {}), after=((f"{sglang_hooks.INDEXER}.forward_cuda", passes_on, HookType.AROUND),))
    assert other_hooks(sglang_hooks.SELECTING) == []


def test_the_whole_class_replaced_is_named():
    class Other(Indexer):
        pass

    with sut.unpatched_sglang():
        HookRegistry.register(sglang_hooks.INDEXER, Other, HookType.REPLACE)
        assert other_hooks(sglang_hooks.SELECTING) == [
            f"module {__name__} has a hook (replace) on {sglang_hooks.INDEXER}"
        ]


# A model without an indexer


def forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward of a model, through the hooked classmethod."""
    made = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    monkeypatch.setattr(ForwardBatch, "init_new", classmethod(lambda cls, batch, model_runner: made))
    sglang_hooks.HookRegistry.apply_hooks()
    assert ForwardBatch.init_new(SimpleNamespace(), None) is made


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_without_an_indexer(monkeypatch, caplog, strict):
    stage = Stage(Settings(mode="misa", decode_mode="misa", strict=strict), {})
    with sut.unpatched_sglang():
        sglang_hooks.install(stage)
        if strict:
            with pytest.raises(RuntimeError, match="strict.*no indexer of DeepSeek sparse attention.*no_indexer"):
                forward(monkeypatch)
            return
        with caplog.at_level(logging.WARNING, "sglang_ext"):
            forward(monkeypatch)
            ForwardBatch.init_new(SimpleNamespace(), None)
    assert ["no_indexer" in line for line in ours(caplog)] == [True]
    assert stage.status()["refused"] and stage.status()["indexer_layers"] == 0


@pytest.mark.parametrize("settings", [{"mode": "native", "strict": True}, {"mode": "native"}])
def test_native_serves_any_model_without_a_word(monkeypatch, caplog, settings):
    with sut.unpatched_sglang():
        sglang_hooks.install(Stage(Settings(**settings), {}))
        forward(monkeypatch)
    assert not ours(caplog)


def test_a_model_that_was_built_or_refused_is_not_refused_again(monkeypatch, caplog, install):
    stage = install(Stage(Settings(**MISA), {}))
    build()
    refused = Stage(Settings(**MISA), {})
    refused.refuse_model("kpool")
    said = len(ours(caplog))
    for one in (stage, refused):
        with sut.unpatched_sglang():
            sglang_hooks.install(one)
            forward(monkeypatch)
    assert len(ours(caplog)) == said and not stage.status()["refused"]
