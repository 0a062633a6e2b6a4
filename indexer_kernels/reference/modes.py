"""The five modes over the rows of one request."""

import torch

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
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.reference.statistics import block_means, blocks_of_pages
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
    sees, at most N. A row at lengths[m] has position lengths[m] - 1. page_means [>= N // 64, D] bf16: stored
    means of the request's full pages, for hisa in place of means of k, and for misa_rerank, which then keeps whole
    blocks that the routed heads score by their means. Rows are taken in slices, so that memory stays bounded.
    """
    selected = torch.full((q.shape[0], params.top_k), -1, dtype=torch.int32, device=q.device)
    if k.shape[0] == 0 or q.shape[0] == 0:
        return selected

    def means_of(block: int) -> torch.Tensor:
        return block_means(k, k_scale, block) if page_means is None else blocks_of_pages(page_means, block)

    means = means_of(params.block_size if mode == "hisa" else params.route_block)
    if mode == "group_rerank":
        groups = group_rows(torch.zeros_like(lengths), lengths, params.group)
        group_of_row, proxies = groups.row_place // params.group, group_proxies(q, weights, groups.rows)
    step = max(1, SLICE_ELEMENTS // k.shape[0])
    for start in range(0, q.shape[0], step):
        rows = slice(start, start + step)
        scores = token_scores(q[rows], weights[rows], k, k_scale)
        eligible = visible_units(lengths[rows], k.shape[0], 1)
        if mode == "misa_rerank" and page_means is not None:
            heads = _routed_heads(q[rows], weights[rows], means, lengths[rows], params)
            routed_q, gates = take_heads(q[rows], weights[rows], heads)
            blocks = means_of(params.block_size)
            eligible = block_candidates(routed_q, gates, blocks, lengths[rows], k.shape[0], params)
        elif mode in ("misa", "misa_rerank"):
            heads = _routed_heads(q[rows], weights[rows], means, lengths[rows], params)
            routed = token_scores(*take_heads(q[rows], weights[rows], heads), k, k_scale)
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


def _routed_heads(
    q: torch.Tensor, weights: torch.Tensor, means: torch.Tensor, lengths: torch.Tensor, params: IndexerParams
) -> torch.Tensor:
    routing = routing_scores(q, weights, means, lengths // params.route_block, params.route_statistic)
    return route_heads(routing, params.active_heads)
