"""native and the two modes with page candidates, misa_rerank by pages and hisa: which kernels run in which order."""

import torch

from indexer_kernels.gpu import block_score_kernel
from indexer_kernels.gpu.deep_gemm_logits import paged_logits, row_slices
from indexer_kernels.gpu.page_select_kernel import Candidates, empty_candidates, page_select
from indexer_kernels.gpu.routed import cache_keys, route, routed_scan, whole_stages
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS, WARP_KEYS
from indexer_kernels.gpu.work import (
    BLOCK_TILE,
    Work,
    block_means,
    counting,
    num_sms,
    pages_of,
    row_tables,
    slices,
    table_pages,
)
from indexer_kernels.row_plan import TILE_ROWS


def native(work: Work) -> None:
    """All heads over every page of the row's own table."""
    plan, width = work.plan, table_pages(work)
    for rows in row_slices(plan.num_rows, width):
        lengths = plan.row_lengths[rows]
        table = row_tables(work, plan.row_request[rows], lengths)
        scores = paged_logits(work.q[rows], work.weights[rows], work.pool.pages, table, lengths.clamp_min(1))
        work.top_k(scores, lengths, table if work.slots else None, work.out[rows])
        del scores  # before the next slice is allocated


def misa_rerank_pages(work: Work) -> None:
    """Routed heads choose pages by their best token; all heads re-rank the tokens of those pages."""
    plan, budget = work.plan, work.params.candidates // PAGE_TOKENS
    routed = route(work)
    width = whole_stages(table_pages(work), work.params.active_heads)
    values = PAGE_TOKENS // WARP_KEYS
    # A tile whose rows all fit the budget keeps every page: nothing to scan.
    pages = pages_of(plan.tile_length)
    tile_pages = torch.where(pages > budget, pages, 0)
    chosen = empty_candidates(plan.num_rows, budget, work.q.device)
    for tiles in slices(plan.num_tiles, width * values * 4 * TILE_ROWS, num_sms(work.q.device)):
        scores = routed_scan(work, routed, cache_keys(work), tile_pages, tiles, width, "maxima")
        choose_pages(work, scores, tiles, chosen, 1, values)
        del scores  # before the next slice is allocated
    rerank_pages(work, chosen)


def hisa(work: Work) -> None:
    """All heads score block means and choose blocks; all heads score the tokens of those blocks."""
    plan, params = work.plan, work.params
    unit_pages = params.block_size // PAGE_TOKENS
    means = block_means(work, params.block_size)
    # With few rows the block tiles are shared out, so that decode fills the chip too.
    splits = min(means.shape[1] // BLOCK_TILE, max(1, num_sms(work.q.device) // plan.num_tiles))
    scores = torch.empty((plan.num_tiles * TILE_ROWS, means.shape[1]), dtype=torch.float32, device=work.q.device)
    block_score_kernel.build(work.q.shape[1], params.block_size)(
        work.q.view(-1, HEAD_DIM),
        work.weights,
        means,
        plan.tile_request,
        plan.tile_rows,
        plan.tile_length,
        counting(plan, splits),
        scores,
        params.top_blocks * params.block_size,
    )
    chosen = empty_candidates(plan.num_rows, params.top_blocks * unit_pages, work.q.device)
    choose_pages(work, scores, slice(0, plan.num_tiles), chosen, unit_pages, 1)
    rerank_pages(work, chosen)


def choose_pages(
    work: Work, scores: torch.Tensor, tiles: slice, chosen: Candidates, unit_pages: int, values: int
) -> None:
    page_select(
        scores,
        work.plan.tile_rows[tiles].flatten(),
        work.plan.row_lengths,
        work.plan.row_request,
        work.page_table,
        chosen,
        work.plan.max_length,
        unit_pages,
        values,
        work.params.local_tokens,
    )


def rerank_pages(work: Work, chosen: Candidates) -> None:
    """All heads over the candidate pages of each row; the best top_k of their tokens."""
    table = chosen.physical if work.slots else chosen.logical
    for rows in row_slices(work.plan.num_rows, table.shape[1]):
        counts, pages = chosen.counts[rows], chosen.physical[rows]
        scores = paged_logits(work.q[rows], work.weights[rows], work.pool.pages, pages, counts.clamp_min(1))
        work.top_k(scores, counts, table[rows], work.out[rows])
        del scores  # before the next slice is allocated
