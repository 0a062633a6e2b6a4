"""misa, and misa_rerank with token candidates, on the GPU: no score matrix leaves the chip.

A sample of the keys, scored first, gives each row a threshold. The scan then writes one bit a token, set where the
routed score reaches it; the tokens whose bit is set are listed, a few more than wanted, and scored again: by the routed
heads for misa, whose top_k are exact, by all heads for misa_rerank. There every listed token is a candidate: those that
the reference keeps, and beside them what lies between the budget and the threshold, 10 to 30 %. More candidates can
only find more of native's tokens. A row whose list has too few or too many tokens is scanned again, exactly.
"""

from collections.abc import Callable

import torch

from indexer_kernels.gpu import token_scores_kernel
from indexer_kernels.gpu.bit_list_kernel import list_bits
from indexer_kernels.gpu.lists import Lists, empty_lists
from indexer_kernels.gpu.rescan_kernel import rescan
from indexer_kernels.gpu.routed import Keys, Routed, cache_keys, route, routed_scan, whole_stages
from indexer_kernels.gpu.sample_kernel import CELL, Sample, list_width, sample_keys
from indexer_kernels.gpu.sample_threshold_kernel import sample_threshold
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS, WARP_KEYS
from indexer_kernels.gpu.work import Work, counting, num_sms, pages_of, slices, table_pages
from indexer_kernels.row_plan import TILE_ROWS, RowPlan

ENTRY_BYTES = 12  # of a list's entry: position, slot and score
CELL_BYTES = TILE_ROWS * WARP_KEYS // 8  # of the mask: one bit for each row of a tile and each key of a cell


def misa(work: Work) -> None:
    """Routed heads over every token; the best top_k of their scores."""

    def scores(routed: Routed, lists: Lists, rows: torch.Tensor) -> torch.Tensor:
        # The scan's order is (tile, group, head, row); here a row's heads belong together.
        active_heads = routed.heads.shape[1]
        q = routed.q.view(-1, active_heads, 8, HEAD_DIM).transpose(1, 2).contiguous()
        gate = routed.gate.view(-1, active_heads, 8).transpose(1, 2).contiguous()
        own_row = counting(work.plan, rows.shape[0])
        return token_scores(work, q.view(-1, active_heads, HEAD_DIM), gate.view(-1, active_heads), own_row, lists)

    _select(work, work.params.top_k, 0, 0, scores)


def misa_rerank(work: Work) -> None:
    """Routed heads choose tokens; all heads re-rank them, gathered one by one."""

    def scores(routed: Routed, lists: Lists, rows: torch.Tensor) -> torch.Tensor:
        return token_scores(work, work.q, work.weights, rows, lists)

    _select(work, work.params.candidates, PAGE_TOKENS, work.params.local_tokens, scores)


def token_scores(work: Work, q: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, lists: Lists) -> torch.Tensor:
    """Scores of every list's tokens by the heads of q [N, H, 128], weights [N, H], row rows[p] for list p: f32
    [places, W], anything past a list's end.
    """
    out = torch.empty(lists.slots.shape, dtype=torch.float32, device=q.device)
    token_scores_kernel.build(q.shape[1], 1)(
        q.view(-1, HEAD_DIM),
        weights.view(-1),
        work.pool.keys,
        work.pool.scales.view(-1),
        work.page_table,
        rows.view(-1, 1),
        rows,  # a list has nothing behind it: page-table row and position are not read
        rows,
        lists.slots,
        lists.counts,
        lists.counts,
        out,
    )
    return out


def _select(
    work: Work,
    budget: int,
    first_tokens: int,
    local_tokens: int,
    scores_of: Callable[[Routed, Lists, torch.Tensor], torch.Tensor],
) -> None:
    plan = work.plan
    routed = route(work)
    sample = sample_keys(work.pool.pages, work.page_table, plan.request_lengths, plan.max_length)
    width = list_width(budget, plan.max_length, token_scores_kernel.TILE)
    place_out = torch.empty((plan.num_tiles * TILE_ROWS, work.params.top_k), dtype=torch.int32, device=work.q.device)
    mask_bytes = whole_stages(table_pages(work), work.params.active_heads) * (PAGE_TOKENS // WARP_KEYS) * CELL_BYTES
    tile_bytes = mask_bytes + TILE_ROWS * width * ENTRY_BYTES
    most = token_scores_kernel.MOST_LISTS // TILE_ROWS
    for tiles in slices(plan.num_tiles, tile_bytes, num_sms(work.q.device), most):
        lists = candidate_lists(work, routed, sample, tiles, budget, width, first_tokens, local_tokens)
        scores = scores_of(routed.of_tiles(tiles), lists, plan.tile_rows[tiles].flatten())
        places = slice(tiles.start * TILE_ROWS, tiles.stop * TILE_ROWS)
        work.top_k(scores, lists.counts, lists.slots if work.slots else lists.positions, place_out[places], 1)
        del lists, scores  # before the next slice is allocated
    torch.index_select(place_out, 0, plan.row_place, out=work.out)


def scanned_pages(plan: RowPlan, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of the sample, and of the cache, that the scans of each tile go through: int32 [T], [T].

    0 where all rows of a tile fit the budget: they keep every token.
    """
    length = torch.where(plan.tile_length > budget, plan.tile_length, 0)
    return pages_of((length + CELL - 1) // CELL), pages_of(length)


def candidate_lists(
    work: Work,
    routed: Routed,
    sample: Sample,
    tiles: slice,
    budget: int,
    width: int,
    first_tokens: int,
    local_tokens: int,
) -> Lists:
    """Lists of the places in `tiles` that hold, beside others, each row's `budget` best tokens by routed score, the
    first first_tokens and last local_tokens counted in.
    """
    plan, active_heads = work.plan, work.params.active_heads
    sample_pages, pages = plan.kept(("scanned pages", budget), lambda: scanned_pages(plan, budget))
    rows = plan.tile_rows[tiles].flatten()
    sampled = Keys(sample.keys, sample.scales, sample.page_table)
    sample_width = whole_stages(sample.page_table.shape[1], active_heads)
    scores = routed_scan(work, routed, sampled, sample_pages, tiles, sample_width, "scores")
    thresholds = sample_threshold(scores, rows, plan.row_lengths, budget, first_tokens, local_tokens)
    del scores  # before the lists are allocated
    mask_width = whole_stages(table_pages(work), active_heads)
    mask = routed_scan(work, routed, cache_keys(work), pages, tiles, mask_width, "mask", thresholds.scores)
    lists = empty_lists(rows.shape[0], width, not work.slots, rows.device)
    list_bits(
        mask,
        rows,
        plan.row_lengths,
        thresholds.limits,
        plan.row_request,
        work.page_table,
        lists,
        budget,
        first_tokens,
        local_tokens,
    )
    packed = routed.of_tiles(tiles)
    rescan(
        packed.q,
        packed.gate,
        active_heads,
        False,
        counting(plan, rows.shape[0]),
        work.pool.pages,
        rows,
        plan.row_lengths,
        plan.row_request,
        work.page_table,
        plan.max_length,
        lists,
        budget,
        first_tokens,
        local_tokens,
        num_sms(work.q.device),
    )
    return lists
