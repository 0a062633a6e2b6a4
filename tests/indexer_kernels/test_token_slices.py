"""misa and misa_rerank take as many tiles at a time as a launch may have lists."""

import types

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import token_modes
from indexer_kernels.gpu.lists import empty_lists
from indexer_kernels.row_plan import TILE_ROWS, plan_extend


def test_a_launch_has_no_more_lists_than_a_grid_may_have(monkeypatch):
    """3000 requests of one row are 3000 tiles, 96,000 places: with a small budget all of them would fit the scratch."""
    params = IndexerParams(top_k=64, candidates=128)
    plan, seen = plan_extend([0] * 3000, [1] * 3000), []

    def candidate_lists(_work, _routed, _sample, tiles, _budget, width, *_forced):
        seen.append(tiles)
        return empty_lists((tiles.stop - tiles.start) * TILE_ROWS, width, False, torch.device("cpu"))

    routed = types.SimpleNamespace(of_tiles=lambda _tiles: None)
    for name, stub in (("route", lambda _work: routed), ("sample_keys", lambda *_: None), ("num_sms", lambda _: 132)):
        monkeypatch.setattr(token_modes, name, stub)
    monkeypatch.setattr(token_modes, "candidate_lists", candidate_lists)
    job = types.SimpleNamespace(
        q=torch.empty(0),
        plan=plan,
        params=params,
        pool=types.SimpleNamespace(pages=None),
        page_table=torch.zeros((3000, 1), dtype=torch.int32),
        slots=True,
        top_k=lambda *_: None,
        out=torch.empty((3000, params.top_k), dtype=torch.int32),
    )
    token_modes._select(job, params.top_k, 0, 0, lambda _routed, lists, _rows: lists.slots)
    assert sum(tiles.stop - tiles.start for tiles in seen) == plan.num_tiles == 3000
    assert max((tiles.stop - tiles.start) * TILE_ROWS for tiles in seen) <= 65535
