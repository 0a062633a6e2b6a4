"""The order in which group_rerank's scan has the queries of its proxies, in torch."""

import torch

from indexer_kernels.gpu.group_proxy_kernel import PackedProxies
from indexer_kernels.row_groups import Proxies


def packed(proxies: Proxies, places: torch.Tensor, num_places: int) -> PackedProxies:
    """As `group_proxy_kernel` packs them; NaN at places without a group."""
    num_heads = proxies.q.shape[1]
    q = torch.full((num_places, num_heads, 128), 0x7F, dtype=torch.uint8)
    gates = torch.full((num_places, num_heads), float("nan"))
    q[places.long()], gates[places.long()] = proxies.q.view(torch.uint8), proxies.weights
    return PackedProxies(_columns(q).reshape(-1, 128).view(torch.float8_e4m3fn), _columns(gates).flatten())


def _columns(of_places: torch.Tensor) -> torch.Tensor:
    """[places, heads, ...] in the order (eight places, odd ones, pair of heads, place, head of the pair)."""
    split = of_places.unflatten(1, (-1, 2)).unflatten(0, (-1, 4, 2))
    return split.movedim(2, 1).movedim(3, 2)


def unpacked(found: PackedProxies, num_heads: int) -> Proxies:
    """Proxies by place: q [places, H, 128] fp8, weights [places, H]."""
    split = (-1, 2, num_heads // 2, 4, 2)
    q, gates = found.q.view(torch.uint8).view(*split, 128), found.gates.view(split)
    # (eight places, odd ones, pair, place, head of the pair) to (eight places, place, odd ones, pair, head of the pair)
    q, gates = q.permute(0, 3, 1, 2, 4, 5), gates.permute(0, 3, 1, 2, 4)
    return Proxies(q.reshape(-1, num_heads, 128).view(torch.float8_e4m3fn), gates.reshape(-1, num_heads))
