"""Triton kernel that turns unit scores into a row's compacted page table. One program chooses the candidate pages of
one row.

A unit is a page (misa_rerank) or a block of pages (hisa). The chosen pages come out ascending, the row's partial last
page last, so that DeepGEMM's paged logits and a paged top-k read the table as if it were an ordinary request.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.ordered_bits_kernel import ordered_bits
from indexer_kernels.gpu.target import PAGE_TOKENS

# Units a program holds at once, by the reach of the page table: a handful of variants, not one per length.
CAPACITIES = (512, 1024, 2048, 4096, 8192)
NUM_WARPS = {512: 2, 1024: 4, 2048: 8, 4096: 16, 8192: 16}
DYNAMIC = [
    "scores",
    "score_stride",
    "rows",
    "lengths",
    "request",
    "page_table",
    "table_width",
    "physical",
    "logical",
    "counts",
]


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=DYNAMIC)
def page_select_kernel(
    scores,  # [places, >= units * VALUES] f32, VALUES partial maxima a unit
    score_stride,
    rows,  # [places] int32, the query row of each place or -1
    lengths,  # [M] int32
    request,  # [M] int32
    page_table,  # [R, table_width] int32
    table_width,
    physical,  # [M, BUDGET * UNIT_PAGES] int32 out: page ids of the pool
    logical,  # [M, BUDGET * UNIT_PAGES] int32 out: page numbers of the request
    counts,  # [M] int32 out: candidate tokens of the row
    BUDGET: tl.constexpr,
    UNIT_PAGES: tl.constexpr,
    VALUES: tl.constexpr,
    LOCAL_TOKENS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place)
    if row < 0:
        return
    length = tl.load(lengths + row)
    pages = (length + 63) // 64
    units = (pages + UNIT_PAGES - 1) // UNIT_PAGES
    first_local = tl.maximum(length - LOCAL_TOKENS, 0) // (64 * UNIT_PAGES)
    unit = tl.arange(0, CAPACITY)
    forced = (unit == 0) | (unit >= first_local)
    chosen = unit < units
    if units > BUDGET:
        eligible = (unit > 0) & (unit < first_local)
        base = scores + place.to(tl.int64) * score_stride
        score = tl.load(base + unit * VALUES, mask=eligible, other=float("-inf"))
        for value in tl.static_range(1, VALUES):
            score = tl.maximum(score, tl.load(base + unit * VALUES + value, mask=eligible, other=float("-inf")))
        key = tl.where(eligible, ordered_bits(score), 0)
        wanted = BUDGET - 1 - (units - first_local)
        threshold = tl.zeros((), tl.uint32)
        bit = tl.full((), 2147483648, tl.uint32)
        reached = units  # how many reach the threshold; as many as wanted need no further bit
        while (bit > 0) & (reached != wanted):
            count = tl.sum((key >= (threshold | bit)).to(tl.int32))
            if count >= wanted:
                threshold = threshold | bit
                reached = count
            bit = bit >> 1
        above = key > threshold
        level = eligible & (key == threshold)
        level_left = wanted - tl.sum(above.to(tl.int32))
        level_rank = tl.cumsum(level.to(tl.int32))
        chosen = chosen & (forced | above | (level & (level_rank <= level_left)))
    slot = tl.cumsum(chosen.to(tl.int32)) - 1
    row_table = page_table + tl.load(request + row).to(tl.int64) * table_width
    out = row.to(tl.int64) * (BUDGET * UNIT_PAGES)
    for part in tl.static_range(UNIT_PAGES):
        page = unit * UNIT_PAGES + part
        keep = chosen & (page < pages)
        tl.store(logical + out + slot * UNIT_PAGES + part, page, mask=keep)
        tl.store(physical + out + slot * UNIT_PAGES + part, tl.load(row_table + page, mask=keep, other=0), mask=keep)
    num_units = tl.sum(chosen.to(tl.int32))
    num_pages = num_units * UNIT_PAGES - (units * UNIT_PAGES - pages)
    # Readers fetch pages in groups: what lies behind the row's end must still be a page of the pool.
    spare = tl.arange(0, SLOTS)
    unused = (spare >= num_pages) & (spare < BUDGET * UNIT_PAGES)
    last = tl.load(row_table + tl.maximum(pages - 1, 0), mask=pages > 0, other=0)
    tl.store(physical + out + spare, last, mask=unused)
    tl.store(logical + out + spare, 0, mask=unused)
    tl.store(counts + row, tl.where(pages > 0, (num_pages - 1) * 64 + (length - 1) % 64 + 1, 0))


class Candidates(NamedTuple):
    """Candidate pages of each row: page ids and page numbers [M, P] int32, candidate tokens [M] int32."""

    physical: torch.Tensor
    logical: torch.Tensor
    counts: torch.Tensor


def empty_candidates(num_rows: int, num_pages: int, device: torch.device) -> Candidates:
    """Room for `page_select` to write to."""
    physical = torch.empty((num_rows, num_pages), dtype=torch.int32, device=device)
    return Candidates(physical, torch.empty_like(physical), physical.new_empty(num_rows))


def page_select(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    request: torch.Tensor,
    page_table: torch.Tensor,
    candidates: Candidates,
    max_length: int,
    unit_pages: int,
    values: int,
    local_tokens: int,
) -> None:
    """Choose the candidate pages of the rows in `rows` ([places] int32, -1: none) from the unit scores of their places.

    scores [places, >= values * units] f32: a unit's score is the largest of its `values` entries. The first unit and
    the units that cover the last local_tokens are always in; the rest of the budget goes to the best full units, ties
    to the lower one. A row whose units fit the budget keeps them all, and its scores are not read.
    """
    slots = candidates.physical.shape[1]
    if rows.shape[0] == 0:
        return
    max_units = -(-max_length // (PAGE_TOKENS * unit_pages))
    page_select_kernel[(rows.shape[0],)](
        scores,
        scores.stride(0),
        rows,
        lengths,
        request,
        page_table,
        page_table.stride(0),
        *candidates,
        BUDGET=slots // unit_pages,
        UNIT_PAGES=unit_pages,
        VALUES=values,
        LOCAL_TOKENS=local_tokens,
        CAPACITY=capacity_for(max_units),
        SLOTS=triton.next_power_of_2(slots),
        num_warps=NUM_WARPS[capacity_for(max_units)],
    )


def capacity_for(max_units: int) -> int:
    """The smallest compiled capacity that holds max_units units; ValueError past the largest."""
    for capacity in CAPACITIES:
        if max_units <= capacity:
            return capacity
    raise ValueError(f"max_units={max_units} must be at most {CAPACITIES[-1]}")


def compile_for(budget: int, unit_pages: int, values: int, local_tokens: int, capacity: int):
    """The variant for one setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    constants = {
        "BUDGET": budget,
        "UNIT_PAGES": unit_pages,
        "VALUES": values,
        "LOCAL_TOKENS": local_tokens,
        "CAPACITY": capacity,
        "SLOTS": triton.next_power_of_2(budget * unit_pages),
    }
    names = {"score_stride": "i32", "table_width": "i32", "scores": "*fp32"}
    kinds = {name: names.get(name, "*i32") for name in DYNAMIC}
    return compile_sm90(page_select_kernel, kinds, constants, {"num_warps": NUM_WARPS[capacity]})
