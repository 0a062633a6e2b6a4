"""The modes over batches of several requests, in both layouts."""

import torch

from indexer_kernels.page_layout import PAGE_TOKENS, positions_to_slots, unpack_pages
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference.modes import select_request
from indexer_kernels.row_plan import RowPlan


def select_ragged(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    params: IndexerParams,
) -> torch.Tensor:
    """See `indexer_kernels.select_ragged`. Rows with the same ks are rows of one request that starts there."""
    selected = torch.full((q.shape[0], params.top_k), -1, dtype=torch.int32, device=q.device)
    lengths = (ke - ks).clamp_min(0).long()
    for start in torch.unique(ks).tolist():
        rows = (ks == start).nonzero().squeeze(1)
        reach = slice(start, start + int(lengths[rows].max()))
        selected[rows] = select_request(mode, q[rows], weights[rows], k[reach], k_scale[reach], lengths[rows], params)
    return selected


def select_rows(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    plan: RowPlan,
    params: IndexerParams,
    output: str,
    out: torch.Tensor,
    page_means: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `indexer_kernels.select_rows`."""
    for request in torch.unique(plan.row_request).tolist():
        rows = (plan.row_request == request).nonzero().squeeze(1)
        lengths = plan.row_lengths[rows].clamp_min(0).long()
        longest = int(lengths.max())
        pages = page_table[request, : -(-longest // PAGE_TOKENS)]
        k, k_scale = unpack_pages(k_pages[pages.long()], longest)
        means = None if page_means is None else page_means[pages[: longest // PAGE_TOKENS].long()]
        selected = select_request(mode, q[rows], weights[rows], k, k_scale, lengths, params, means)
        if output == "slot" and longest:
            selected = positions_to_slots(selected, pages.expand(len(rows), -1))
        out[rows] = selected
    return out
