"""Head routing and the scan of the keys with each row's routed heads."""

from typing import NamedTuple

import torch

from indexer_kernels.gpu import head_route_kernel, routed_pack_kernel, routed_scores_kernel
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.gpu.work import Work, block_means, num_sms
from indexer_kernels.row_plan import TILE_ROWS


class Routed(NamedTuple):
    """The routed heads laid out for the scan: q [tiles * 16 * A, 128] fp8, gate [tiles * 16 * A] f32."""

    q: torch.Tensor
    gate: torch.Tensor


def route(work: Work) -> Routed:
    plan, params, num_heads = work.plan, work.params, work.q.shape[1]
    means = block_means(work, params.route_block)
    heads = torch.empty((plan.num_rows, params.active_heads), dtype=torch.int32, device=work.q.device)
    flat_q = work.q.view(-1, HEAD_DIM)
    head_route_kernel.build(num_heads, params.active_heads, params.route_block, params.route_statistic)(
        flat_q, work.weights, means, plan.row_lengths, plan.tile_request, plan.tile_rows, heads
    )
    columns = plan.num_tiles * TILE_ROWS * params.active_heads
    routed = Routed(flat_q.new_empty((columns, HEAD_DIM)), work.weights.new_empty(columns))
    routed_pack_kernel.build(num_heads, params.active_heads)(flat_q, work.weights, heads, plan.tile_rows, *routed)
    return routed


def routed_scan(
    work: Work, routed: Routed, tile_pages: torch.Tensor, tiles: slice, width: int, values: int
) -> torch.Tensor:
    """Scores of the tiles in `tiles`, [tiles * 16, width * values] f32: 64 values a page, or 4 maxima of 16 tokens
    each.
    """
    num_tiles, active_heads = tiles.stop - tiles.start, work.params.active_heads
    columns = TILE_ROWS * active_heads
    scores = torch.empty((num_tiles * TILE_ROWS, width * values), dtype=torch.float32, device=work.q.device)
    packed = slice(tiles.start * columns, tiles.stop * columns)
    routed_scores_kernel.build(active_heads, values < PAGE_TOKENS, num_sms(work.q.device))(
        routed.q[packed],
        routed.gate[packed].view(-1, active_heads, routed_scores_kernel.GROUP_ROWS),
        work.pool.keys,
        work.pool.scales,
        work.page_table,
        work.plan.tile_request[tiles],
        tile_pages[tiles],
        scores,
    )
    return scores


def whole_stages(pages: int, active_heads: int) -> int:
    stage = routed_scores_kernel.stage_pages(active_heads)
    return -(-pages // stage) * stage
