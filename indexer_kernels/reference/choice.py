"""Choosing: candidate units within a budget, and the final tokens."""

import torch

_LIMITS = torch.finfo(torch.float32)


def finite(scores: torch.Tensor) -> torch.Tensor:
    """Scores that leave +-inf to the masks: infinities become the largest numbers, NaN the smallest (it ranks last)."""
    return torch.nan_to_num(scores, nan=_LIMITS.min, posinf=_LIMITS.max, neginf=_LIMITS.min)


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """rank[m, i]: how many columns of row m come before i, by larger score, then by lower index. int64, like scores."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    return rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))


def keep_within_budget(scores: torch.Tensor, visible: torch.Tensor, forced: torch.Tensor, budget: int) -> torch.Tensor:
    """The `budget` best visible columns of each row, forced ones first, ties to the lower index: bool [M, U].

    scores f32, visible and forced bool [M, U]; scores of invisible or forced columns are not looked at.
    """
    masked = torch.where(visible & ~forced, finite(scores), float("-inf"))
    masked = torch.where(visible & forced, float("inf"), masked)
    return visible & (ranks(masked) < budget)


def select_tokens(scores: torch.Tensor, eligible: torch.Tensor, top_k: int) -> torch.Tensor:
    """The top_k best eligible columns of each row, ties to the lower index, packed first, then -1: int32 [M, top_k]."""
    num_rows, num_columns = scores.shape
    masked = torch.where(eligible, finite(scores), float("-inf"))
    order = masked.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    selected = torch.full((num_rows, top_k), -1, dtype=torch.int32, device=scores.device)
    found = torch.arange(order.shape[1], device=scores.device) < eligible.sum(dim=1, keepdim=True)
    selected[:, : order.shape[1]] = torch.where(found, order.to(torch.int32), -1)
    return selected
