"""The five modes over the rows of one request."""

import torch

from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference.candidates import (
    block_candidates,
    group_candidates,
    page_candidates,
    token_candidates,
    visible_units,
)
from indexer_kernels.reference.choice import select_tokens
from indexer_kernels.reference.routing import route_heads, routing_scores, take_heads
from indexer_kernels.reference.scores import block_means, token_scores
from indexer_kernels.row_groups import group_proxies, group_rows

SLICE_ELEMENTS = 1 << 22  # scores of one row slice: 32 MiB of float64, and a few such while they are ranked


def select_request(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    lengths: torch.Tensor,
    params: IndexerParams,
    page_means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Selected positions of M rows of one request: int32 [M, top_k], -1 padded.

    q [M, H, D], weights [M, H]; k [N, D] and k_scale [N] from the request's first token; lengths [M]: tokens each row
    sees, at most N. A row at lengths[m] has position lengths[m] - 1. Rows are taken in slices, so that memory stays
    bounded. page_means [N // 64, D] replace the means of the keys in hisa.
    """
    selected = torch.full((q.shape[0], params.top_k), -1, dtype=torch.int32, device=q.device)
    if k.shape[0] == 0 or q.shape[0] == 0:
        return selected
    block = {"hisa": params.block_size}.get(mode, params.route_block)
    means = block_means(k, k_scale, block)
    if page_means is not None and mode == "hisa":
        pages = block // PAGE_TOKENS
        means = page_means[: len(means) * pages].view(len(means), pages, k.shape[1]).mean(dim=1)
    if mode == "group_rerank":
        groups = group_rows(torch.zeros_like(lengths), lengths, params.group)
        group_of_row, proxies = groups.row_place // params.group, group_proxies(q, weights, groups.rows)
    step = max(1, SLICE_ELEMENTS // k.shape[0])
    for start in range(0, q.shape[0], step):
        rows = slice(start, start + step)
        scores = token_scores(q[rows], weights[rows], k, k_scale)
        eligible = visible_units(lengths[rows], k.shape[0], 1)
        if mode in ("misa", "misa_rerank"):
            routed = _routed_scores(q[rows], weights[rows], k, k_scale, means, lengths[rows], params)
            has_block = (lengths[rows] >= params.route_block)[:, None]
            if mode == "misa":
                scores = torch.where(has_block, routed, scores)
            else:
                choose = page_candidates if params.candidate_unit == "page" else token_candidates
                eligible = torch.where(has_block, choose(routed, lengths[rows], params), eligible)
        elif mode == "hisa":
            eligible = block_candidates(q[rows], weights[rows], means, lengths[rows], k.shape[0], params)
        elif mode == "group_rerank":
            group = group_of_row[rows]
            proxy_scores = token_scores(proxies.q[group], proxies.weights[group], k, k_scale)
            group_start = (lengths[rows] - 1) // params.group * params.group
            eligible = group_candidates(proxy_scores, group_start, lengths[rows], params)
        selected[rows] = select_tokens(scores, eligible, params.top_k)
    return selected


def _routed_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    params: IndexerParams,
) -> torch.Tensor:
    routing = routing_scores(q, weights, means, lengths // params.route_block, params.route_statistic)
    heads = route_heads(routing, params.active_heads)
    return token_scores(*take_heads(q, weights, heads), k, k_scale)
