"""The modes on an sm_90a GPU: which kernels run in which order. Same results in every layout, because there is one
layout: pages.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from indexer_kernels.gpu import (
    block_means_kernel,
    block_score_kernel,
    head_route_kernel,
    routed_pack_kernel,
    routed_scores_kernel,
    token_rerank_kernel,
)
from indexer_kernels.gpu.deep_gemm_logits import paged_logits
from indexer_kernels.gpu.page_select_kernel import CAPACITIES, Candidates, empty_candidates, page_select
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS, WARP_KEYS
from indexer_kernels.gpu.token_select_kernel import empty_token_candidates, token_select
from indexer_kernels.page_layout import pack_pages
from indexer_kernels.params import IndexerParams
from indexer_kernels.row_plan import TILE_ROWS, RowPlan, plan_rows
from indexer_kernels.top_k import TopK, torch_top_k

HEADS = (32, 64)
# Scores held at once. Rows are taken in slices that fit, so no context length can exhaust the device.
SCRATCH_BYTES = 5 << 28
BLOCK_TILE = head_route_kernel.TILE_BLOCKS


class Work(NamedTuple):
    """What every step of one call reads: q [M, H, 128], weights [M, H], the pool, its page table, the plan, the
    settings.

    top_k writes the chosen tokens of a row to out [M, top_k]: as cache slots where slots is set, else as positions.
    """

    q: torch.Tensor
    weights: torch.Tensor
    pool: "Pool"
    page_table: torch.Tensor
    plan: RowPlan
    params: IndexerParams
    slots: bool
    top_k: TopK
    out: torch.Tensor


class Pool(NamedTuple):
    """The index-key pages [P, 8448] uint8 under the views the kernels read: 66 rows of 128 bytes, 33 of 64 floats."""

    pages: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor


def refusal(mode: str, q: torch.Tensor, params: IndexerParams) -> str | None:
    """Why this backend cannot serve the call, or None. Reads shapes and device properties only."""
    if q.device.type != "cuda":
        return f"q is on {q.device.type}, the gpu backend needs a CUDA device"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"compute capability {torch.cuda.get_device_capability(q.device)}, kernels are built for (9, 0)"
    if q.shape[1] not in HEADS:
        return f"{q.shape[1]} indexer heads, kernels are built for {HEADS}"
    return mode_refusal(mode, params)


def mode_refusal(mode: str, params: IndexerParams) -> str | None:
    """The part of `refusal` that depends on the settings alone: what a server can know before it starts."""
    if mode == "group_rerank":
        return "group_rerank has no gpu kernels yet"
    if mode in ("misa", "misa_rerank"):
        if params.active_heads not in (4, 8, 16):
            return f"active_heads={params.active_heads}, kernels are built for 4, 8 and 16"
        if params.route_statistic != "sum":
            return f"the kernel of route_statistic={params.route_statistic!r} has not run on a GPU yet, use 'sum'"
        if params.route_block % PAGE_TOKENS:
            return f"route_block={params.route_block} is not a multiple of {PAGE_TOKENS}"
        if params.route_block > params.top_k:
            return f"route_block={params.route_block} above top_k={params.top_k}: rows without a block need native"
    if mode == "misa_rerank":
        return _candidates_refusal(params)
    if mode == "hisa":
        return _blocks_refusal(params)
    return None


def _candidates_refusal(params: IndexerParams) -> str | None:
    if params.candidate_unit == "token":
        if params.candidates % token_rerank_kernel.TILE:
            return f"candidates={params.candidates} is not a multiple of {token_rerank_kernel.TILE}"
        if PAGE_TOKENS + params.local_tokens >= params.candidates:
            return f"candidates={params.candidates} leaves no token beside the forced ones"
        return "the kernels of candidate_unit='token' have not run on a GPU yet, use 'page' or 'auto'"
    if params.page_candidates_floor() < params.top_k:
        return f"candidates={params.candidates} as whole pages may hold fewer than top_k={params.top_k} tokens"
    forced = 1 + _covering(params.local_tokens, PAGE_TOKENS)
    if forced >= params.candidates // PAGE_TOKENS:
        return f"candidates={params.candidates} leaves no page beside the {forced} forced ones"
    return None


def _blocks_refusal(params: IndexerParams) -> str | None:
    if params.block_size % PAGE_TOKENS:
        return f"block_size={params.block_size} is not a multiple of {PAGE_TOKENS}"
    forced = 1 + _covering(params.local_tokens, params.block_size)
    if forced >= params.top_blocks:
        return f"top_blocks={params.top_blocks} leaves no block beside the {forced} forced ones"
    return None


def _covering(tokens: int, unit: int) -> int:
    """The most units that `tokens` consecutive tokens can touch."""
    return (tokens - 2) // unit + 2 if tokens > 1 else 1


def max_tokens(mode: str) -> int | None:
    """The longest context the mode's kernels hold, or None where nothing bounds it."""
    return CAPACITIES[-1] * PAGE_TOKENS if mode in ("misa_rerank", "hisa") else None


