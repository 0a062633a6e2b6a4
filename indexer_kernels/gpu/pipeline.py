"""The gpu backend's two entries. Same results in every layout, because there is one layout: pages."""

from collections.abc import Callable

import torch

from indexer_kernels.gpu import decode, modes, token_modes
from indexer_kernels.gpu.group_rerank import group_rerank
from indexer_kernels.gpu.page_select_kernel import CAPACITIES
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.gpu.work import Pool, Work, pages_of
from indexer_kernels.page_layout import pack_pages
from indexer_kernels.params import IndexerParams
from indexer_kernels.row_plan import RowPlan, plan_rows
from indexer_kernels.top_k import TopK, torch_top_k

MODES = {
    "native": modes.native,
    "misa": token_modes.misa,
    "hisa": modes.hisa,
    "group_rerank": group_rerank,
}


def _mode(mode: str, params: IndexerParams) -> Callable[[Work], None]:
    if mode == "misa_rerank":
        return modes.misa_rerank_pages if params.candidate_unit == "page" else token_modes.misa_rerank
    return MODES[mode]


def max_tokens(mode: str) -> int | None:
    """The longest context the mode's kernels hold, or None where nothing bounds it."""
    return CAPACITIES[-1] * PAGE_TOKENS if mode in ("misa_rerank", "hisa") else None


def select_rows(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    plan: RowPlan,
    params: IndexerParams,
    output: str = "position",
    top_k_kernel: TopK | None = None,
    out: torch.Tensor | None = None,
    page_means: torch.Tensor | None = None,
    update_means: bool = False,
) -> torch.Tensor:
    """`indexer_kernels.select_rows` on the GPU: int32 [M, top_k], launched on the current stream, nothing read back."""
    num_rows = plan.num_rows
    if out is None:
        out = torch.empty((num_rows, params.top_k), dtype=torch.int32, device=q.device)
    if num_rows == 0:
        return out
    if plan.max_length == 0:  # kernels would be handed tensors without columns
        out[:num_rows].fill_(-1)
        return out
    limit = max_tokens(mode)
    if limit is not None and plan.max_length > limit:
        raise ValueError(f"plan.max_length={plan.max_length} must be at most {limit} tokens for mode {mode!r}")
    q, weights = q[:num_rows].contiguous(), weights[:num_rows].contiguous()
    page_table = page_table[: plan.request_lengths.shape[0]].contiguous()
    pool = Pool(
        k_pages, k_pages.view(torch.float8_e4m3fn).view(-1, HEAD_DIM), k_pages.view(torch.float32).view(-1, PAGE_TOKENS)
    )
    work = Work(
        q,
        weights,
        pool,
        page_table,
        plan,
        params,
        output == "slot",
        top_k_kernel or torch_top_k,
        out[:num_rows],
        page_means,
    )
    if page_means is not None and plan.host_rows is None:
        decode.select_blocks(work, routed=mode == "misa_rerank", update=update_means)
    else:
        _mode(mode, params)(work)
    return out


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
    """`indexer_kernels.select_ragged` on the GPU. Packs each request's keys into pages (fp8, one copy) and reads ks,
    ke back.
    """
    host_ks, host_ke = torch.stack([ks, ke]).cpu().long()
    starts, row_request = torch.unique(host_ks, return_inverse=True)
    plan = plan_rows(row_request, (host_ke - host_ks).clamp_min(0), len(starts), q.device)
    lengths = torch.zeros(len(starts), dtype=torch.int64).scatter_reduce_(0, row_request, host_ke - host_ks, "amax")
    num_pages = pages_of(lengths)
    first_page = num_pages.cumsum(0) - num_pages
    pieces = [pack_pages(k[s : s + n], k_scale[s : s + n]) for s, n in zip(starts.tolist(), lengths.tolist()) if n]
    if not pieces:
        return torch.full((q.shape[0], params.top_k), -1, dtype=torch.int32, device=q.device)
    table = (first_page[:, None] + torch.arange(int(num_pages.max()))).clamp_max(int(num_pages.sum()) - 1)
    return select_rows(mode, q, weights, torch.cat(pieces), table.to(q.device, torch.int32), plan, params)
