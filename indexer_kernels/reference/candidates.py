"""Which tokens all heads re-rank, per mode. Every function returns a bool mask [M, N] over the request's tokens."""

import torch

from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.params import IndexerParams
from indexer_kernels.reference.choice import keep_within_budget
from indexer_kernels.reference.scores import block_scores, page_maxima


def visible_units(lengths: torch.Tensor, num_units: int, unit: int) -> torch.Tensor:
    """bool [M, num_units]: units of `unit` tokens that hold at least one of a row's lengths[m] tokens."""
    return torch.arange(num_units, device=lengths.device) * unit < lengths[:, None]


def forced_units(
    lengths: torch.Tensor, num_units: int, unit: int, first_tokens: int, local_tokens: int
) -> torch.Tensor:
    """bool [M, num_units]: visible units that hold one of the first `first_tokens` or of the last `local_tokens`
    tokens.
    """
    start = torch.arange(num_units, device=lengths.device) * unit
    local = start + unit > (lengths - local_tokens)[:, None]
    return visible_units(lengths, num_units, unit) & ((start < first_tokens) | local)


def token_candidates(scores: torch.Tensor, lengths: torch.Tensor, params: IndexerParams) -> torch.Tensor:
    """misa_rerank: the `candidates` best tokens by routed score [M, N], the first page and the last local_tokens
    forced.
    """
    num_tokens = scores.shape[1]
    forced = forced_units(lengths, num_tokens, 1, PAGE_TOKENS, params.local_tokens)
    return keep_within_budget(scores, visible_units(lengths, num_tokens, 1), forced, params.candidates)


def page_candidates(scores: torch.Tensor, lengths: torch.Tensor, params: IndexerParams) -> torch.Tensor:
    """misa_rerank by pages: the candidates // 64 best pages, a page as good as its best visible token [M, N]."""
    visible = visible_units(lengths, scores.shape[1], 1)
    best = page_maxima(scores, visible, PAGE_TOKENS)
    forced = forced_units(lengths, best.shape[1], PAGE_TOKENS, PAGE_TOKENS, params.local_tokens)
    pages = visible_units(lengths, best.shape[1], PAGE_TOKENS)
    kept = keep_within_budget(best, pages, forced, params.candidates // PAGE_TOKENS)
    return kept.repeat_interleave(PAGE_TOKENS, dim=1)[:, : scores.shape[1]] & visible


def block_candidates(
    q: torch.Tensor,
    weights: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    num_tokens: int,
    params: IndexerParams,
) -> torch.Tensor:
    """hisa: the top_blocks best blocks by block score, the first block and those of the last local_tokens forced.
    misa_rerank by stored page means: the same, with q and weights of each row's routed heads alone.

    Only blocks that end at or before a row's length have a score; its partly filled last block is forced.
    """
    num_blocks = -(-num_tokens // params.block_size)
    scores = torch.full((q.shape[0], num_blocks), float("-inf"), dtype=torch.float32, device=q.device)
    scores[:, : means.shape[0]] = block_scores(q, weights, means)
    full = torch.arange(num_blocks, device=q.device) < (lengths // params.block_size)[:, None]
    scores = torch.where(full, scores, float("-inf"))
    visible = visible_units(lengths, num_blocks, params.block_size)
    forced = forced_units(lengths, num_blocks, params.block_size, params.block_size, params.local_tokens)
    kept = keep_within_budget(scores, visible, forced, params.top_blocks)
    tokens = kept.repeat_interleave(params.block_size, dim=1)[:, :num_tokens]
    return tokens & visible_units(lengths, num_tokens, 1)


def group_candidates(
    proxy_scores: torch.Tensor, group_start: torch.Tensor, lengths: torch.Tensor, params: IndexerParams
) -> torch.Tensor:
    """group_rerank: the `candidates` best tokens by the group's proxy score [M, N] over what its first row sees, and
    beside them the group's own positions up to the row (PIVOT-Refine, arXiv 2607.24593).

    group_start [M]: position of the group's first row, present in the call or not; it sees tokens 0 .. group_start.
    The first page and the last local_tokens that the first row sees are forced, and count as candidates: so all rows of
    a group share one list.
    """
    num_tokens = proxy_scores.shape[1]
    scanned = group_start + 1
    forced = forced_units(scanned, num_tokens, 1, PAGE_TOKENS, params.local_tokens)
    kept = keep_within_budget(proxy_scores, visible_units(scanned, num_tokens, 1), forced, params.candidates)
    own = torch.arange(num_tokens, device=lengths.device) >= group_start[:, None]
    return (kept | own) & visible_units(lengths, num_tokens, 1)