def select_rows(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    plan: RowPlan,
    params: IndexerParams,
    output: str = "position",
    top_k_kernel: TopK | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`indexer_kernels.select_rows` on the GPU: int32 [M, top_k], launched on the current stream, nothing read back."""
    num_rows = plan.num_rows
    if out is None:
        out = torch.empty((num_rows, params.top_k), dtype=torch.int32, device=q.device)
    if num_rows == 0:
        return out
    limit = max_tokens(mode)
    if limit is not None and plan.max_length > limit:
        raise ValueError(f"plan.max_length={plan.max_length} must be at most {limit} tokens for mode {mode!r}")
    q, weights = q[:num_rows].contiguous(), weights[:num_rows].contiguous()
    page_table = page_table[: plan.request_lengths.shape[0]].contiguous()
    pool = Pool(
        k_pages, k_pages.view(torch.float8_e4m3fn).view(-1, HEAD_DIM), k_pages.view(torch.float32).view(-1, PAGE_TOKENS)
    )
    work = Work(
        q, weights, pool, page_table, plan, params, output == "slot", top_k_kernel or torch_top_k, out[:num_rows]
    )
    {"native": _native, "misa": _misa, "misa_rerank": _misa_rerank, "hisa": _hisa}[mode](work)
    return out


def select_ragged(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    params: IndexerParams,
) -> torch.Tensor:
    """`indexer_kernels.select_ragged` on the GPU. Packs each request's keys into pages (fp8, one copy) and reads ks,
    ke back.
    """
    host_ks, host_ke = torch.stack([ks, ke]).cpu().long()
    starts, row_request = torch.unique(host_ks, return_inverse=True)
    plan = plan_rows(row_request, (host_ke - host_ks).clamp_min(0), len(starts), q.device)
    lengths = torch.zeros(len(starts), dtype=torch.int64).scatter_reduce_(0, row_request, host_ke - host_ks, "amax")
    num_pages = _pages(lengths)
    first_page = num_pages.cumsum(0) - num_pages
    pieces = [pack_pages(k[s : s + n], k_scale[s : s + n]) for s, n in zip(starts.tolist(), lengths.tolist()) if n]
    if not pieces:
        return torch.full((q.shape[0], params.top_k), -1, dtype=torch.int32, device=q.device)
    table = (first_page[:, None] + torch.arange(int(num_pages.max()))).clamp_max(int(num_pages.sum()) - 1)
    return select_rows(mode, q, weights, torch.cat(pieces), table.to(q.device, torch.int32), plan, params)


def _native(work: Work) -> None:
    """All heads over every page of the row's own table."""
    plan, width = work.plan, _table_pages(work)
    for rows in _slices(plan.num_rows, width * PAGE_TOKENS * 4):
        lengths = plan.row_lengths[rows]
        # Past a row's end the table is garbage; DeepGEMM fetches pages in groups, so point there at the last page.
        last = (_pages(lengths) - 1).clamp_min(0)
        column = torch.minimum(torch.arange(width, device=last.device), last[:, None])
        table = work.page_table[plan.row_request[rows].long(), :width].gather(1, column)
        scores = paged_logits(work.q[rows], work.weights[rows], work.pool.pages, table, lengths.clamp_min(1))
        work.top_k(scores, lengths, table if work.slots else None, work.out[rows])
        del scores  # before the next slice is allocated


def _misa(work: Work) -> None:
    """Routed heads over every page; the best top_k of their scores."""
    plan = work.plan
    routed = _route(work)
    width = _whole_stages(_table_pages(work), work.params.active_heads)
    place_out = torch.empty((plan.num_tiles * TILE_ROWS, work.params.top_k), dtype=torch.int32, device=work.q.device)
    place_lengths = torch.where(plan.tile_rows >= 0, plan.row_lengths[plan.tile_rows.clamp_min(0).long()], 0)
    tile_pages = _pages(plan.tile_length)
    for tiles in _slices(plan.num_tiles, width * PAGE_TOKENS * 4 * TILE_ROWS, _num_sms(work.q.device)):
        scores = _routed_scan(work, routed, tile_pages, tiles, width, PAGE_TOKENS)
        table = None
        if work.slots:
            table = work.page_table[plan.tile_request[tiles].long()].repeat_interleave(TILE_ROWS, dim=0)
        places = slice(tiles.start * TILE_ROWS, tiles.stop * TILE_ROWS)
        work.top_k(scores, place_lengths[tiles].flatten(), table, place_out[places])
        del scores  # before the next slice is allocated
    torch.index_select(place_out, 0, plan.row_place, out=work.out)


def _misa_rerank(work: Work) -> None:
    if work.params.candidate_unit == "token":
        _misa_rerank_tokens(work)
    else:
        _misa_rerank_pages(work)


def _misa_rerank_tokens(work: Work) -> None:
    """Routed heads choose tokens; all heads re-rank them, gathered one by one."""
    plan, budget = work.plan, work.params.candidates
    routed = _route(work)
    width = _whole_stages(_table_pages(work), work.params.active_heads)
    tile_pages = torch.where(plan.tile_length > budget, _pages(plan.tile_length), 0)
    chosen = empty_token_candidates(plan.num_rows, budget, work.q.device)
    for tiles in _slices(plan.num_tiles, width * PAGE_TOKENS * 4 * TILE_ROWS, _num_sms(work.q.device)):
        scores = _routed_scan(work, routed, tile_pages, tiles, width, PAGE_TOKENS)
        places = plan.tile_rows[tiles].flatten()
        token_select(
            scores, places, plan.row_lengths, plan.row_request, work.page_table, chosen, work.params.local_tokens
        )
        del scores  # before the next slice is allocated
    scores = token_rerank_kernel.token_rerank(work.q, work.weights, work.pool.pages, chosen)
    work.top_k(scores, chosen.counts, chosen.slots if work.slots else chosen.positions, work.out, 1)


def _misa_rerank_pages(work: Work) -> None:
    """Routed heads choose pages by their best token; all heads re-rank the tokens of those pages."""
    plan, budget = work.plan, work.params.candidates // PAGE_TOKENS
    routed = _route(work)
    width = _whole_stages(_table_pages(work), work.params.active_heads)
    values = PAGE_TOKENS // WARP_KEYS
    # A tile whose rows all fit the budget keeps every page: nothing to scan.
    pages = _pages(plan.tile_length)
    tile_pages = torch.where(pages > budget, pages, 0)
    chosen = empty_candidates(plan.num_rows, budget, work.q.device)
    for tiles in _slices(plan.num_tiles, width * values * 4 * TILE_ROWS, _num_sms(work.q.device)):
        scores = _routed_scan(work, routed, tile_pages, tiles, width, values)
        _choose_pages(work, scores, tiles, chosen, 1, values)
        del scores  # before the next slice is allocated
    _rerank(work, chosen)


def _hisa(work: Work) -> None:
    """All heads score block means and choose blocks; all heads score the tokens of those blocks."""
    plan, params = work.plan, work.params
    unit_pages = params.block_size // PAGE_TOKENS
    means = _block_means(work, params.block_size)
    # With few rows the block tiles are shared out, so that decode fills the chip too.
    splits = min(means.shape[1] // BLOCK_TILE, max(1, _num_sms(work.q.device) // plan.num_tiles))
    scores = torch.empty((plan.num_tiles * TILE_ROWS, means.shape[1]), dtype=torch.float32, device=work.q.device)
    block_score_kernel.build(work.q.shape[1], params.block_size)(
        work.q.view(-1, HEAD_DIM),
        work.weights,
        means,
        plan.tile_request,
        plan.tile_rows,
        plan.tile_length,
        torch.arange(splits, dtype=torch.int32, device=work.q.device),
        scores,
        params.top_blocks * params.block_size,
    )
    chosen = empty_candidates(plan.num_rows, params.top_blocks * unit_pages, work.q.device)
    _choose_pages(work, scores, slice(0, plan.num_tiles), chosen, unit_pages, 1)
    _rerank(work, chosen)


def _choose_pages(
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


def _rerank(work: Work, chosen: Candidates) -> None:
    """All heads over the candidate pages of each row; the best top_k of their tokens."""
    table = chosen.physical if work.slots else chosen.logical
    for rows in _slices(work.plan.num_rows, table.shape[1] * PAGE_TOKENS * 4):
        counts, pages = chosen.counts[rows], chosen.physical[rows]
        scores = paged_logits(work.q[rows], work.weights[rows], work.pool.pages, pages, counts.clamp_min(1))
        work.top_k(scores, counts, table[rows], work.out[rows])
        del scores  # before the next slice is allocated


class Routed(NamedTuple):
    """The routed heads laid out for the scan: q [tiles * 16 * A, 128] fp8, gate [tiles * 16 * A] f32."""

    q: torch.Tensor
    gate: torch.Tensor


def _route(work: Work) -> Routed:
    plan, params, num_heads = work.plan, work.params, work.q.shape[1]
    means = _block_means(work, params.route_block)
    heads = torch.empty((plan.num_rows, params.active_heads), dtype=torch.int32, device=work.q.device)
    flat_q = work.q.view(-1, HEAD_DIM)
    head_route_kernel.build(num_heads, params.active_heads, params.route_block, params.route_statistic)(
        flat_q, work.weights, means, plan.row_lengths, plan.tile_request, plan.tile_rows, heads
    )
    columns = plan.num_tiles * TILE_ROWS * params.active_heads
    routed = Routed(flat_q.new_empty((columns, HEAD_DIM)), work.weights.new_empty(columns))
    routed_pack_kernel.build(num_heads, params.active_heads)(flat_q, work.weights, heads, plan.tile_rows, *routed)
    return routed


def _routed_scan(
    work: Work, routed: Routed, tile_pages: torch.Tensor, tiles: slice, width: int, values: int
) -> torch.Tensor:
    """Scores of the tiles in `tiles`, [tiles * 16, width * values] f32: 64 values a page, or 4 maxima of 16 tokens
    each.
    """
    num_tiles, active_heads = tiles.stop - tiles.start, work.params.active_heads
    columns = TILE_ROWS * active_heads
    scores = torch.empty((num_tiles * TILE_ROWS, width * values), dtype=torch.float32, device=work.q.device)
    packed = slice(tiles.start * columns, tiles.stop * columns)
    routed_scores_kernel.build(active_heads, values < PAGE_TOKENS, _num_sms(work.q.device))(
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


def _block_means(work: Work, block_size: int) -> torch.Tensor:
    """Mean keys of every full block, bf16 [R, blocks padded to whole tiles, 128]; zero past a request's last full
    block.
    """
    blocks = max(1, work.plan.max_length // block_size)
    padded = -(-blocks // BLOCK_TILE) * BLOCK_TILE
    shape = (work.page_table.shape[0], padded, HEAD_DIM)
    means = torch.empty(shape, dtype=torch.bfloat16, device=work.q.device)
    block_means_kernel.build(block_size // PAGE_TOKENS)(
        work.pool.keys, work.pool.scales, work.page_table, work.plan.request_lengths, means
    )
    return means


def _pages(lengths: torch.Tensor) -> torch.Tensor:
    return (lengths + PAGE_TOKENS - 1) // PAGE_TOKENS


def _table_pages(work: Work) -> int:
    """Pages of the page table that some row may see."""
    return min(work.page_table.shape[1], -(-work.plan.max_length // PAGE_TOKENS))


def _whole_stages(pages: int, active_heads: int) -> int:
    stage = routed_scores_kernel.stage_pages(active_heads)
    return -(-pages // stage) * stage


def _slices(count: int, bytes_each: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of range(count) whose scores fit SCRATCH_BYTES, in steps of `multiple` where that many fit."""
    step = max(1, SCRATCH_BYTES // max(1, bytes_each))
    if step > multiple:
        step -= step % multiple
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
