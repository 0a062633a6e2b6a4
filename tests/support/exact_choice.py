"""`keep_best` by itself, in a kernel of the tests: in the package only a rescan runs it, on scores of its own."""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.keep_best_kernel import choice_constants, keep_best
from indexer_kernels.gpu.lists import Lists


@triton.jit
def exact_choice_kernel(
    scores,
    score_stride,
    rows,
    lengths,
    request,
    page_table,
    table_width,
    positions,
    slots,
    counts,
    width,
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place)
    if row < 0:
        return
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


def exact_choice(
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
    """The list of each place that has a row: its exact candidates by scores [places, >= tokens] f32."""
    exact_choice_kernel[(rows.shape[0],)](
        scores,
        scores.stride(0),
        rows,
        lengths,
        request,
        page_table,
        page_table.stride(0),
        *lists.written,
        lists.slots.shape[1],
        **choice_constants(budget, first_tokens, local_tokens, lists.positions is not None),
        num_warps=16,
    )
