"""Stored page means: what decode's block scores read in place of keys. One buffer per layer, by physical page.

A page's mean belongs to the page, not to a request, so prefix sharing, retraction and reuse need no care: whoever wrote
a page's 64th key calls one of the two updates before the next selection that uses `page_means`.
"""

import torch

from indexer_kernels.backend import use_gpu_on
from indexer_kernels.checks import (
    check_backend,
    check_key_pages,
    check_means,
    check_page_ids,
    check_reach,
    check_tensor,
)
from indexer_kernels.page_layout import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.reference import statistics


def page_mean_buffer(num_pages: int, device: torch.device | str) -> torch.Tensor:
    """Room for the means of a pool of num_pages pages in one layer: bf16 [num_pages, 128], zero."""
    return torch.zeros((num_pages, HEAD_DIM), dtype=torch.bfloat16, device=device)


def update_page_means(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    means: torch.Tensor,
    first_page: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """means[page_table[r, i]] = 1/64 * sum over page i's tokens of key * scale, for every full page i of request r from
    first_page[r] on: those with 64 * (i + 1) <= lengths[r]. For extends.

    k_pages [P, 8448] uint8, page_table [R, >= pages] int32 (entries past a length are not read), lengths [R] int32,
    means [P, 128] bfloat16 written in place, first_page [R] int32 or None (0). Summed in float32 in the tokens' order,
    then rounded to bfloat16. The gpu backend reads nothing back. Raises TypeError or ValueError naming the argument,
    NotImplementedError where backend="gpu" cannot serve the call.
    """
    _check(k_pages, page_table, lengths, means, backend)
    if first_page is not None:
        check_tensor("first_page", first_page, torch.int32, (page_table.shape[0],), k_pages.device, "k_pages")
        first_page = first_page.contiguous()
    if use_gpu_on(k_pages.device, backend):
        from indexer_kernels.gpu import page_means_kernel

        page_means_kernel.update_means(k_pages, page_table, lengths.contiguous(), means, first_page, last=False)
        return
    starts = [0] * len(lengths) if first_page is None else first_page.tolist()
    for row, length, start in zip(page_table, lengths.tolist(), starts):
        pages = row[max(start, 0) : length // PAGE_TOKENS].long()
        means[pages] = statistics.page_means(k_pages[pages])


def update_last_page_means(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    row_lengths: torch.Tensor,
    means: torch.Tensor,
    backend: str = "auto",
) -> None:
    """`update_page_means` of each row's last full page alone, number row_lengths[m] // 64 - 1, if it has one.

    For every decode or verify step: it covers the page that just filled, and one whose draft tokens were rejected and
    written anew. Rows that share a page write the same mean. With several rows a request, as in target-verify, every
    page that one of them fills is covered. May be captured in a CUDA graph with backend="gpu".
    """
    _check(k_pages, page_table, row_lengths, means, backend)
    if use_gpu_on(k_pages.device, backend):
        from indexer_kernels.gpu import page_means_kernel

        page_means_kernel.update_means(k_pages, page_table, row_lengths.contiguous(), means, None, last=True)
        return
    full = row_lengths.long() // PAGE_TOKENS
    pages = page_table[full > 0].gather(1, full[full > 0, None] - 1)[:, 0].long()
    means[pages] = statistics.page_means(k_pages[pages])


def check_page_means(
    k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, means: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """How many full pages of the requests have a stored mean that differs in a bit from the one computed anew: int32
    scalar on k_pages' device. A page of two requests counts twice.

    Arguments as in `update_page_means`, and the backend must be the one that wrote the means: the reference adds up in
    float64, so that a rounding to bfloat16 may differ. The gpu backend reads nothing back.
    """
    _check(k_pages, page_table, lengths, means, backend)
    if use_gpu_on(k_pages.device, backend):
        from indexer_kernels.gpu import page_means_kernel

        return page_means_kernel.check_means(k_pages, page_table, lengths.contiguous(), means)
    wrong = 0
    for row, length in zip(page_table, lengths.tolist()):
        pages = row[: length // PAGE_TOKENS].long()
        again, stored = statistics.page_means(k_pages[pages]), means[pages]
        wrong += int((again.view(torch.int16) != stored.view(torch.int16)).any(1).sum())
    return torch.tensor(wrong, dtype=torch.int32, device=means.device)


def _check(
    k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, means: torch.Tensor, backend: object
) -> None:
    check_backend(backend)
    check_key_pages(k_pages, None)
    check_tensor("page_table", page_table, torch.int32, (None, None), k_pages.device, "k_pages")
    if page_table.stride(1) != 1:
        raise ValueError(f"page_table must have unit column stride, got strides {page_table.stride()}")
    check_tensor("lengths", lengths, torch.int32, (page_table.shape[0],), k_pages.device, "k_pages")
    check_means("means", means, k_pages)
    check_reach("lengths", lengths, page_table)
    check_page_ids(k_pages, page_table, lengths // PAGE_TOKENS * PAGE_TOKENS)
