"""Triton kernel of how many candidate tokens each row of decode has: once per forward, for all its layers."""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.params import IndexerParams

COUNTED = ["lengths", "counts", "contexts", "num_rows"]
ROWS = 128  # of a program


@triton.jit(do_not_specialize=COUNTED, do_not_specialize_on_alignment=COUNTED)
def candidate_counts_kernel(
    lengths,  # [M] int32
    counts,  # [M] int32 out
    contexts,  # [M] int32 out
    num_rows,
    BLOCK_PAGES: tl.constexpr,
    BUDGET: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths + row, mask=row < num_rows, other=0)
    size = PAGE_TOKENS * BLOCK_PAGES
    # Chosen blocks are whole, but for the row's last one, which always is among them.
    dropped = tl.maximum((length + size - 1) // size - BUDGET, 0) * size
    count = tl.maximum(length, 0) - dropped
    tl.store(counts + row, count, mask=row < num_rows)
    tl.store(contexts + row, tl.maximum(count, 1), mask=row < num_rows)


def candidate_counts(lengths: torch.Tensor, params: IndexerParams) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens are left of each row of lengths [M] int32 when top_blocks of its blocks are kept, the last one
    among them: ([M], the same but at least 1), int32.
    """
    counts, contexts = torch.empty_like(lengths), torch.empty_like(lengths)
    rows = lengths.shape[0]
    candidate_counts_kernel[(triton.cdiv(rows, ROWS),)](
        lengths, counts, contexts, rows, **_count_constants(params), num_warps=1
    )
    return counts, contexts


def _count_constants(params: IndexerParams) -> dict[str, int]:
    return {
        "BLOCK_PAGES": params.block_size // PAGE_TOKENS,
        "BUDGET": params.top_blocks,
        "PAGE_TOKENS": PAGE_TOKENS,
        "ROWS": ROWS,
    }


def compile_counts(params: IndexerParams):
    """The variant of a setting, compiled for sm_90 without a GPU or a launch."""
    kinds = {name: "i32" if name == "num_rows" else "*i32" for name in COUNTED}
    return compile_sm90(candidate_counts_kernel, kinds, _count_constants(params), {"num_warps": 1})
