"""What every step of a call reads, and what all modes share: slices of bounded scratch, page counts, block means."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from indexer_kernels.gpu import head_route_kernel, page_means_kernel
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.params import IndexerParams
from indexer_kernels.row_plan import RowPlan
from indexer_kernels.top_k import TopK

# Scores held at once. Rows are taken in slices that fit, so no context length can exhaust the device.
SCRATCH_BYTES = 15 << 26
BLOCK_TILE = head_route_kernel.TILE_BLOCKS


class Work(NamedTuple):
    """What every step of one call reads: q [M, H, 128], weights [M, H], the pool, its page table, the plan, the
    settings.

    top_k writes the chosen tokens of a row to out [M, top_k]: as cache slots where slots is set, else as positions.
    page_means [P, 128] bf16: stored means of all full pages, or None.
    """

    q: torch.Tensor
    weights: torch.Tensor
    pool: "Pool"
    page_table: torch.Tensor
    plan: RowPlan
    params: IndexerParams
    slots: bool
    top_k: TopK
    out: torch.Tensor
    page_means: torch.Tensor | None = None


class Pool(NamedTuple):
    """The index-key pages [P, 8448] uint8 under the views the kernels read: 66 rows of 128 bytes, 33 of 64 floats."""

    pages: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor


def block_means(work: Work, block_size: int) -> torch.Tensor:
    """Mean keys of every full block, bf16 [R, blocks padded to whole tiles, 128]; zero past a request's last full
    block.
    """
    blocks = max(1, work.plan.max_length // block_size)
    padded = -(-blocks // BLOCK_TILE) * BLOCK_TILE
    shape = (work.page_table.shape[0], padded, HEAD_DIM)
    means = torch.empty(shape, dtype=torch.bfloat16, device=work.q.device)
    page_means_kernel.block_means(
        work.pool.pages,
        work.page_table,
        work.plan.request_lengths,
        block_size // PAGE_TOKENS,
        work.page_means,
        means,
    )
    return means


def pages_of(lengths: torch.Tensor) -> torch.Tensor:
    return (lengths + PAGE_TOKENS - 1) // PAGE_TOKENS


def table_pages(work: Work) -> int:
    """Pages of the page table that some row may see."""
    return min(work.page_table.shape[1], -(-work.plan.max_length // PAGE_TOKENS))


def counting(plan: RowPlan, count: int) -> torch.Tensor:
    """0 .. count - 1, int32 on the plan's device."""
    device = plan.row_lengths.device
    return plan.kept(("counting", count), lambda: torch.arange(count, dtype=torch.int32, device=device))


def row_tables(work: Work, request: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The page table of each row for DeepGEMM: int32 [M, table_pages]; request, lengths [M] int32.

    Past a row's end the table is garbage, and DeepGEMM fetches pages in groups: there it points at the row's last page.
    """
    width, last = table_pages(work), (pages_of(lengths) - 1).clamp_min(0)
    column = torch.minimum(torch.arange(width, device=last.device), last[:, None])
    return work.page_table[request.long(), :width].gather(1, column)


def slices(count: int, bytes_each: int, multiple: int = 1, most: int | None = None) -> Iterator[slice]:
    """Slices of range(count) whose scores fit SCRATCH_BYTES, in steps of `multiple` where that many fit, and of at most
    `most`.
    """
    step = max(1, SCRATCH_BYTES // max(1, bytes_each))
    if step > multiple:
        step -= step % multiple
    if most is not None:
        step = min(step, most)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
