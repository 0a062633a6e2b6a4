"""Which heads score a row's tokens: block-statistics routing (MISA, arXiv 2605.07363)."""

import torch


def routing_scores(
    q: torch.Tensor, weights: torch.Tensor, means: torch.Tensor, num_blocks: torch.Tensor, statistic: str = "sum"
) -> torch.Tensor:
    """r[m, h] = sum, or max, over b < num_blocks[m] of | weights[m, h] * relu(q[m, h] . kbar[b]) |: f32 [M, H].

    q [M, H, D], weights [M, H], means [B, D] of the request's full blocks, num_blocks [M]: the blocks full for each
    row.
    """
    full = torch.arange(means.shape[0], device=q.device) < num_blocks[:, None]
    routing = torch.empty(weights.shape, dtype=torch.float32, device=q.device)
    for head in range(q.shape[1]):
        strength = (torch.relu(q[:, head].double() @ means.double().T) * weights[:, head, None].double()).abs()
        strength = torch.where(full, strength, 0.0)
        if statistic == "sum":
            routing[:, head] = strength.sum(dim=1).float()
        else:
            routing[:, head] = strength.amax(dim=1).float() if strength.shape[1] else 0.0
    return routing


def route_heads(routing: torch.Tensor, active_heads: int) -> torch.Tensor:
    """The min(active_heads, H) heads of largest routing score, ties to the lower head: int64 [M, A], ascending.

    In ascending order all heads together sum up as native does.
    """
    return routing.sort(dim=1, descending=True, stable=True).indices[:, :active_heads].sort(dim=1).values


def take_heads(q: torch.Tensor, weights: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, H, D] and weights [M, H] of each row's own heads [M, A]: (f32 [M, A, D], f32 [M, A])."""
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    return q.float()[rows, heads], weights.float()[rows, heads]
