"""Shadow sampling of a decode that reads stored block statistics: both are kept, and neither sees the other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang_ext.overlap import Key
from sglang_ext.settings import Settings
from sglang_ext.stage import Model, Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import TOP_K, Recorder
from tests.sglang_ext.served_pool import HEADS, Request, Server, make_pool

STEPS = 5
LENGTHS = [500, 300, 40]  # the last has nothing to choose


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage(Settings(backend="reference"), {})
    stage._models.add(Model(HEADS, 128, TOP_K))
    with sut.hooked(stage):
        yield stage


def steps(stage: Stage, rate: float) -> tuple[Server, list[torch.Tensor]]:
    """A server of two layers, and what decode steps of three requests select: by step, then by layer."""
    sut.use(stage, mode="native", decode_mode="hisa", block_size=64, local_tokens=1, shadow_rate=rate)
    object.__setattr__(stage.settings, "top_blocks", 3)
    server, requests = Server(make_pool(40, (False, False))), [Request() for _ in LENGTHS]
    server.extend(list(zip(requests, LENGTHS)))
    chosen = [layer for _ in range(STEPS) for layer in server.decode(requests)]
    assert all(server.wrong(request, request.length) == [] for request in requests)
    return server, chosen


def test_statistics_and_answers_are_those_without_sampling(stage, monkeypatch):
    asked: list[list[int]] = []

    def first_tokens(_native: Recorder, rows: torch.Tensor) -> torch.Tensor:
        """As if SGLang had selected each row's first tokens."""
        asked.append(rows.tolist())
        return torch.arange(TOP_K).int().expand(len(rows), -1)

    monkeypatch.setattr(Recorder, "__getitem__", first_tokens, raising=False)
    _, want = steps(stage, 0.0)
    assert asked == []
    _, got = steps(stage, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(want, got)) and len(want) == len(got) == 2 * STEPS
    assert asked == [[0, 1, 2]] * (2 * STEPS)
    totals: dict[Key, Any] = stage.shadow.overlaps.read(wait=True)
    assert set(totals) == {Key("decode", "hisa", layer) for layer in (0, 1)}
    for layer, total in ((key.layer, total) for key, total in totals.items()):
        rows = [set(row) for selection in got[layer::2] for row in selection[:2].tolist()]
        shares = [len(row & set(range(TOP_K))) / TOP_K for row in rows]
        assert total.rows == 2 * STEPS and total.mean == pytest.approx(sum(shares) / len(shares), abs=1e-6)
        assert 0 < total.mean < 1
