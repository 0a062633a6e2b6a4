"""The routed scan as TileLang generates it, run on this CPU: in all three forms every value is at its place, whatever
the shares, and the warps' barriers let each other go on.
"""

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import routed, routed_scores_kernel
from indexer_kernels.gpu.routed import Routed, cache_keys
from indexer_kernels.gpu.work import pages_of
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.emulated_cuda import build_routed_scores
from tests.support.gpu_calls import work_of
from tests.support.inputs import make_batch
from tests.support.interpreted_kernels import packed_heads

NUM_SMS, NUM_HEADS = 3, 32


@pytest.mark.parametrize("shares", [1, 5])
@pytest.mark.parametrize("active", [4, 8, 16])
def test_scores_maxima_and_bits(active, shares, monkeypatch):
    """Tiles with 32, 8 and fewer rows, of unlike length, an odd number of pages, shares without work, and a tile that
    is left out. A row of NaN and a page whose scales are NaN disturb no other.
    """
    monkeypatch.setattr(routed_scores_kernel, "build", build_routed_scores)
    monkeypatch.setattr(routed, "num_sms", lambda _device: NUM_SMS)
    monkeypatch.setattr(routed, "scan_shares", lambda _units, _device: shares)
    batch = make_batch([330, 131, 40, 64, 200], [40, 18, 1, 2, 1], num_heads=NUM_HEADS, seed=61)
    plan, random = batch.plan, torch.Generator().manual_seed(3)
    batch.weights[5] = float("nan")
    batch.k_scale[4][64:128] = float("nan")
    batch.k_pages.view(torch.float32).view(-1, 33, 64)[batch.page_table[4, 1], 32] = float("nan")
    chosen = [torch.randperm(NUM_HEADS, generator=random)[:active].sort().values for _ in range(plan.num_rows)]
    heads = torch.stack(chosen)
    packed = Routed(heads.int(), *packed_heads(batch, heads.int()))
    pages = torch.where(plan.tile_length == 64, 0, pages_of(plan.tile_length)).int()
    job, tiles = work_of(batch, IndexerParams(active_heads=active)), slice(0, plan.num_tiles)
    scanned = (job, packed, cache_keys(job), pages, tiles, routed.whole_stages(6, active))
    scores, maxima = (routed.routed_scan(*scanned, form) for form in ("scores", "maxima"))
    thresholds = torch.randn(len(scores), generator=random) * 3
    mask = routed.routed_scan(*scanned, "mask", thresholds)
    words, compared = routed_scores_kernel.mask_words(active), 0
    for row, (request, seen) in enumerate(zip(batch.row_request, batch.lengths)):
        place, own = int(plan.row_place[row]), heads[row]
        if int(plan.tile_length[place // TILE_ROWS]) == 64:
            continue
        q = batch.q.view(torch.uint8)[row : row + 1, own].view(torch.float8_e4m3fn)
        want = token_scores(
            q, batch.weights[row : row + 1, own], batch.k[request][:seen], batch.k_scale[request][:seen]
        )
        got = scores[place, :seen]
        assert torch.equal(got.isnan(), want[0].isnan()) and got.isnan().any() == (row == 5 or request == 4)
        torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-4, equal_nan=True)
        cells = got[: seen // 16 * 16].view(-1, 16)
        whole = ~cells.isnan().any(1)
        assert torch.equal(maxima[place, : len(cells)][whole], cells.amax(1)[whole])
        unit, inside = divmod(place, routed_scores_kernel.unit_rows(active))
        at = torch.arange(seen)
        word = mask[unit, at // 16, at % 16 // 8 * (words // 2) + inside // 8 * 2 + inside % 2]
        assert torch.equal((word >> (at % 8 * 4 + inside % 8 // 2)) & 1 == 1, got >= thresholds[place])
        compared += 1
    assert compared == 60
