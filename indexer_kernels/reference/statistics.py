"""Block statistics: mean keys of pages, and of blocks by their pages.

Means are bfloat16, as decode stores them and as the gpu backend's products read them. So one that was stored, computed
anew, or computed in another chunk is the same number.
"""

import torch

from indexer_kernels.page_layout import PAGE_TOKENS, unpack_pages


def page_means(pages: torch.Tensor) -> torch.Tensor:
    """Mean of key * scale over the 64 tokens of each page [P, 8448] uint8: bf16 [P, D]."""
    return _means(*unpack_pages(pages, pages.shape[0] * PAGE_TOKENS), PAGE_TOKENS)


def block_means(k: torch.Tensor, k_scale: torch.Tensor, block: int) -> torch.Tensor:
    """kbar[b] = mean over block b of k[n] * k_scale[n], for the full blocks of one request: f32 [N // block, D].

    k [N, D] and k_scale [N] start at the request's first token, so blocks are aligned to it. A block of whole pages is
    the average of its pages' means (`blocks_of_pages`); other sizes, which no kernel serves, average their tokens.
    """
    if block % PAGE_TOKENS:
        return _means(k, k_scale, block).float()
    return blocks_of_pages(_means(k, k_scale, PAGE_TOKENS), block)


def blocks_of_pages(means: torch.Tensor, block: int) -> torch.Tensor:
    """kbar[b] = bf16(average of the means [P, D] bf16 of block b's pages), of whole blocks: f32 [P // pages, D]."""
    pages = block // PAGE_TOKENS
    num_blocks = means.shape[0] // pages
    joined = means[: num_blocks * pages].double().view(num_blocks, pages, means.shape[1])
    return joined.mean(dim=1).float().bfloat16().float()


def _means(k: torch.Tensor, k_scale: torch.Tensor, tokens: int) -> torch.Tensor:
    """Means of `tokens` consecutive tokens each, as many as are whole: bf16 [N // tokens, D]."""
    number = k.shape[0] // tokens
    keys = k[: number * tokens].double() * k_scale[: number * tokens, None].double()
    return keys.view(number, tokens, k.shape[1]).mean(dim=1).float().bfloat16()
