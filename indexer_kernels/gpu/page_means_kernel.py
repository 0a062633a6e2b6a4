"""Triton kernels of page and block means over the paged key cache.

A mean has the same bits whichever kernel computed it: keys are added in the tokens' order, each by one fused
multiply-add, by one thread per dimension, so that no compiler's choice of a layout changes a sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES, PAGE_TOKENS

PAGES = 4  # of a program, one per warp
CACHE = ["keys", "scales", "page_table", "table_width", "lengths"]
UPDATED = [*CACHE, "first_page", "means"]
CHECKED = [*CACHE, "means", "mismatches"]
BLOCKS = [*CACHE, "page_means", "out", "num_blocks"]
ALIGNED = {"keys", "scales", "means", "page_means", "out"}  # to 16 bytes: rows of them are read and written whole
GEOMETRY = {"DIM": HEAD_DIM, "TOKENS": PAGE_TOKENS, "PAGE_BYTES": PAGE_BYTES, "KEY_BYTES": KEY_BYTES}


def _unaligned(names: list[str]) -> list[str]:
    return [name for name in names if name not in ALIGNED]


@triton.jit
def page_mean(
    keys, scales, page, DIM: tl.constexpr, TOKENS: tl.constexpr, PAGE_BYTES: tl.constexpr, KEY_BYTES: tl.constexpr
):
    """Mean dequantised key of each whole page [n] int64 of the pool: bf16 [n, DIM]."""
    key = keys + page[:, None] * PAGE_BYTES + tl.arange(0, DIM)[None, :]
    scale = scales + page * (PAGE_BYTES // 4) + KEY_BYTES // 4
    total = tl.zeros(key.shape, tl.float32)
    for token in tl.static_range(TOKENS):
        total = tl.fma(tl.load(key + token * DIM).to(tl.float32), tl.load(scale + token)[:, None], total)
    return (total * (1.0 / TOKENS)).to(tl.bfloat16)


@triton.jit(do_not_specialize=_unaligned(UPDATED), do_not_specialize_on_alignment=_unaligned(UPDATED))
def update_means_kernel(
    keys,  # the cache's bytes as fp8
    scales,  # the cache's bytes as f32
    page_table,  # [R, >= pages] int32, rows table_width apart
    table_width,
    lengths,  # [R] int32
    first_page,  # [R] int32, read where FROM_FIRST
    means,  # [P, DIM] bf16 out
    LAST: tl.constexpr,
    FROM_FIRST: tl.constexpr,
    PAGES: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    """Full pages of a request from first_page on, PAGES a program; LAST: its last full page alone."""
    request = tl.program_id(0).to(tl.int64)
    full = tl.load(lengths + request) // TOKENS
    first = tl.program_id(1) * PAGES
    if LAST:
        first = full - 1
    elif FROM_FIRST:
        first += tl.maximum(tl.load(first_page + request), 0)
    if (first < 0) | (first >= full):
        return
    number = first + tl.arange(0, PAGES)
    page = tl.load(page_table + request * table_width + number, mask=number < full, other=0).to(tl.int64)
    mean = page_mean(keys, scales, page, DIM, TOKENS, PAGE_BYTES, KEY_BYTES)
    place = means + page[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(place, mean, mask=(number < full)[:, None])


@triton.jit(do_not_specialize=_unaligned(CHECKED), do_not_specialize_on_alignment=_unaligned(CHECKED))
def check_means_kernel(
    keys,
    scales,
    page_table,
    table_width,
    lengths,
    means,  # [P, DIM] bf16
    mismatches,  # int32, added to
    PAGES: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    full = tl.load(lengths + request) // TOKENS
    first = tl.program_id(1) * PAGES
    if first >= full:
        return
    number = first + tl.arange(0, PAGES)
    page = tl.load(page_table + request * table_width + number, mask=number < full, other=0).to(tl.int64)
    mean = page_mean(keys, scales, page, DIM, TOKENS, PAGE_BYTES, KEY_BYTES)
    stored = tl.load(means + page[:, None] * DIM + tl.arange(0, DIM)[None, :])
    differs = (mean.to(tl.int16, bitcast=True) != stored.to(tl.int16, bitcast=True)).to(tl.int32)
    wrong = (tl.max(differs, axis=1) > 0) & (number < full)
    tl.atomic_add(mismatches, tl.sum(wrong.to(tl.int32)))


@triton.jit
def block_of_pages(
    keys,
    scales,
    page_means,
    table,
    block,
    full,
    turns,
    STORED: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    """Mean key of each block [n] that is `full`, the average of its pages' means: bf16 [n, DIM]. turns: BLOCK_PAGES, or
    0 where none is full.
    """
    total = tl.zeros((block.shape[0], DIM), tl.float32)
    for number in range(turns):
        page = tl.load(table + block * BLOCK_PAGES + number, mask=full, other=0).to(tl.int64)
        if STORED:
            mean = tl.load(page_means + page[:, None] * DIM + tl.arange(0, DIM)[None, :])
        else:
            mean = page_mean(keys, scales, page, DIM, TOKENS, PAGE_BYTES, KEY_BYTES)
        total += mean.to(tl.float32)
    return (total * (1.0 / BLOCK_PAGES)).to(tl.bfloat16)


@triton.jit(do_not_specialize=_unaligned(BLOCKS), do_not_specialize_on_alignment=_unaligned(BLOCKS))
def block_means_kernel(
    keys,
    scales,
    page_table,
    table_width,
    lengths,
    page_means,  # [P, DIM] bf16, read in place of the keys where STORED
    out,  # [R, num_blocks, DIM] bf16; zero past a request's last full block
    num_blocks,
    STORED: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    PAGES: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    most = tl.load(lengths + request) // (TOKENS * BLOCK_PAGES)
    first = tl.program_id(1) * PAGES
    block = first + tl.arange(0, PAGES)
    full = block < most
    mean = block_of_pages(
        keys,
        scales,
        page_means,
        page_table + request * table_width,
        block,
        full,
        tl.where(first < most, BLOCK_PAGES, 0),
        STORED,
        BLOCK_PAGES,
        DIM,
        TOKENS,
        PAGE_BYTES,
        KEY_BYTES,
    )
    place = out + (request * num_blocks + block)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(place, tl.where(full[:, None], mean, 0.0), mask=(block < num_blocks)[:, None])


def update_means(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    means: torch.Tensor,
    first_page: torch.Tensor | None,
    last: bool,
) -> None:
    """`update_page_means` and, with last, `update_last_page_means` of `indexer_kernels.page_means` on the GPU."""
    requests, width = page_table.shape
    pages = 1 if last else PAGES
    grid = (requests, 1 if last else triton.cdiv(width, PAGES))
    if 0 in grid:
        return
    update_means_kernel[grid](
        *_cache(k_pages, page_table, lengths),
        lengths if first_page is None else first_page,
        means,
        **_update_constants(last, first_page is not None),
        num_warps=pages,
    )


def check_means(
    k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """`check_page_means` of `indexer_kernels.page_means` on the GPU."""
    mismatches = torch.zeros((), dtype=torch.int32, device=means.device)
    grid = (page_table.shape[0], triton.cdiv(page_table.shape[1], PAGES))
    if 0 not in grid:
        check_means_kernel[grid](
            *_cache(k_pages, page_table, lengths), means, mismatches, PAGES=PAGES, **GEOMETRY, num_warps=PAGES
        )
    return mismatches


def block_means(
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    block_pages: int,
    page_means: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out [R, B, 128] bf16: the means of each request's full blocks of block_pages pages, from stored page means or
    from the keys; zero past its last full block.
    """
    block_means_kernel[(out.shape[0], triton.cdiv(out.shape[1], PAGES))](
        *_cache(k_pages, page_table, lengths),
        out if page_means is None else page_means,
        out,
        out.shape[1],
        **_block_constants(block_pages, page_means is not None),
        num_warps=PAGES,
    )


