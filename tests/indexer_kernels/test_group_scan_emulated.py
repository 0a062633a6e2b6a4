"""group_rerank's scan as TileLang generates it, run on this CPU: every score and bit is at its place, whatever the
shares, and the warps' barriers let each other go on.
"""

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import group_scan, group_scan_kernel
from indexer_kernels.gpu.routed import cache_keys
from indexer_kernels.gpu.work import pages_of
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.row_groups import group_proxies
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.emulated_cuda import build_group_scan
from tests.support.gpu_calls import work_of
from tests.support.inputs import make_batch
from tests.support.packed_proxies import packed

NUM_SMS = 3


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(group_scan_kernel, "build", build_group_scan)
    monkeypatch.setattr(group_scan, "num_sms", lambda _device: NUM_SMS)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_scores_and_bits(num_heads, shares, emulated, monkeypatch):
    """Tiles with 35, 9 and one group, of unlike length, an odd number of pages, and a tile that is left out."""
    monkeypatch.setattr(group_scan, "scan_shares", lambda _units, _device: shares)
    batch = make_batch([330, 131, 40, 64], [70, 18, 1, 2], num_heads=num_heads, seed=61)
    group = 2
    rows, scans = batch.plan.groups(group).rows, batch.plan.scans(group)
    job = work_of(batch, IndexerParams(group=group))._replace(plan=scans)
    places = (scans.row_place, scans.num_tiles * TILE_ROWS)
    proxies, tiles = group_proxies(batch.q, batch.weights, rows), slice(0, scans.num_tiles)
    pages = torch.where(scans.tile_length == 63, 0, pages_of(scans.tile_length))
    scanned = (job, packed(proxies, *places), cache_keys(job), pages.int(), tiles, group_scan.whole_stages(6))
    scores = group_scan.scan(*scanned, "scores")
    thresholds = torch.randn(len(scores), generator=torch.Generator().manual_seed(1)) * 3
    mask = group_scan.scan(*scanned, "mask", thresholds)
    compared = 0
    for g, (request, seen) in enumerate(zip(scans.row_request.tolist(), scans.row_lengths.tolist())):
        if seen == 63:
            continue
        place, one = int(scans.row_place[g]), slice(g, g + 1)
        tensors = (proxies.q[one], proxies.weights[one], batch.k[request][:seen], batch.k_scale[request][:seen])
        got, want = scores[place, :seen], token_scores(*tensors)[0]
        assert (got - want).norm() <= 1e-5 * want.norm(), g
        tile, inside = divmod(place, TILE_ROWS)
        at = torch.arange(seen)
        word = mask[tile, at // 16, at % 16 // 8 * 8 + inside // 8 * 2 + inside % 2]
        assert torch.equal((word >> (at % 8 * 4 + inside % 8 // 2)) & 1 == 1, got >= thresholds[place]), g
        compared += 1
    assert compared == 46
