"""The guard: what it judges, when, and that all ranks act on one rank's verdict."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_ext.guard import POLL_EVERY, Guard
from sglang_ext.overlap import Key, Total
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.support.inputs import Batch
from tests.support.stage_calls import calls, prefill, stage_batch
from tests.support.two_ranks import outputs_of_two

KEY = Key("prefill", "misa", 3)
WATCHED = Settings(mode="misa", backend="reference", shadow_rate=1.0, guard_overlap=0.9, guard_min_samples=100)


def total(rows: int, mean: float) -> Total:
    return Total(rows, rows * mean, ())


@pytest.mark.parametrize(
    ("rows", "mean", "falls"),
    [
        (100, 0.8999, True),
        (100, 0.9, False),
        (100, 0.9001, False),
        (99, 0.0, False),
        (5000, 0.89, True),
        (0, 0.0, False),
    ],
)
def test_flips_under_its_threshold_and_not_before_enough_rows(rows, mean, falls):
    assert Guard(0.9, 100).judge({KEY: total(rows, mean)}) == ([KEY] if falls else [])


def test_windows_follow_each_other():
    """A good start must not hide what comes after it, nor rows of before count towards the next window."""
    guard = Guard(0.9, 100)
    assert guard.judge({KEY: total(10000, 0.99)}) == []
    later = 9900.0
    assert guard.judge({KEY: Total(10099, later + 50, ())}) == [], "99 rows are too few"
    assert guard.judge({KEY: Total(10100, later + 89, ())}) == [KEY]
    guard = Guard(0.9, 100)
    assert guard.judge({KEY: Total(100, 95, ())}) == []
    assert guard.judge({KEY: Total(200, 95 + 90, ())}) == [], "exactly the threshold"
    assert guard.judge({KEY: Total(300, 95 + 90 + 89.99, ())}) == [KEY]


def test_layers_phases_and_modes_are_judged_apart():
    others = [KEY._replace(layer=4), KEY._replace(phase="decode"), KEY._replace(mode="hisa")]
    totals = {KEY: total(100, 0.5)} | {other: total(100, 0.95) for other in others}
    assert Guard(0.9, 100).judge(totals) == [KEY]


def test_what_has_fallen_is_not_judged_again():
    guard = Guard(0.9, 100)
    guard.native.add(KEY)
    assert guard.judge({KEY: total(100, 0.1)}) == []


def test_polls_at_the_same_batches_whatever_they_run(caplog):
    guard, asked = Guard(0.9, 100), []

    def agree(fallen: list[Key]) -> list[Key]:
        asked.append(fallen)
        return fallen

    with caplog.at_level(logging.WARNING, "sglang_ext"):
        for _ in range(POLL_EVERY - 1):
            guard.poll(lambda: {KEY: total(100, 0.5)}, agree)
        assert asked == [] and guard.native == set()
        guard.poll(lambda: {KEY: total(100, 0.5)}, agree)
        assert asked == [[KEY]] and guard.native == {KEY}
        for _ in range(POLL_EVERY):
            guard.poll(lambda: {KEY: total(300, 0.5)}, agree)
    assert asked == [[KEY], []], "ranks agree also where there is nothing to agree on"
    [line] = [record.getMessage() for record in caplog.records]
    assert "layer 3 returns to native in prefill" in line and "misa" in line and "0.9" in line and "0.5000" in line


def test_a_rank_follows_the_others_verdict():
    """Its own totals may differ by a tie of scores, or not have arrived."""
    guard = Guard(0.9, 100)
    for _ in range(POLL_EVERY):
        guard.poll(dict, lambda fallen: [KEY])
    assert guard.native == {KEY}
    guard = Guard(0.9, 100)
    for _ in range(POLL_EVERY):
        guard.poll(lambda: {KEY: total(100, 0.1)}, lambda fallen: [])
    assert guard.native == set()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stage_batch()


def test_a_layer_that_has_fallen_runs_native(batch):
    stage = Stage(WATCHED, {})
    forward = prefill(stage, batch)
    assert stage.takes(forward, 3) and stage.takes(forward, 4)
    stage.shadow.overlaps.add(KEY, torch.full((100,), 0.5, dtype=torch.float64))
    stage.shadow.overlaps.send()
    for _ in range(POLL_EVERY):
        stage.shadow.poll_guard(lambda fallen: fallen)
    forward = prefill(stage, batch)
    assert not stage.takes(forward, 3) and stage.takes(forward, 4)
    assert calls(stage) == {("prefill", "misa", "configured"): (3, 39), ("prefill", "native", "guard"): (1, 13)}
    assert stage.status()["shadow"]["guard"] == [["prefill", "misa", 3]]
    assert json.loads(json.dumps(stage.status()["shadow"])) == stage.status()["shadow"]


def test_runs_are_counted_in_the_first_layer_that_still_runs_the_mode(batch, monkeypatch):
    """Where the guard takes back the layer that counted a forward's runs, the others run on, and must be seen to."""
    stage = Stage(replace(WATCHED, native_layers=(2,)), {})
    stage._layers.update((2, 3, 4, 5))
    stage.shadow.guard.native |= {KEY._replace(phase="decode", layer=4), KEY._replace(mode="hisa", layer=4)}
    counted: list[int] = []
    monkeypatch.setattr(stage.counters, "step_device", lambda *_given: counted.append(layer))
    monkeypatch.setattr("sglang_ext.stage.capturing", lambda _device: False)
    monkeypatch.setattr("sglang_ext.stage.run", lambda *_given: None)
    on_gpu, out = SimpleNamespace(device=torch.device("cuda")), torch.empty((0, 64))
    for _ in range(2):
        forward = prefill(stage, batch)
        for layer in (3, 4, 5):
            if stage.takes(forward, layer):
                stage.run(forward, layer, on_gpu, None, None, None, None, out)
        stage.shadow.guard.native.add(KEY)
    assert counted == [3, 4]


