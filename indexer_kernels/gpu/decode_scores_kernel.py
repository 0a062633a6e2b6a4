"""Triton kernels of decode: block scores from stored page means, gathered through the page table.

Every row has a page table of its own, so all it reads of a page is 256 bytes, once: the kernels are bound by memory.
Many programs share a row, so that one row fills the chip as many do.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.page_means_kernel import page_mean
from indexer_kernels.gpu.page_select_kernel import ROW_ALIGNMENT
from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES, PAGE_TOKENS
from indexer_kernels.params import IndexerParams

UNITS = 64  # blocks of one product
NUM_WARPS = 4
STAGES = 3
READ = ["q", "weights", "means", "page_table", "table_width", "lengths"]
ROUTED = [*READ, "statistics", "chunks"]
SCORED = [*ROUTED, "scores", "score_stride", "keys", "scales"]
ALIGNED = {"q", "means", "keys", "scales"}  # to 16 bytes: rows of them are read whole


def _unaligned(names: list[str]) -> list[str]:
    return [name for name in names if name not in ALIGNED]


@triton.jit
def products(
    query,
    means,
    table,
    unit,
    last,
    BLOCK_PAGES: tl.constexpr,
    DIM: tl.constexpr,
):
    """relu(q[h] . kbar[b]) / scale_of(BLOCK_PAGES) of the blocks `unit` [n] before `last`, kbar bitwise as
    `page_means_kernel.block_means` has it: f32 [n, H]; of the other blocks anything.
    """
    if BLOCK_PAGES == 2:
        # One instruction adds two pairs, and rounds as a float32 sum rounded to bfloat16 does; halves come later.
        mean = page_rows(means, table, unit, last, 0, 2, DIM) + page_rows(means, table, unit, last, 1, 2, DIM)
    else:
        total = tl.zeros((unit.shape[0], DIM), tl.float32)
        for number in tl.static_range(BLOCK_PAGES):
            total += page_rows(means, table, unit, last, number, BLOCK_PAGES, DIM).to(tl.float32)
        mean = (total * (1.0 / BLOCK_PAGES)).to(tl.bfloat16)
    return tl.maximum(tl.dot(mean, query), 0.0)


@triton.jit
def page_rows(means, table, unit, last, number, BLOCK_PAGES: tl.constexpr, DIM: tl.constexpr):
    """Mean of page `number` of each block `unit` [n] before `last`: bf16 [n, DIM]."""
    page = tl.load(table + unit * BLOCK_PAGES + number, mask=unit < last, other=0).to(tl.int64)
    return tl.load(means + page[:, None] * DIM + tl.arange(0, DIM)[None, :])


@triton.jit
def scale_of(BLOCK_PAGES: tl.constexpr):
    """What `products` leaves to be multiplied, a power of two: where it is does not change a bit."""
    return 0.5 if BLOCK_PAGES == 2 else 1.0


@triton.jit
def transposed_query(q, row, HEADS: tl.constexpr, DIM: tl.constexpr):
    """bf16 [DIM, H] of a row."""
    entry = row * (HEADS * DIM) + tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return tl.trans(tl.load(q + entry).to(tl.float32).to(tl.bfloat16))


@triton.jit
def scored_blocks(
    length, PAGE_TOKENS: tl.constexpr, BLOCK_PAGES: tl.constexpr, BUDGET: tl.constexpr, LOCAL: tl.constexpr
):
    """Blocks before this one may be chosen by their score: those ahead of the forced last ones; none of a row that
    keeps all its blocks.
    """
    size = PAGE_TOKENS * BLOCK_PAGES
    return tl.where(length > BUDGET * size, tl.maximum(length - LOCAL, 0) // size, 0)


@triton.jit(do_not_specialize=_unaligned(ROUTED), do_not_specialize_on_alignment=_unaligned(ROUTED))
def route_statistics_kernel(
    q,  # [M, H, DIM] fp8
    weights,  # not read
    means,  # [P, DIM] bf16
    page_table,  # [M, table_width] int32
    table_width,
    lengths,  # [M] int32
    statistics,  # [M, chunks, H] f32 out, of chunks with a full block
    chunks,
    BY_SUM: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    COVERED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The sum or the maximum of a head's products over UNITS blocks. Chunks are the same whatever the batch, so that
    sums are, too.
    """
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    length = tl.load(lengths + row)
    full = length // (PAGE_TOKENS * BLOCK_PAGES)
    if (length <= COVERED) | (chunk * UNITS >= full):
        return
    query = transposed_query(q, row, HEADS, DIM)
    unit = chunk * UNITS + tl.arange(0, UNITS)
    product = products(query, means, page_table + row * table_width, unit, full, BLOCK_PAGES, DIM)
    product = tl.where((unit < full)[:, None], product, 0.0)
    if BY_SUM:
        statistic = tl.sum(product, axis=0)
    else:
        statistic = tl.max(product, axis=0)
    place = statistics + (row * chunks + chunk) * HEADS + tl.arange(0, HEADS)
    tl.store(place, statistic * scale_of(BLOCK_PAGES))


