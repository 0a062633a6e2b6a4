"""Stored block statistics: the mean key of every full page of a paged key cache, kept beside it by physical page.

    means[p] = 1/64 * sum over the 64 tokens of page p of key * scale, rounded to bf16

Addressed by physical page, so a request that shares, inherits or reuses a page finds its mean with it. Every function
computes means anew from the keys and never adds to one, so what a page held before cannot leak into its mean.
"""

import torch

from indexer_kernels.checks import check_tensor
from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES, PAGE_TOKENS


def page_mean_buffer(num_pages: int, device: torch.device | str) -> torch.Tensor:
    """Memory for the means of a layer's pages: bf16 [num_pages, 128], zeros."""
    return torch.zeros((num_pages, HEAD_DIM), dtype=torch.bfloat16, device=device)


def update_page_means(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    means: torch.Tensor,
    first_page: torch.Tensor | None = None,
) -> None:
    """Store the means of all full pages of each request, from its first_page on; what an extend calls.

    k_pages [P, 8448] uint8, page_table [R, W] int32, lengths [R] int32: tokens of each request, means [P, 128] bf16,
    first_page [R] int32: pages of the request that are left alone (None: none). Other rows of means are not touched.
    Raises TypeError or ValueError naming the argument.
    """
    _check(k_pages, page_table, lengths, means)
    column = torch.arange(page_table.shape[1], device=page_table.device)
    full = (column + 1) * PAGE_TOKENS <= lengths[:, None]
    if first_page is not None:
        full &= column >= first_page[:, None]
    pages = page_table[full].long()
    means[pages] = _means_of(k_pages[pages])


def update_last_page_means(
    k_pages: torch.Tensor, page_table: torch.Tensor, row_lengths: torch.Tensor, means: torch.Tensor
) -> None:
    """Store the mean of the last full page of each row, if it has one; what a decode step calls.

    page_table [M, W] int32, row_lengths [M] int32: tokens each row sees; else as `update_page_means`. Reads nothing
    back, so it may be captured in a CUDA graph.
    """
    _check(k_pages, page_table, row_lengths, means)
    last = row_lengths.long() // PAGE_TOKENS - 1
    page = page_table.gather(1, last.clamp_min(0)[:, None]).squeeze(1).long()
    page = torch.where(last >= 0, page, 0)
    means[page] = torch.where((last >= 0)[:, None], _means_of(k_pages[page]), means[page])


def check_page_means(
    k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """How many full pages of the requests have another mean than the stored one: int32 scalar on the device.

    Arguments as in `update_page_means`. Reads nothing back.
    """
    _check(k_pages, page_table, lengths, means)
    column = torch.arange(page_table.shape[1], device=page_table.device)
    full = (column + 1) * PAGE_TOKENS <= lengths[:, None]
    pages = torch.where(full, page_table, 0).long()
    # compared as bits: a NaN mean of NaN keys is no mismatch
    differs = (_means_of(k_pages[pages]).view(torch.int16) != means[pages].view(torch.int16)).any(dim=2)
    return (differs & full).sum(dtype=torch.int32)


def _means_of(pages: torch.Tensor) -> torch.Tensor:
    """bf16 [..., 128] of pages [..., 8448]."""
    keys = pages[..., :KEY_BYTES].reshape(*pages.shape[:-1], PAGE_TOKENS, HEAD_DIM).view(torch.float8_e4m3fn).double()
    scales = pages[..., KEY_BYTES:].contiguous().view(torch.float32).double()
    return (keys * scales[..., None]).mean(dim=-2).float().bfloat16()


def _check(k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, means: torch.Tensor) -> None:
    check_tensor("k_pages", k_pages, torch.uint8, (None, PAGE_BYTES))
    check_tensor("page_table", page_table, torch.int32, (None, None), k_pages.device)
    check_tensor("lengths", lengths, torch.int32, (page_table.shape[0],), k_pages.device)
    check_tensor("means", means, torch.bfloat16, (k_pages.shape[0], HEAD_DIM), k_pages.device)
