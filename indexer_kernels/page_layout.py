"""SGLang's index-key page: 64 tokens, first their 64 x 128 fp8 bytes, then their 64 float32 scales."""

import torch

PAGE_TOKENS = 64
HEAD_DIM = 128
KEY_BYTES = PAGE_TOKENS * HEAD_DIM
PAGE_BYTES = KEY_BYTES + PAGE_TOKENS * 4


def pack_pages(k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """One request's keys as pages: k [N, 128] fp8 e4m3, k_scale [N] f32 -> [ceil(N / 64), 8448] uint8, tail zero."""
    num_tokens = k.shape[0]
    num_pages = -(-num_tokens // PAGE_TOKENS)
    pages = torch.zeros((num_pages, PAGE_BYTES), dtype=torch.uint8, device=k.device)
    keys = torch.zeros((num_pages * PAGE_TOKENS, HEAD_DIM), dtype=torch.uint8, device=k.device)
    scales = torch.zeros(num_pages * PAGE_TOKENS, dtype=torch.float32, device=k.device)
    keys[:num_tokens] = k.view(torch.uint8)
    scales[:num_tokens] = k_scale
    pages[:, :KEY_BYTES] = keys.view(num_pages, KEY_BYTES)
    pages[:, KEY_BYTES:] = scales.view(torch.uint8).view(num_pages, PAGE_TOKENS * 4)
    return pages


def unpack_pages(pages: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first num_tokens keys of consecutive pages [P, 8448] uint8: ([N, 128] fp8 e4m3, [N] f32). Inverse of
    pack_pages.
    """
    keys = pages[:, :KEY_BYTES].reshape(-1, HEAD_DIM).view(torch.float8_e4m3fn)
    scales = pages[:, KEY_BYTES:].contiguous().view(torch.float32).reshape(-1)
    return keys[:num_tokens], scales[:num_tokens]


def positions_to_slots(positions: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """slot[m, i] = page_table[m, p // 64] * 64 + p % 64 for p = positions[m, i] >= 0, else -1.

    positions [M, K] int32, page_table [M, W] int32 (one table row per query row) -> int32 [M, K].
    """
    safe = positions.clamp_min(0).long()
    pages = page_table.gather(1, safe // PAGE_TOKENS)
    return torch.where(positions >= 0, pages * PAGE_TOKENS + positions % PAGE_TOKENS, -1)
