"""Token selection as a server stage: rows of several requests over one paged cache, in the output form the caller
needs.
"""

import torch

from indexer_kernels.backend import use_gpu
from indexer_kernels.checks import (
    OUTPUTS,
    check_call,
    check_choice,
    check_pages,
    check_plan,
    check_queries,
    check_tensor,
)
from indexer_kernels.page_layout import HEAD_DIM
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference import batches
from indexer_kernels.row_plan import RowPlan
from indexer_kernels.top_k import TopK


def select_rows(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    plan: RowPlan,
    params: IndexerParams,
    backend: str = "auto",
    output: str = "position",
    top_k_kernel: TopK | None = None,
    out: torch.Tensor | None = None,
    page_means: torch.Tensor | None = None,
) -> torch.Tensor:
    """The selection of `select_ragged` for the rows of a plan: int32 [M, top_k], -1 padded.

    q [>= M, H, 128] float8_e4m3fn and weights [>= M, H] float32 (rows past the plan's are padding and ignored), k_pages
    [P, 8448] uint8, page_table [R, W] int32 with R the plan's requests, output "position" (in the request) or "slot"
    (page id * 64 + position % 64). The first M rows of out [>= M, top_k] int32 are filled in place, and out is
    returned; without it a new tensor is. top_k_kernel replaces torch.topk as the gpu backend's last step. page_means
    [P, 128] bf16: stored means of the full pages (indexer_kernels.page_means), which hisa then scores in place of means
    of the keys. Errors as in `select_ragged`.
    """
    check_call(mode, backend, params)
    check_choice("output", output, OUTPUTS)
    if not isinstance(plan, RowPlan):
        raise TypeError(f"plan must be a RowPlan, got {type(plan).__name__}")
    if top_k_kernel is not None and not callable(top_k_kernel):
        raise TypeError(f"top_k_kernel must be callable or None, got {type(top_k_kernel).__name__}")
    check_queries(q, weights, plan.num_rows)
    check_pages(k_pages, page_table, plan.request_lengths.shape[0], q)
    check_plan(plan, k_pages, page_table)
    if out is None:
        out = torch.empty((plan.num_rows, params.top_k), dtype=torch.int32, device=q.device)
    check_tensor("out", out, torch.int32, (None, params.top_k), q.device)
    if out.shape[0] < plan.num_rows:
        raise ValueError(f"out has {out.shape[0]} rows, must have at least the plan's {plan.num_rows}")
    if page_means is not None:
        check_tensor("page_means", page_means, torch.bfloat16, (k_pages.shape[0], HEAD_DIM), q.device)
    if use_gpu(mode, q, params, backend):
        from indexer_kernels.gpu import pipeline

        return pipeline.select_rows(mode, q, weights, k_pages, page_table, plan, params, output, top_k_kernel, out)
    return batches.select_rows(mode, q, weights, k_pages, page_table, plan, params, output, out, page_means)