def _cache(k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor) -> tuple:
    keys, scales = k_pages.view(torch.float8_e4m3fn), k_pages.view(torch.float32)
    return keys, scales, page_table, page_table.stride(0), lengths


def _update_constants(last: bool, from_first: bool) -> dict[str, int]:
    return {"LAST": last, "FROM_FIRST": from_first, "PAGES": 1 if last else PAGES, **GEOMETRY}


def _block_constants(block_pages: int, stored: bool) -> dict[str, int]:
    return {"STORED": stored, "BLOCK_PAGES": block_pages, "PAGES": PAGES, **GEOMETRY}


_KINDS = {
    "keys": "*fp8e4nv",
    "scales": "*fp32",
    "table_width": "i32",
    "means": "*bf16",
    "page_means": "*bf16",
    "out": "*bf16",
    "num_blocks": "i32",
}


def compile_update(last: bool, from_first: bool):
    """The variant of a setting, compiled for sm_90 without a GPU or a launch; its `asm` holds PTX and cubin."""
    return _compile(update_means_kernel, UPDATED, _update_constants(last, from_first))


def compile_check():
    return _compile(check_means_kernel, CHECKED, {"PAGES": PAGES, **GEOMETRY})


def compile_blocks(block_pages: int, stored: bool):
    return _compile(block_means_kernel, BLOCKS, _block_constants(block_pages, stored))


def _compile(kernel: Any, names: list[str], constants: dict[str, int]):
    kinds = {name: _KINDS.get(name, "*i32") for name in names}
    aligned = [name for name in names if name in ALIGNED]
    return compile_sm90(kernel, kinds, constants, {"num_warps": constants["PAGES"]}, aligned)
