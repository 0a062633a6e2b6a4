"""Triton kernel that keeps the best tokens of a row. One program chooses the candidates of one row.

A radix search over the ordered bits of the scores finds the score of the last candidate exactly, 11, 11 and 10 bits in
three passes; a fourth pass writes the candidates in ascending order, ties to the lower position.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.ordered_bits_kernel import ordered_bits

BLOCK = 4096
NUM_WARPS = 16
FIRST_TOKENS = 64
DYNAMIC = [
    "scores",
    "score_stride",
    "rows",
    "lengths",
    "request",
    "page_table",
    "table_width",
    "positions",
    "slots",
    "counts",
]


@triton.jit
def _narrow(base, first, stop, prefix, wanted, KNOWN: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """(prefix extended by the digit of the wanted-th largest key, how many are still wanted among its equals).

    Keys of [first, stop) whose KNOWN leading bits are `prefix` take part; the next DIGIT bits are counted.
    """
    bins: tl.constexpr = 1 << DIGIT
    shift: tl.constexpr = 32 - KNOWN - DIGIT
    histogram = tl.zeros((bins,), tl.int32)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < stop
        key = ordered_bits(tl.load(base + token, mask=inside, other=0.0))
        if KNOWN > 0:
            inside = inside & ((key >> (32 - KNOWN)) == prefix)
        digit = ((key >> shift) & (bins - 1)).to(tl.int32)
        histogram += tl.histogram(digit, bins, mask=inside)
    at_least = tl.sum(histogram) - tl.cumsum(histogram) + histogram  # keys with this digit or a larger one
    digit = tl.sum((at_least >= wanted).to(tl.int32)) - 1
    chosen = tl.arange(0, bins) == digit
    larger = tl.sum(tl.where(chosen, at_least - histogram, 0))
    return (prefix << DIGIT) | digit.to(tl.uint32), wanted - larger


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=DYNAMIC)
def token_select_kernel(
    scores,  # [places, >= tokens] f32
    score_stride,
    rows,  # [places] int32, the query row of each place or -1
    lengths,  # [M] int32
    request,  # [M] int32
    page_table,  # [R, table_width] int32
    table_width,
    positions,  # [M, BUDGET] int32 out: positions in the request
    slots,  # [M, BUDGET] int32 out: page id * 64 + position % 64
    counts,  # [M] int32 out: candidates of the row
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place)
    if row < 0:
        return
    length = tl.load(lengths + row)
    base = scores + place.to(tl.int64) * score_stride
    local = tl.maximum(length - LOCAL, FIRST)
    threshold = tl.zeros((), tl.uint32)
    level_left = tl.zeros((), tl.int32)
    prunes = length > BUDGET
    if prunes:
        level_left = BUDGET - FIRST - (length - local)
        threshold, level_left = _narrow(base, FIRST, local, threshold, level_left, 0, 11, BLOCK)
        threshold, level_left = _narrow(base, FIRST, local, threshold, level_left, 11, 11, BLOCK)
        threshold, level_left = _narrow(base, FIRST, local, threshold, level_left, 22, 10, BLOCK)
    table = page_table + tl.load(request + row).to(tl.int64) * table_width
    out = row.to(tl.int64) * BUDGET
    written = tl.zeros((), tl.int32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        chosen = token < length
        if prunes:
            searched = (token >= FIRST) & (token < local)
            key = ordered_bits(tl.load(base + token, mask=searched, other=0.0))
            level = searched & (key == threshold)
            rank = tl.cumsum(level.to(tl.int32))
            kept = (key > threshold) | (level & (rank <= level_left))
            chosen = chosen & (kept | ~searched)
            level_left -= tl.minimum(tl.sum(level.to(tl.int32)), level_left)
        slot = written + tl.cumsum(chosen.to(tl.int32)) - 1
        page = tl.load(table + token // 64, mask=chosen, other=0)
        tl.store(positions + out + slot, token, mask=chosen)
        tl.store(slots + out + slot, page * 64 + token % 64, mask=chosen)
        written += tl.sum(chosen.to(tl.int32))
    tl.store(counts + row, written)


class TokenCandidates(NamedTuple):
    """Candidate tokens of each row, ascending: positions and cache slots [M, C] int32, how many [M] int32."""

    positions: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor


def empty_token_candidates(num_rows: int, budget: int, device: torch.device) -> TokenCandidates:
    """Room for `token_select` to write to; what lies behind a row's count is never read."""
    positions = torch.empty((num_rows, budget), dtype=torch.int32, device=device)
    return TokenCandidates(positions, torch.empty_like(positions), positions.new_empty(num_rows))


def token_select(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    request: torch.Tensor,
    page_table: torch.Tensor,
    candidates: TokenCandidates,
    local_tokens: int,
) -> None:
    """Choose the candidates of the rows in `rows` ([places] int32, -1: none) from the token scores of their places.

    scores [places, >= tokens] f32. The first page and the last local_tokens are always in; the rest of the budget (the
    width of `candidates`) goes to the best of the other tokens. A row that sees no more tokens than that keeps them
    all, and its scores are not read.
    """
    if rows.shape[0] == 0:
        return
    token_select_kernel[(rows.shape[0],)](
        scores,
        scores.stride(0),
        rows,
        lengths,
        request,
        page_table,
        page_table.stride(0),
        *candidates,
        BUDGET=candidates.positions.shape[1],
        FIRST=FIRST_TOKENS,
        LOCAL=local_tokens,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def compile_for(budget: int, local_tokens: int):
    """The variant for one setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    constants = {"BUDGET": budget, "FIRST": FIRST_TOKENS, "LOCAL": local_tokens, "BLOCK": BLOCK}
    names = {"score_stride": "i32", "table_width": "i32", "scores": "*fp32"}
    kinds = {name: names.get(name, "*i32") for name in DYNAMIC}
    return compile_sm90(token_select_kernel, kinds, constants, {"num_warps": NUM_WARPS})
