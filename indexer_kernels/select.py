"""Token selection for a batch of query rows, over contiguous keys or over a paged key cache."""

import torch

from indexer_kernels.backend import use_gpu
from indexer_kernels.checks import check_call, check_pages, check_queries, check_ranges, check_reach, check_tensor
from indexer_kernels.page_layout import HEAD_DIM
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference import batches
from indexer_kernels.row_plan import plan_decode
from indexer_kernels.stage import select_rows

DEFAULTS = IndexerParams()


def select_ragged(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    params: IndexerParams = DEFAULTS,
    backend: str = "auto",
) -> torch.Tensor:
    """The params.top_k best of each row's visible keys, as `mode` finds them: int32 [M, top_k], relative to ks, -1
    padded.

    native: s[i, j] = k_scale[j] * sum_h weights[i, h] * relu(q[i, h] . k[j]), the top_k largest j in [ks_i, ke_i),
    ties to the lower j (DeepSeek-V3.2, lightning indexer). The other modes restrict which heads or which tokens are
    scored: misa and misa_rerank (arXiv 2605.07363, block-statistics routing, the latter with its re-ranking), hisa
    (arXiv 2603.28458, blocks first), group_rerank (arXiv 2607.24593, PIVOT-Refine). docs/modes.md has their formulas.
    Where the budget covers all a row sees, every re-ranking mode selects exactly what native selects.

    q        [M, H, 128] float8_e4m3fn
    weights  [M, H] float32: head gate, query scale and softmax scale in one
    k        [N, 128] float8_e4m3fn, k_scale [N] float32: the keys of all requests, one after the other
    ks, ke   [M] int32: row i sees keys [ks_i, ke_i). Rows with the same ks are rows of one request, which starts there;
             a row's position in it is ke_i - ks_i - 1. A row with ke_i <= ks_i selects nothing.
    backend  "reference" (float32 PyTorch, any device), "gpu" (sm_90, H 32 or 64), "auto"

    The order of a row's entries is free; the first min(ke_i - ks_i, top_k) are distinct. Raises TypeError or ValueError
    naming the argument, NotImplementedError where backend="gpu" cannot serve the call.
    """
    check_call(mode, backend, params)
    check_queries(q, weights)
    check_tensor("k", k, torch.float8_e4m3fn, (None, HEAD_DIM), q.device)
    check_tensor("k_scale", k_scale, torch.float32, (k.shape[0],), q.device)
    check_ranges(ks, ke, q.shape[0], k.shape[0], q.device)
    if use_gpu(mode, q, params, backend):
        from indexer_kernels.gpu import pipeline

        return pipeline.select_ragged(mode, q, weights, k, k_scale, ks, ke, params)
    return batches.select_ragged(mode, q, weights, k, k_scale, ks, ke, params)


def select_paged(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    params: IndexerParams = DEFAULTS,
    backend: str = "auto",
) -> torch.Tensor:
    """`select_ragged` for one query row per request over paged keys: int32 [R, top_k] positions in the request, -1
    padded.

    q          [R, H, 128] float8_e4m3fn, weights [R, H] float32
    k_pages    [P, 8448] uint8: per page of 64 tokens 64 x 128 fp8 bytes, then 64 float32 scales (SGLang's index-key
    page) page_table [R, W] int32: page ids of each request in order; entries past its last page are never read
    seq_lens   [R] int32: tokens each row sees, its own included

    With backend="gpu" nothing is read back, so it may be captured in a CUDA graph. Errors as in `select_ragged`.
    """
    check_call(mode, backend, params)
    check_queries(q, weights)
    check_pages(k_pages, page_table, q.shape[0], q)
    check_tensor("seq_lens", seq_lens, torch.int32, (q.shape[0],), q.device)
    check_reach("seq_lens", seq_lens, page_table)
    plan = plan_decode(seq_lens, page_table.shape[1])
    return select_rows(mode, q, weights, k_pages, page_table, plan, params, backend)
