"""Token selection as a server stage: rows of several requests over one paged cache, in the output form the caller
needs.
"""

import torch

from indexer_kernels.backend import use_gpu
from indexer_kernels.checks import (
    OUTPUTS,
    check_call,
    check_choice,
    check_means,
    check_pages,
    check_plan,
    check_queries,
    check_tensor,
)
from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.page_means import update_last_page_means
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference import batches
from indexer_kernels.row_plan import RowPlan
from indexer_kernels.top_k import TopK

MEANS_MODES = ("hisa", "misa_rerank")  # that read stored page means


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
    update_means: bool = False,
) -> torch.Tensor:
    """The selection of `select_ragged` for the rows of a plan: int32 [M, top_k], -1 padded.

    q [>= M, H, 128] float8_e4m3fn and weights [>= M, H] float32 (rows past the plan's are padding and ignored), k_pages
    [P, 8448] uint8, page_table [R, W] int32 with R the plan's requests, output "position" (in the request) or "slot"
    (page id * 64 + position % 64). The first M rows of out [>= M, top_k] int32, contiguous, are filled in place, and
    out is returned; without it a new tensor is. top_k_kernel replaces torch.topk as the gpu backend's last step.

    page_means [P, 128] bfloat16 holds the mean of every full page that some row sees (`indexer_kernels.page_means`).
    hisa reads them in place of keys, with the same selection. misa_rerank, which takes them for decode alone (a plan
    made by `plan_decode`), then keeps no tokens or pages but the top_blocks best blocks of block_size, scored by their
    means with the routed heads: hisa whose block score sums over those heads. With update_means, for decode alone, the
    call begins with `update_last_page_means` of its rows, which hisa's kernels do on the side; rows of one request then
    may differ by at most 64 tokens. Errors as in `select_ragged`.
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
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.shape[0] < plan.num_rows:
        raise ValueError(f"out has {out.shape[0]} rows, must have at least the plan's {plan.num_rows}")
    if page_means is not None:
        check_choice("mode (page_means given)", mode, MEANS_MODES)
        for name, asked in (("mode='misa_rerank'", mode == "misa_rerank"), ("update_means", update_means)):
            if asked and plan.host_rows is not None:
                raise ValueError(f"page_means with {name} must come with a plan made by plan_decode")
        for name in ("block_size",) if mode == "hisa" else ("block_size", "route_block"):
            if getattr(params, name) % PAGE_TOKENS:
                raise ValueError(f"{name}={getattr(params, name)} must be a multiple of {PAGE_TOKENS} with page_means")
        check_means("page_means", page_means, k_pages)
    elif update_means:
        raise ValueError("update_means=True must come with page_means")
    on_gpu = use_gpu(mode, q, params, backend)
    if page_means is not None and on_gpu:
        on_gpu = use_gpu("hisa", q, params, backend)  # blocks are chosen as hisa chooses them
    if on_gpu:
        from indexer_kernels.gpu import pipeline

        return pipeline.select_rows(
            mode, q, weights, k_pages, page_table, plan, params, output, top_k_kernel, out, page_means, update_means
        )
    if page_means is not None and update_means:
        update_last_page_means(k_pages, page_table, plan.row_lengths, page_means, "reference")
    return batches.select_rows(mode, q, weights, k_pages, page_table, plan, params, output, out, page_means)
