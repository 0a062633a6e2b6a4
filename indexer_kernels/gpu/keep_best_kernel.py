"""Triton: the exact choice of the best tokens of a row, for the lists that a threshold did not get right.

`rescan_kernel` runs it, one program for one row. Seventeen passes over its scores find the score of the last candidate
exactly, two bits each; another writes the candidates in ascending order, ties to the lower position. Slow, which is why
a threshold goes first.
"""

import triton
import triton.language as tl

from indexer_kernels.gpu.ordered_bits_kernel import ordered_bits

BLOCK = 4096


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


def choice_constants(budget: int, first_tokens: int, local_tokens: int, with_positions: bool) -> dict[str, int | bool]:
    return {
        "BUDGET": budget,
        "FIRST": first_tokens,
        "LOCAL": local_tokens,
        "BLOCK": BLOCK,
        "WITH_POSITIONS": with_positions,
    }
