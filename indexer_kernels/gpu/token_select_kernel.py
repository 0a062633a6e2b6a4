"""Triton kernel that keeps exactly the best tokens of a row, for the lists that a threshold did not get right.

One program chooses the candidates of one row. Seventeen passes over its scores find the score of the last candidate
exactly, two bits each; another writes the candidates in ascending order, ties to the lower position. Slow, which is why
a threshold goes first.
"""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.candidate_list_kernel import Lists
from indexer_kernels.gpu.ordered_bits_kernel import ordered_bits

BLOCK = 4096
NUM_WARPS = 16
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
    "unsure",
    "width",
]


@triton.jit
def nth_largest(base, first, stop, wanted, BLOCK: tl.constexpr):
    """(ordered bits of the wanted-th largest score of [first, stop), how many of its equals are among the wanted)."""
    found = tl.zeros((), tl.uint32)
    for step in range(16):
        digit = tl.full((), 1073741824, tl.uint32) >> (2 * step)  # two bits a pass: a digit of 0 to 3
        ones = tl.zeros((BLOCK,), tl.int32)
        twos = tl.zeros((BLOCK,), tl.int32)
        threes = tl.zeros((BLOCK,), tl.int32)
        for start in range(first, stop, BLOCK):
            token = start + tl.arange(0, BLOCK)
            key = ordered_bits(tl.load(base + token, mask=token < stop, other=0.0))
            key = tl.where(token < stop, key, 0)
            ones += (key >= found + digit).to(tl.int32)
            twos += (key >= found + 2 * digit).to(tl.int32)
            threes += (key >= found + 3 * digit).to(tl.int32)
        reached = (tl.sum(ones) >= wanted).to(tl.uint32)
        reached += (tl.sum(twos) >= wanted).to(tl.uint32)
        reached += (tl.sum(threes) >= wanted).to(tl.uint32)
        found += reached * digit
    larger = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, stop, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = ordered_bits(tl.load(base + token, mask=token < stop, other=0.0))
        larger += ((token < stop) & (key > found)).to(tl.int32)
    return found, wanted - tl.sum(larger)


@triton.jit
def keep_best(
    base,
    length,
    table,
    positions,
    slots,
    count,
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
):
    """Candidates of one row from its scores at `base`: positions, slots (through the page ids at `table`) and count."""
    local = tl.maximum(length - LOCAL, FIRST)
    threshold = tl.zeros((), tl.uint32)
    level_left = tl.zeros((), tl.int32)
    prunes = length > BUDGET
    if prunes:
        threshold, level_left = nth_largest(base, FIRST, local, BUDGET - FIRST - (length - local), BLOCK)
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
        if WITH_POSITIONS:
            tl.store(positions + slot, token, mask=chosen)
        tl.store(slots + slot, page * 64 + token % 64, mask=chosen)
        written += tl.sum(chosen.to(tl.int32))
    tl.store(count, written)


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=DYNAMIC)
def token_select_kernel(
    scores,  # [places, >= tokens] f32
    score_stride,
    rows,  # [places] int32, the query row of each place or -1
    lengths,  # [M] int32
    request,  # [M] int32
    page_table,  # [R, table_width] int32
    table_width,
    positions,  # [places, width] int32 out: positions in the request
    slots,  # [places, width] int32 out: page id * 64 + position % 64
    counts,  # [places] int32 out: candidates of the row
    unsure,  # [places] int32
    width,
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
):
    place = tl.program_id(0)
    if tl.load(unsure + place) == 0:
        return
    row = tl.load(rows + place)
    out = place.to(tl.int64) * width
    keep_best(
        scores + place.to(tl.int64) * score_stride,
        tl.load(lengths + row),
        page_table + tl.load(request + row).to(tl.int64) * table_width,
        positions + out,
        slots + out,
        counts + place,
        BUDGET,
        FIRST,
        LOCAL,
        BLOCK,
        WITH_POSITIONS,
    )


def token_select(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    request: torch.Tensor,
    page_table: torch.Tensor,
    lists: Lists,
    budget: int,
    first_tokens: int,
    local_tokens: int,
) -> None:
    """Replace every unsure list by exactly `budget` candidates: the first first_tokens and last local_tokens, and of
    the other tokens those with the best scores, ties to the lower position.

    scores [places, >= tokens] f32, rows [places] int32 (an unsure place has one). A row that sees no more tokens than
    that keeps them all, and its scores are not read.
    """
    if rows.shape[0]:
        token_select_kernel[(rows.shape[0],)](
            scores,
            scores.stride(0),
            rows,
            lengths,
            request,
            page_table,
            page_table.stride(0),
            *lists.written,
            lists.unsure,
            lists.slots.shape[1],
            **choice_constants(budget, first_tokens, local_tokens, lists.positions is not None),
            num_warps=NUM_WARPS,
        )


def choice_constants(budget: int, first_tokens: int, local_tokens: int, with_positions: bool) -> dict[str, int | bool]:
    return {
        "BUDGET": budget,
        "FIRST": first_tokens,
        "LOCAL": local_tokens,
        "BLOCK": BLOCK,
        "WITH_POSITIONS": with_positions,
    }


def compile_for(budget: int, first_tokens: int, local_tokens: int, with_positions: bool):
    """The variant for one setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    kinds = dict.fromkeys(DYNAMIC, "*i32") | dict.fromkeys(("score_stride", "table_width", "width"), "i32")
    kinds |= {"scores": "*fp32"}
    constants = choice_constants(budget, first_tokens, local_tokens, with_positions)
    return compile_sm90(token_select_kernel, kinds, constants, {"num_warps": NUM_WARPS})