@triton.jit
def routed_gates(
    weight,
    statistics,
    used,
    ACTIVE: tl.constexpr,
    BY_SUM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gates of the ACTIVE heads of largest |gate| * statistic, ties to the lower head, and 0 for the others."""
    head = tl.arange(0, HEADS)
    total = tl.zeros((HEADS,), tl.float32)
    for chunk in range(used):
        statistic = tl.load(statistics + chunk * HEADS + head)
        if BY_SUM:
            total += statistic
        else:
            total = tl.maximum(total, statistic)
    routing = total * tl.abs(weight)
    other, mine = routing[None, :], routing[:, None]
    ahead = (other > mine) | ((other == mine) & (head[None, :] < head[:, None]))
    return tl.where(tl.sum(ahead.to(tl.int32), axis=1) < ACTIVE, weight, 0.0)


@triton.jit
def update_last_mean(
    keys,
    scales,
    means,
    table,
    length,
    DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    """The mean of a row's last full page, if it has one."""
    last = length // PAGE_TOKENS - 1
    if last >= 0:
        page = tl.load(table + last + tl.arange(0, 1)).to(tl.int64)
        mean = page_mean(keys, scales, page, DIM, PAGE_TOKENS, PAGE_BYTES, KEY_BYTES)
        tl.store(means + page[:, None] * DIM + tl.arange(0, DIM)[None, :], mean)


@triton.jit(do_not_specialize=_unaligned(SCORED), do_not_specialize_on_alignment=_unaligned(SCORED))
def decode_scores_kernel(
    q,  # [M, H, DIM] fp8
    weights,  # [M, H] f32
    means,  # [P, DIM] bf16
    page_table,  # [M, table_width] int32
    table_width,
    lengths,  # [M] int32
    statistics,  # [M, chunks, H] f32, read where ACTIVE > 0
    chunks,
    scores,  # [M, score_stride] f32 out, of blocks that may be chosen by their score
    score_stride,
    keys,  # the cache's bytes as fp8, read where UPDATE
    scales,  # the cache's bytes as f32
    UPDATE: tl.constexpr,
    ACTIVE: tl.constexpr,
    BY_SUM: tl.constexpr,
    ROUTE_TOKENS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    BUDGET: tl.constexpr,
    LOCAL_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    """UPDATE: the first program of each row updates the mean of its last full page, which no row scores meanwhile
    (`update_is_apart`).
    """
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row)
    table = page_table + row * table_width
    if UPDATE:  # noqa: SIM102 - known when compiled, unlike what is inside
        if tl.program_id(0) == 0:
            update_last_mean(keys, scales, means, table, length, DIM, PAGE_TOKENS, PAGE_BYTES, KEY_BYTES)
            return
    last = scored_blocks(length, PAGE_TOKENS, BLOCK_PAGES, BUDGET, LOCAL_TOKENS)
    first = (tl.program_id(0) - UPDATE) * UNITS
    if first >= last:
        return
    query = transposed_query(q, row, HEADS, DIM)
    weight = tl.load(weights + row * HEADS + tl.arange(0, HEADS))
    if ACTIVE > 0:
        used = tl.cdiv(length // ROUTE_TOKENS, UNITS)
        weight = routed_gates(weight, statistics + row * chunks * HEADS, used, ACTIVE, BY_SUM, HEADS)
    weight = weight * scale_of(BLOCK_PAGES)
    out = scores + row * score_stride
    for start in tl.range(first, last, (tl.num_programs(0) - UPDATE) * UNITS, num_stages=STAGES):
        unit = start + tl.arange(0, UNITS)
        product = products(query, means, table, unit, last, BLOCK_PAGES, DIM)
        tl.store(out + unit, tl.sum(product * weight[None, :], axis=1), mask=unit < last)


def route_statistics(
    q: torch.Tensor,
    weights: torch.Tensor,
    means: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    params: IndexerParams,
) -> torch.Tensor:
    """out[m, c, h] = sum or max (route_statistic) of relu(q[m, h] . kbar[b]) over the full route blocks b of row m in
    64 c .. 64 c + 63: f32 [M, chunks, H].

    q [M, H, 128] fp8, weights [M, H] f32, means [P, 128] bf16, page_table [M, W] int32, lengths [M] int32. Chunks
    without a full block hold anything, and so do rows that keep all their blocks.
    """
    rows, heads = weights.shape
    chunks = -(-page_table.shape[1] * PAGE_TOKENS // (params.route_block * UNITS))
    statistics = weights.new_empty((rows, chunks, heads))
    route_statistics_kernel[(chunks, rows)](
        q,
        weights,
        means,
        page_table,
        page_table.stride(0),
        lengths,
        statistics,
        chunks,
        **_statistics_constants(heads, params),
        num_warps=NUM_WARPS,
    )
    return statistics


def decode_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    means: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    params: IndexerParams,
    programs: int,
    statistics: torch.Tensor | None = None,
    k_pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[m, b] = sum_h w[m, h] * relu(q[m, h] . kbar[b]) for the full blocks b of row m that are not forced: f32
    [M, >= blocks], rows ROW_ALIGNMENT apart.

    Shapes as in `route_statistics`; with its statistics only the heads they choose are summed. About `programs`
    programs share the work. The columns of forced last blocks hold anything, and so do rows that keep all their blocks.

    k_pages [P, 8448] uint8: the means of the rows' last full pages are updated besides (`update_is_apart`).
    """
    rows, heads = weights.shape
    columns = -(-page_table.shape[1] * PAGE_TOKENS // (params.block_size * ROW_ALIGNMENT)) * ROW_ALIGNMENT
    scores = weights.new_empty((rows, columns))
    splits, update = min(-(-columns // UNITS), max(1, programs // rows)), k_pages is not None
    decode_scores_kernel[(splits + update, rows)](
        q,
        weights,
        means,
        page_table,
        page_table.stride(0),
        lengths,
        scores if statistics is None else statistics,
        0 if statistics is None else statistics.shape[1],
        scores,
        scores.stride(0),
        q if k_pages is None else k_pages.view(q.dtype),
        weights if k_pages is None else k_pages.view(weights.dtype),
        **_score_constants(heads, params, statistics is not None, update),
        num_warps=NUM_WARPS,
    )
    return scores


def update_is_apart(params: IndexerParams) -> bool:
    """Whether block scores may be made while the means of the rows' last full pages are updated.

    A row's last full page ends behind its last 64 tokens' start, and scored blocks end ahead of its last local_tokens.
    So with 128 local tokens no row scores a page that is the last full one of another row of its request, up to 64
    tokens before it. Where different requests share a page, it was filled and its mean stored long before, and what is
    written are the same bits.
    """
    return params.local_tokens >= 2 * PAGE_TOKENS


def _statistics_constants(heads: int, params: IndexerParams) -> dict[str, int]:
    return {
        "BY_SUM": params.route_statistic == "sum",
        "BLOCK_PAGES": params.route_block // PAGE_TOKENS,
        "COVERED": params.top_blocks * params.block_size,
        "HEADS": heads,
        "DIM": HEAD_DIM,
        "PAGE_TOKENS": PAGE_TOKENS,
        "UNITS": UNITS,
    }


def _score_constants(heads: int, params: IndexerParams, routed: bool, update: bool) -> dict[str, int]:
    return {
        "UPDATE": int(update),
        "ACTIVE": params.active_heads if routed else 0,
        "BY_SUM": routed and params.route_statistic == "sum",
        "ROUTE_TOKENS": params.route_block if routed else PAGE_TOKENS,
        "BLOCK_PAGES": params.block_size // PAGE_TOKENS,
        "BUDGET": params.top_blocks,
        "LOCAL_TOKENS": params.local_tokens,
        "HEADS": heads,
        "DIM": HEAD_DIM,
        "PAGE_TOKENS": PAGE_TOKENS,
        "UNITS": UNITS,
        "STAGES": STAGES,
        "PAGE_BYTES": PAGE_BYTES,
        "KEY_BYTES": KEY_BYTES,
    }


_KINDS = {
    "q": "*fp8e4nv",
    "weights": "*fp32",
    "means": "*bf16",
    "table_width": "i32",
    "statistics": "*fp32",
    "chunks": "i32",
    "scores": "*fp32",
    "score_stride": "i32",
    "keys": "*fp8e4nv",
    "scales": "*fp32",
}


def _compile(kernel: Any, names: list[str], constants: dict[str, int]):
    kinds = {name: _KINDS.get(name, "*i32") for name in names}
    return compile_sm90(kernel, kinds, constants, {"num_warps": NUM_WARPS}, [n for n in names if n in ALIGNED])


def compile_statistics(heads: int, params: IndexerParams):
    """The variant of a setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    return _compile(route_statistics_kernel, ROUTED, _statistics_constants(heads, params))


def compile_scores(heads: int, params: IndexerParams, routed: bool, update: bool):
    return _compile(decode_scores_kernel, SCORED, _score_constants(heads, params, routed, update))
