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
# Up to 1024 units one warp holds a row, 32 keys a lane: no count has to cross warps.
NUM_WARPS = {512: 1, 1024: 1, 2048: 4, 4096: 8, 8192: 16}
ROW_ALIGNMENT = 4  # floats: rows of scores start at multiples of 16 bytes, to be read 16 bytes at a time
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
    GROUPS: tl.constexpr,
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
    out = row.to(tl.int64) * (BUDGET * UNIT_PAGES)
    slot = tl.arange(0, SLOTS)
    page = slot  # of a row that keeps everything
    num_pages = tl.minimum(units, BUDGET) * UNIT_PAGES - (units * UNIT_PAGES - pages)
    used = slot < num_pages
    if units > BUDGET:
        unit = tl.arange(0, CAPACITY)
        # Read in whole vectors of 16 bytes: up to three scores past the last eligible one come along, unused.
        base = tl.multiple_of(scores + place.to(tl.int64) * score_stride, 16)
        entry = tl.arange(0, CAPACITY * VALUES)
        score = tl.load(base + entry, mask=entry < (first_local * VALUES + 3) // 4 * 4, other=float("-inf"))
        if VALUES > 1:
            score = tl.max(tl.reshape(score, (CAPACITY, VALUES)), axis=1)
        eligible = (unit > 0) & (unit < first_local)
        key = tl.where(eligible, ordered_bits(score), 0)
        # The best of each group are GROUPS >= BUDGET different keys: the last one wanted is at least their least.
        groups = tl.max(tl.reshape(key, (CAPACITY // GROUPS, GROUPS)), axis=0)
        low = tl.min(groups, axis=0)
        high = tl.max(groups, axis=0)
        key = tl.where(eligible | (unit >= units), key, 4294967295)  # forced units before all others
        reached = units  # how many reach low; as many as wanted need no further search, and no choice between ties
        while (low < high) & (reached != BUDGET):
            middle = high - ((high - low) >> 1)
            count = tl.sum((key >= middle).to(tl.int32))
            if count >= BUDGET:
                low = middle
                reached = count
            else:
                high = middle - 1
        last_level = units  # the last unit chosen of those whose key is `low`
        if reached != BUDGET:
            level = key == low
            level_left = BUDGET - tl.sum((key > low).to(tl.int32))
            level_rank = tl.cumsum(level.to(tl.int32))
            last_level = tl.max(tl.where(level & (level_rank <= level_left), unit, 0))
        chosen = (key > low) | ((key == low) & (unit <= last_level))
        # Each chosen unit leaves its first page in its first slot, for whoever fills its slots.
        rank = tl.where(chosen, tl.cumsum(chosen.to(tl.int32)), 0)
        tl.store(logical + out + (rank - 1) * UNIT_PAGES, unit * UNIT_PAGES, mask=rank > 0)
        tl.debug_barrier()
        first = tl.load(logical + out + slot // UNIT_PAGES * UNIT_PAGES, mask=used, other=0)
        tl.debug_barrier()  # before another thread stores to the same word
        page = first + slot % UNIT_PAGES
    # Readers fetch pages in groups: what lies behind the row's end must still be a page of the pool.
    row_table = page_table + tl.load(request + row).to(tl.int64) * table_width
    inside = slot < BUDGET * UNIT_PAGES
    tl.store(logical + out + slot, tl.where(used, page, 0), mask=inside)
    page = tl.where(used, page, tl.maximum(pages - 1, 0))
    tl.store(physical + out + slot, tl.load(row_table + page, mask=pages > 0, other=0), mask=inside)
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

    scores [places, >= values * units] f32, rows ROW_ALIGNMENT apart: a unit's score is the largest of its `values`
    entries. The first unit and the units that cover the last local_tokens are always in; the rest of the budget goes to
    the best full units, ties to the lower one. A row whose units fit the budget keeps them all, and its scores are not
    read.
    """
    slots = candidates.physical.shape[1]
    if rows.shape[0] == 0:
        return
    assert scores.stride(0) % ROW_ALIGNMENT == 0 and scores.data_ptr() % 16 == 0, f"{scores.stride()=}"
    capacity = capacity_for(-(-max_length // (PAGE_TOKENS * unit_pages)))
    page_select_kernel[(rows.shape[0],)](
        scores,
        scores.stride(0),
        rows,
        lengths,
        request,
        page_table,
        page_table.stride(0),
        *candidates,
        **constants_of(slots // unit_pages, unit_pages, values, local_tokens, capacity),
        num_warps=NUM_WARPS[capacity],
    )


def capacity_for(max_units: int) -> int:
    """The smallest compiled capacity that holds max_units units; ValueError past the largest."""
    for capacity in CAPACITIES:
        if max_units <= capacity:
            return capacity
    raise ValueError(f"max_units={max_units} must be at most {CAPACITIES[-1]}")


def constants_of(budget: int, unit_pages: int, values: int, local_tokens: int, capacity: int) -> dict[str, int]:
    """What a variant of the kernel is compiled for."""
    return {
        "BUDGET": budget,
        "UNIT_PAGES": unit_pages,
        "VALUES": values,
        "LOCAL_TOKENS": local_tokens,
        "CAPACITY": capacity,
        "GROUPS": min(triton.next_power_of_2(budget), capacity),
        "SLOTS": triton.next_power_of_2(budget * unit_pages),
    }


def compile_for(budget: int, unit_pages: int, values: int, local_tokens: int, capacity: int):
    """The variant for one setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    constants = constants_of(budget, unit_pages, values, local_tokens, capacity)
    names = {"score_stride": "i32", "table_width": "i32", "scores": "*fp32"}
    kinds = {name: names.get(name, "*i32") for name in DYNAMIC}
    return compile_sm90(page_select_kernel, kinds, constants, {"num_warps": NUM_WARPS[capacity]})
