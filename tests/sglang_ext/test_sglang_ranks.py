"""Ranks that share a batch are set up alike, or the server does not start."""

import ast
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

parallel_state = pytest.importorskip(
    "sglang.srt.distributed.parallel_state", reason="the sglang extra is not installed"
)
from sglang_ext import sglang_hooks, sglang_ranks
from sglang_ext.settings import Settings
from sglang_ext.sglang_statistics import statistics_of
from sglang_ext.stage import Stage
from sglang_ext.statistics import PoolStatistics
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.served_pool import make_pool
from tests.support.two_ranks import outputs_of_two

# The variables of the second rank are those given.
RANK = """
from sglang_ext.settings import load_settings
from sglang_ext.sglang_ranks import decided_by, differences_in, gather_in
from sglang_ext.stage import Stage
variables = dict(one.split("=") for one in arguments)
environ = {"SGLANG_EXT_MODE": "misa"} | (variables if rank else {})
with torch.device("meta"):  # SGLang builds models under a default device
    print(differences_in(group, [4, 5], decided_by(Stage(load_settings(None, environ), environ))), flush=True)
    assert gather_in(group, [4, 5], rank == 1) == [False, True]
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (["SGLANG_EXT_STRICT=1", "SGLANG_EXT_TRACE_DIR="], []),
        (["SGLANG_EXT_MODE=native"], ["mode is 'misa' on rank 4, 'native' on rank 5"]),
    ],
)
def test_two_processes(tmp_path, variables, said):
    assert [ast.literal_eval(output) for output in outputs_of_two(RANK, tmp_path, *variables)] == [said] * 2


def test_what_is_compared():
    """A kernel that one rank cannot compile is as good as another mode there; where a file lies is its own affair."""
    settings = Settings(mode="misa", settings_file="/a/tuned.json", trace_dir=None)
    stage = Stage(settings, {})
    other = Stage(replace(settings, settings_file="/b/tuned.json", strict=True), {})
    assert sglang_ranks.decided_by(stage) == sglang_ranks.decided_by(other)
    stage.support.reject(settings, "kernel scan does not compile: x17.cu: no nvcc")
    other.support.reject(settings, "kernel scan does not compile: x18.cu: no nvcc")
    assert sglang_ranks.decided_by(stage) == sglang_ranks.decided_by(other)
    other.support.reject(settings, "kernel pack does not compile: no nvcc")
    assert sglang_ranks.decided_by(stage) != sglang_ranks.decided_by(other)


def test_it_is_asked_once_as_the_model_is_built(monkeypatch):
    """SGLang builds an indexer for each layer, on every rank of the group."""
    asked: list[int] = []
    monkeypatch.setattr("sglang_ext.sglang_hooks.unapplied", lambda _stage: [])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    group = SimpleNamespace(world_size=2, cpu_group="cpu", ranks=[0, 1])
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: group)
    monkeypatch.setattr(sglang_ranks, "differences_in", lambda _group, ranks, _mine: asked.append(len(ranks)) or [])
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith("Indexer.__init__")]
    make = hook.make(Stage(Settings(mode="misa"), {}))
    for layer in (0, 1):
        shape = {"n_heads": 64, "head_dim": 128, "index_topk": 2048}
        make(None, SimpleNamespace(layer_id=layer, parameters=lambda: iter([torch.empty(0)]), **shape))
    assert asked == [2]
    monkeypatch.setattr(sglang_ranks, "differences_in", lambda *_given: ["mode is 1 on rank 0, 2 on rank 1"])
    with pytest.raises(RuntimeError, match="must be set up alike: mode is 1 on rank 0"):
        sglang_ranks.check_ranks(Stage(Settings(), {}))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_where_one_rank_lacks_memory_none_keeps_statistics(monkeypatch, elsewhere):
    """Else one rank would decode natively, and the others not."""
    stage = Stage(Settings(mode="native", decode_mode="hisa", backend="reference"), {})
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    group = SimpleNamespace(world_size=2, cpu_group="cpu", ranks=[0, 1])
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: group)
    monkeypatch.setattr(sglang_ranks, "gather_in", lambda _group, _ranks, mine: [mine, elsewhere])
    with sut.hooked(stage):
        kept = statistics_of(make_pool(4))
    assert kept == "statistics_memory" if elsewhere else isinstance(kept, PoolStatistics)
    assert len(stage.statistics.caches()) == (0 if elsewhere else 1), "its memory is given back"


def test_one_rank_asks_nobody(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(sglang_ranks, "gather_in", None)
    sglang_ranks.check_ranks(Stage(Settings(), {}))
    assert sglang_ranks.on_any_rank(True) and not sglang_ranks.on_any_rank(False)