def test_it_is_no_failure_under_strict(batch):
    stage = Stage(replace(WATCHED, native_layers=(), strict=True), {})
    stage.shadow.guard.native.add(KEY)
    assert not stage.takes(prefill(stage, batch), 3)


def test_without_a_threshold_there_is_no_guard():
    def agree(fallen: list[Key]) -> list[Key]:
        raise AssertionError("no message between ranks without a guard")

    assert Stage(Settings(), {}).shadow is None
    shadow = Stage(Settings(shadow_rate=0.5), {}).shadow
    for _ in range(2 * POLL_EVERY):
        shadow.poll_guard(agree)
    assert shadow.status()["guard"] is None


RANK = """
from sglang_ext.guard import agree_in
from sglang_ext.overlap import Key
mine = [Key("prefill", "misa", 7)] if rank == 0 else [Key("decode", "hisa", 1)]
print([tuple(key) for key in agree_in(group, 0, mine)], agree_in(group, 0, []), flush=True)
"""


def test_two_processes_act_on_what_the_first_has_found(tmp_path):
    assert outputs_of_two(RANK, tmp_path) == ["[('prefill', 'misa', 7)] []"] * 2


def test_the_group_is_the_attention_ranks(monkeypatch):
    parallel_state = pytest.importorskip("sglang.srt.distributed.parallel_state")
    from sglang_ext import sglang_shadow

    group = SimpleNamespace(world_size=1)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_attn_tp_group", lambda: group)
    assert sglang_shadow.agree_among_attention_ranks([KEY]) == [KEY]
    group = SimpleNamespace(world_size=2, cpu_group="cpu", ranks=[4, 5])
    monkeypatch.setattr(sglang_shadow, "agree_in", lambda *given: given)
    assert sglang_shadow.agree_among_attention_ranks([KEY]) == ("cpu", 4, [KEY])
