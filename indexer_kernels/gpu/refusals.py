"""What the gpu backend cannot serve, and why: told before a call, and before a server starts."""

import torch

from indexer_kernels.gpu.target import PAGE_TOKENS
from indexer_kernels.params import IndexerParams

HEADS = (32, 64)
GROUPS = (2, 4)


def refusal(mode: str, q: torch.Tensor, params: IndexerParams) -> str | None:
    """Why this backend cannot serve the call, or None. Reads shapes and device properties only."""
    if q.device.type != "cuda":
        return f"q is on {q.device.type}, the gpu backend needs a CUDA device"
    refusal = device_refusal(q.device)
    if refusal is not None:
        return refusal
    if q.shape[1] not in HEADS:
        return f"{q.shape[1]} indexer heads, kernels are built for {HEADS}"
    return mode_refusal(mode, params)


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel runs on this CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else f"compute capability {capability}, kernels are built for (9, 0)"


def mode_refusal(mode: str, params: IndexerParams) -> str | None:
    """The part of `refusal` that depends on the settings alone: what a server can know before it starts."""
    if mode == "group_rerank":
        return _groups_refusal(params)
    if mode in ("misa", "misa_rerank"):
        if params.active_heads not in (4, 8, 16):
            return f"active_heads={params.active_heads}, kernels are built for 4, 8 and 16"
        if params.route_block % PAGE_TOKENS:
            return f"route_block={params.route_block} is not a multiple of {PAGE_TOKENS}"
        if params.route_block > params.top_k:
            return f"route_block={params.route_block} above top_k={params.top_k}: rows without a block need native"
    if mode == "misa_rerank":
        return _candidates_refusal(params)
    if mode == "hisa":
        return _blocks_refusal(params)
    return None


def _candidates_refusal(params: IndexerParams) -> str | None:
    if params.candidate_unit == "page":
        forced = 1 + _covering(params.local_tokens, PAGE_TOKENS)
        if forced >= params.candidates // PAGE_TOKENS:
            return f"candidates={params.candidates} leaves no page beside the {forced} forced ones"
        return None
    return _token_budget_refusal(params)


def _groups_refusal(params: IndexerParams) -> str | None:
    if params.group not in GROUPS:
        return f"group={params.group}, kernels are built for {GROUPS}"
    return _token_budget_refusal(params)


def _token_budget_refusal(params: IndexerParams) -> str | None:
    if PAGE_TOKENS + params.local_tokens >= params.candidates:
        return f"candidates={params.candidates} leaves no token beside the forced ones"
    return None


def _blocks_refusal(params: IndexerParams) -> str | None:
    if params.block_size % PAGE_TOKENS:
        return f"block_size={params.block_size} is not a multiple of {PAGE_TOKENS}"
    forced = 1 + _covering(params.local_tokens, params.block_size)
    if forced >= params.top_blocks:
        return f"top_blocks={params.top_blocks} leaves no block beside the {forced} forced ones"
    return None


def _covering(tokens: int, unit: int) -> int:
    """The most units that `tokens` consecutive tokens can touch."""
    return (tokens - 2) // unit + 2 if tokens > 1 else 1
