"""Triton kernel of the sample: one key of every cell of tokens.

Scoring the sample first tells, for a sixteenth of the scan, which scores are worth listing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.page_layout import KEY_BYTES, PAGE_BYTES

CELL = 16  # tokens of which one is in the sample
MOST = 8192  # samples that a search holds in registers; a row with more uses every second, fourth, ... of them
SIGMAS = 5.0  # how far a sample may mislead: 3e-7 of rows beyond it if samples were independent
# How far the limit lies above the budget, in deviations; the threshold aims one above it. By the Poisson law a list of
# 2048 is longer than its limit, and scanned again, in 0.19 calls of 8192 rows with 2, in 2e-5 with 2.5; it is too short
# in 0.003.
LIMIT_DEVIATIONS = 2.5
COPY_WARPS = 4
COPIED = ["pages", "page_scales", "page_table", "table_width", "lengths", "out", "out_scales"]


@triton.jit
def sampled_token(cell, CELL: tl.constexpr):
    """The token of a cell that is its sample, by multiplicative hashing: it must not follow a pattern of the text."""
    mixed = (cell.to(tl.uint32) * 2654435761) >> 16
    return cell * CELL + (mixed % CELL).to(tl.int32)


@triton.jit(do_not_specialize=COPIED, do_not_specialize_on_alignment=COPIED)
def sample_keys_kernel(
    pages,  # the cache's bytes as fp8
    page_scales,  # the cache's bytes as f32
    page_table,  # [R, table_width] int32
    table_width,
    lengths,  # [R] int32
    out,  # [R * sample pages, PAGE_BYTES] as fp8
    out_scales,  # the same bytes as f32
    CELL: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    request = tl.program_id(1)
    length = tl.load(lengths + request)
    sample = tl.program_id(0) * 64 + tl.arange(0, 64)
    if tl.program_id(0) * 64 * CELL >= length:
        return
    token = sampled_token(sample, CELL)
    inside = token < length
    page = tl.load(page_table + request.to(tl.int64) * table_width + token // 64, mask=inside, other=0).to(tl.int64)
    byte = tl.arange(0, 128)
    source = page * PAGE_BYTES + token % 64 * 128
    key = tl.load(pages + source[:, None] + byte[None, :], mask=inside[:, None], other=0.0)
    scale = tl.load(page_scales + page * (PAGE_BYTES // 4) + KEY_BYTES // 4 + token % 64, mask=inside, other=0.0)
    target = request.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    slot = tl.arange(0, 64)
    tl.store(out + target * PAGE_BYTES + slot[:, None] * 128 + byte[None, :], key)
    tl.store(out_scales + target * (PAGE_BYTES // 4) + KEY_BYTES // 4 + slot, scale)


class Sample(NamedTuple):
    """A pool of sampled keys under the views the scan reads, and its page table [R, W] int32."""

    keys: torch.Tensor
    scales: torch.Tensor
    page_table: torch.Tensor


def list_width(budget: int, max_length: int, tile: int) -> int:
    """Columns of a candidate list that hold the limit of every row of at most max_length tokens, in whole tiles."""
    cell = CELL
    while max_length > cell * MOST:
        cell *= 2
    limit = budget + LIMIT_DEVIATIONS * (SIGMAS * (budget / cell) ** 0.5 + 4) * cell
    return -(-int(min(limit, max(budget, max_length)) + 1) // tile) * tile


def sample_keys(
    k_pages: torch.Tensor, page_table: torch.Tensor, request_lengths: torch.Tensor, max_length: int
) -> Sample:
    """One key of each full or started cell of every request, copied into pages of their own.

    k_pages [P, 8448] uint8, page_table [R, W] int32, request_lengths [R] int32. Past a request's end pages hold zeros
    or anything.
    """
    requests, width = page_table.shape[0], max(1, -(-max_length // (CELL * 64)))
    pool = torch.empty((requests * width, PAGE_BYTES), dtype=torch.uint8, device=k_pages.device)
    if requests:
        sample_keys_kernel[(width, requests)](
            k_pages.view(torch.float8_e4m3fn),
            k_pages.view(torch.float32),
            page_table,
            page_table.stride(0),
            request_lengths,
            pool.view(torch.float8_e4m3fn),
            pool.view(torch.float32),
            CELL=CELL,
            PAGE_BYTES=PAGE_BYTES,
            KEY_BYTES=KEY_BYTES,
            num_warps=COPY_WARPS,
        )
    table = torch.arange(requests * width, dtype=torch.int32, device=k_pages.device).view(requests, width)
    return Sample(pool.view(torch.float8_e4m3fn).view(-1, 128), pool.view(torch.float32).view(-1, 64), table)


def compile_sample_keys():
    """The copy, compiled for sm_90 without a GPU or a launch."""
    kinds = dict.fromkeys(COPIED, "*i32") | {"table_width": "i32", "pages": "*fp8e4nv", "out": "*fp8e4nv"}
    kinds |= {"page_scales": "*fp32", "out_scales": "*fp32"}
    constants = {"CELL": CELL, "PAGE_BYTES": PAGE_BYTES, "KEY_BYTES": KEY_BYTES}
    return compile_sm90(sample_keys_kernel, kinds, constants, {"num_warps": COPY_WARPS})
