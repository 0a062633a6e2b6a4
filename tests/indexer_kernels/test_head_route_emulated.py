"""Head routing as TileLang generates it, run on this CPU."""

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from indexer_kernels.gpu.head_route_kernel import TILE_BLOCKS
from indexer_kernels.page_layout import HEAD_DIM
from indexer_kernels.reference.routing import routing_scores
from indexer_kernels.reference.statistics import block_means
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.emulated_cuda import build_head_route
from tests.support.inputs import Batch, make_batch

BLOCK, ACTIVE = 64, 8
UNWRITTEN = 1 << 30


def means_of(batch: Batch) -> torch.Tensor:
    most = max(len(k) for k in batch.k) // BLOCK
    means = torch.zeros((len(batch.k), -(-most // TILE_BLOCKS) * TILE_BLOCKS, HEAD_DIM), dtype=torch.bfloat16)
    for request, (k, k_scale) in enumerate(zip(batch.k, batch.k_scale)):
        means[request, : len(k) // BLOCK] = block_means(k, k_scale, BLOCK).bfloat16()
    return means


def routed_heads(batch: Batch, means: torch.Tensor, statistic: str) -> torch.Tensor:
    """The kernel's heads, UNWRITTEN where it leaves one out."""
    plan, num_heads = batch.plan, batch.q.shape[1]
    heads = torch.full((plan.num_rows, ACTIVE), UNWRITTEN, dtype=torch.int32)
    build_head_route(num_heads, ACTIVE, BLOCK, statistic)(
        batch.q.view(-1, HEAD_DIM),
        batch.weights,
        means,
        plan.row_lengths,
        plan.tile_request,
        plan.tile_rows.view(-1, TILE_ROWS),
        heads,
    )
    return heads


@pytest.mark.parametrize("statistic", ["sum", "max"])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_routes_the_heads_of_largest_statistic(num_heads, statistic):
    """Requests of three tiles of blocks, of fewer blocks than a tile, and of none; rows that fill no CTA."""
    batch = make_batch([257 * BLOCK + 3, 3 * BLOCK, 40], [5, 34, 1], num_heads=num_heads, seed=5)
    means = means_of(batch)
    heads = routed_heads(batch, means, statistic)
    for row, (request, length) in enumerate(zip(batch.row_request, batch.lengths)):
        blocks = torch.tensor([length // BLOCK])
        tensors = (batch.q[row : row + 1], batch.weights[row : row + 1], means[request].float(), blocks)
        routing = routing_scores(*tensors, statistic)[0]
        assert len(set(heads[row].tolist())) == ACTIVE
        best = routing.sort(descending=True, stable=True)
        torch.testing.assert_close(routing[heads[row].long()], best.values[:ACTIVE], rtol=1e-4, atol=1e-4)
        if length < BLOCK:
            assert heads[row].tolist() == list(range(ACTIVE)), "ties go to the lower head"


@pytest.mark.parametrize("statistic", ["sum", "max"])
def test_a_row_of_nan_has_heads_and_disturbs_no_other(statistic):
    """The next kernel gathers queries by these heads: one that is not written, or not one of the row's, is a read
    beyond the queries.
    """
    batch = make_batch([300, 200], [6, 3], seed=6)
    means = means_of(batch)
    want = routed_heads(batch, means, statistic)
    nan, inf = float("nan"), float("inf")
    batch.weights[1] = nan  # all gates of a row, one, and of a row whose queries are not numbers either
    batch.weights[3, 17] = nan
    batch.weights[4] = inf
    batch.q.view(torch.uint8)[4] = 0x7F
    means[1, 0] = inf  # of a bad key's scale, beside a gate that is 0
    batch.weights[7, 5] = 0
    heads = routed_heads(batch, means, statistic)
    assert ((heads >= 0) & (heads < 64)).all()
    assert (heads.sort(dim=1).values.diff(dim=1) > 0).all(), "each head once"
    untouched = torch.tensor([0, 2, 5])
    assert torch.equal(heads[untouched], want[untouched])
