"""group_rerank: which rows share one scan, and the proxy query they share.

The gpu backend has the proxies from a kernel of its own, bitwise these, so both rank by the same numbers.
"""

from typing import NamedTuple

import torch

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


class RowGroups(NamedTuple):
    """G groups of at most W rows; a group never mixes requests.

    rows [G, W] int32   the rows of each group by position, filled from the front, then -1
    row_place [M] int32 where a row sits among them: group * W + its index in the group
    """

    rows: torch.Tensor
    row_place: torch.Tensor


class Proxies(NamedTuple):
    """One query per group: q [G, H, D] fp8 e4m3, weights [G, H] f32, its gates."""

    q: torch.Tensor
    weights: torch.Tensor


def group_rows(row_request: torch.Tensor, row_lengths: torch.Tensor, group: int) -> RowGroups:
    """The groups of any rows: those of one request whose positions have the same position // group.

    row_request, row_lengths [M] int, lengths at least 0; a row's position is its length - 1. A group holds those of its
    rows that are in the call; where a position is repeated, what exceeds `group` rows makes another group. Rows that
    see no token share groups of their own.
    """
    num_rows, device = row_request.shape[0], row_request.device
    if not num_rows:
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return RowGroups(empty.view(0, group), empty)
    lengths = row_lengths.long()
    order = torch.argsort(row_request.long() * (lengths.max() + 1) + lengths, stable=True)
    request, unit = row_request[order], torch.div(lengths[order] - 1, group, rounding_mode="floor")
    new_run = torch.ones(num_rows, dtype=torch.bool, device=device)
    new_run[1:] = (request[1:] != request[:-1]) | (unit[1:] != unit[:-1])
    index = torch.arange(num_rows, device=device)
    within = (index - index[new_run][new_run.cumsum(0) - 1]) % group
    group_of = (within == 0).cumsum(0) - 1
    place = group_of * group + within
    rows = torch.full((int(group_of[-1] + 1) * group,), -1, dtype=torch.int32, device=device)
    rows[place] = order.int()
    row_place = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_place[order] = place.int()
    return RowGroups(rows.view(-1, group), row_place)


def first_seen(lengths: torch.Tensor, group: int) -> torch.Tensor:
    """Tokens that the first position of a row's group sees, of rows that see lengths [M] int tokens; 0 for 0."""
    return (torch.div(lengths - 1, group, rounding_mode="floor") * group + 1).clamp_min(0)


def group_proxies(q: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> Proxies:
    """Mean query and mean gate of each group's rows, per head, the query as fp8 (PIVOT, arXiv 2607.24593).

    q [M, H, D] fp8 e4m3, weights [M, H] f32, rows [G, W] int, -1: no row; every group has a row. With m the mean query
    of a head, scale = the least power of two for which max|m| / scale <= 448: q = fp8(m / scale), gate = mean gate *
    scale. A power of two keeps the proxy of one row, or of equal rows, exactly their own query. Sums of fp8 values are
    exact in float32, gates are added in the rows' order, and nothing divides by a constant (which a GPU may turn into
    a product): bitwise the same on every device, every time.
    """
    index = rows.clamp_min(0).long()
    present = rows >= 0
    total = torch.zeros((rows.shape[0], *q.shape[1:]), dtype=torch.float32, device=q.device)
    gates = torch.zeros((rows.shape[0], q.shape[1]), dtype=torch.float32, device=q.device)
    for place in range(rows.shape[1]):
        here = present[:, place, None]
        total += torch.where(here[:, :, None], q[index[:, place]].float(), 0.0)
        gates += torch.where(here, weights[index[:, place]], 0.0)
    count = present.sum(1)[:, None].float()
    total /= count[:, :, None]
    # max|m| = mantissa * 2^exponent with mantissa in [0.5, 1), and 448 = 0.875 * 2^9.
    mantissa, exponent = torch.frexp(total.abs().amax(dim=2))
    exponent = exponent - 9 + (mantissa > FP8_MAX / 512).int()
    scale = ((exponent + 127) << 23).view(torch.float32)  # 2^exponent; pow() is not exact on every device
    return Proxies((total / scale[:, :, None]).to(torch.float8_e4m3fn), gates / count * scale)
