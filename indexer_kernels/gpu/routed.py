"""Head routing and the scan of keys with each row's routed heads."""

from typing import NamedTuple

import torch

from indexer_kernels.gpu import head_route_kernel, routed_pack_kernel, routed_scores_kernel
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS, WARP_KEYS
from indexer_kernels.gpu.work import Work, block_means, counting, num_sms
from indexer_kernels.row_plan import TILE_ROWS

VALUES = {"scores": PAGE_TOKENS, "maxima": PAGE_TOKENS // WARP_KEYS, "mask": PAGE_TOKENS // WARP_KEYS}
# Shares of the scan that each SM should find, so that tiles of unlike length, or few of them, keep all SMs busy.
SHARES_PER_SM = 6


class Routed(NamedTuple):
    """The routed heads [M, A] int32, and their queries and gates laid out for the scan: q [tiles * TILE_ROWS * A, 128]
    fp8, gate [tiles * TILE_ROWS * A] f32.
    """

    heads: torch.Tensor
    q: torch.Tensor
    gate: torch.Tensor

    def of_tiles(self, tiles: slice) -> "Routed":
        """q and gate of the tiles in `tiles` alone."""
        columns = TILE_ROWS * self.heads.shape[1]
        packed = slice(tiles.start * columns, tiles.stop * columns)
        return Routed(self.heads, self.q[packed], self.gate[packed])


class Keys(NamedTuple):
    """Keys to scan: pages under the views the kernels read, and their table [R, W] int32."""

    keys: torch.Tensor
    scales: torch.Tensor
    page_table: torch.Tensor


def route(work: Work) -> Routed:
    plan, params, num_heads = work.plan, work.params, work.q.shape[1]
    means = block_means(work, params.route_block)
    heads = torch.empty((plan.num_rows, params.active_heads), dtype=torch.int32, device=work.q.device)
    flat_q = work.q.view(-1, HEAD_DIM)
    head_route_kernel.build(num_heads, params.active_heads, params.route_block, params.route_statistic)(
        flat_q, work.weights, means, plan.row_lengths, plan.tile_request, plan.tile_rows, heads
    )
    columns = plan.num_tiles * TILE_ROWS * params.active_heads
    packed_q, packed_gate = flat_q.new_empty((columns, HEAD_DIM)), work.weights.new_empty(columns)
    routed_pack_kernel.build(num_heads, params.active_heads)(
        flat_q, work.weights, heads, plan.tile_rows, packed_q, packed_gate
    )
    return Routed(heads, packed_q, packed_gate)


def routed_scan(
    work: Work,
    routed: Routed,
    scanned: Keys,
    tile_pages: torch.Tensor,
    tiles: slice,
    width: int,
    form: routed_scores_kernel.Form,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scan of the tiles in `tiles` over `width` pages of `scanned`, in one of `routed_scores_kernel`'s forms.

    tile_pages [T] int32: pages of each tile. f32 [places, width * 64] ("scores") or [places, width * 4] ("maxima"), or
    int32 [units, width * 4, words] ("mask", with thresholds [places] f32); places = tiles * TILE_ROWS.
    """
    num_tiles, active_heads = tiles.stop - tiles.start, work.params.active_heads
    packed = routed.of_tiles(tiles)
    places = num_tiles * TILE_ROWS
    units = places // routed_scores_kernel.unit_rows(active_heads)
    if form == "mask":
        shape = (units, width * VALUES[form], routed_scores_kernel.mask_words(active_heads))
        out = torch.empty(shape, dtype=torch.int32, device=work.q.device)
    else:
        out = torch.empty((places, width * VALUES[form]), dtype=torch.float32, device=work.q.device)
    if thresholds is None:
        thresholds = packed.gate[:places]  # not read
    routed_scores_kernel.build(active_heads, form, num_sms(work.q.device))(
        packed.q,
        packed.gate.view(-1, active_heads, routed_scores_kernel.GROUP_ROWS),
        scanned.keys,
        scanned.scales,
        scanned.page_table,
        work.plan.tile_request[tiles],
        tile_pages[tiles],
        thresholds.view(-1, routed_scores_kernel.GROUP_ROWS),
        counting(work.plan, scan_shares(units, work.q.device)),
        out,
    )
    return out


def scan_shares(units: int, device: torch.device) -> int:
    """Into how many shares the keys of each of `units` units go."""
    return max(1, SHARES_PER_SM * num_sms(device) // units)


def cache_keys(work: Work) -> Keys:
    return Keys(work.pool.keys, work.pool.scales, work.page_table)


def whole_stages(pages: int, active_heads: int) -> int:
    stage = routed_scores_kernel.stage_pages(active_heads)
    return -(-pages // stage) * stage
