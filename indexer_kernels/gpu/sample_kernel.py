"""Triton kernels of the sample: one key of every cell of tokens, and the score that about `wanted` tokens reach.

Scoring the sample first tells, for a sixteenth of the scan, which scores are worth listing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.ordered_bits_kernel import from_ordered_bits, ordered_bits
from indexer_kernels.page_layout import KEY_BYTES, PAGE_BYTES

CELL = 16  # tokens of which one is in the sample
MOST = 8192  # samples that one program holds in registers; a row with more uses every second, fourth, ... of them
SIGMAS = 5.0  # how far a sample may mislead: 3e-7 of rows beyond it if samples were independent
BITS = 18  # of the threshold's 32 that are searched; the rest are 0, which lets a little more through
COPY_WARPS = 4
# Samples that a program holds at once, by the longest row of the batch: warps.
HELD = {1024: 2, 2048: 4, 4096: 8, 8192: 8}
COPIED = ["pages", "page_scales", "page_table", "table_width", "lengths", "out", "out_scales"]
SEARCHED = ["scores", "score_stride", "rows", "lengths", "thresholds", "limits"]


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


@triton.jit(do_not_specialize=SEARCHED, do_not_specialize_on_alignment=SEARCHED)
def sample_threshold_kernel(
    scores,  # [places, >= samples] f32; AMONG_ALL: [places, >= tokens], the scores of all tokens
    score_stride,
    rows,  # [places] int32, the query row of each place or -1
    lengths,  # [M] int32
    thresholds,  # [places] f32 out
    limits,  # [places] int32 out
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    CELL: tl.constexpr,
    MOST: tl.constexpr,
    HELD: tl.constexpr,
    SIGMAS: tl.constexpr,
    BITS: tl.constexpr,
    AMONG_ALL: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place)
    threshold = float("-inf")
    limit = BUDGET
    if row >= 0:
        length = tl.load(lengths + row)
        if length > BUDGET:
            local = tl.maximum(length - LOCAL, FIRST)
            first = (FIRST + CELL - 1) // CELL
            samples = local // CELL - first
            step = tl.full((), 1, tl.int32)
            while samples > MOST * step:
                step *= 2
            samples = samples // step
            share = (BUDGET - FIRST - (length - local)).to(tl.float32) / (local - FIRST).to(tl.float32)
            expected = share * samples.to(tl.float32)
            deviations = SIGMAS * tl.sqrt(expected) + 4.0
            wanted = (expected + deviations).to(tl.int32)
            limit = BUDGET + (2.0 * deviations).to(tl.int32) * CELL * step
            if wanted < samples:
                inside = tl.arange(0, HELD) < samples
                column = first + tl.arange(0, HELD) * step
                if AMONG_ALL:
                    column = sampled_token(column, CELL)
                at = scores + place.to(tl.int64) * score_stride
                key = ordered_bits(tl.load(at + column, mask=inside, other=0.0))
                key = tl.where(inside, key, 0)
                found = tl.zeros((), tl.uint32)
                for bit in range(BITS):
                    higher = found | (tl.full((), 2147483648, tl.uint32) >> bit)
                    enough = tl.sum((key >= higher).to(tl.int32)) >= wanted
                    found = tl.where(enough, higher, found)
                threshold = from_ordered_bits(found)
    tl.store(thresholds + place, threshold)
    tl.store(limits + place, limit)


class Sample(NamedTuple):
    """A pool of sampled keys under the views the scan reads, and its page table [R, W] int32."""

    keys: torch.Tensor
    scales: torch.Tensor
    page_table: torch.Tensor


class Thresholds(NamedTuple):
    """Of each place: a score [places] f32, and the most tokens [places] int32 that should reach it."""

    scores: torch.Tensor
    limits: torch.Tensor


def list_width(budget: int, max_length: int, tile: int) -> int:
    """Columns of a candidate list that hold the limit of every row of at most max_length tokens, in whole tiles."""
    cell = CELL
    while max_length > cell * MOST:
        cell *= 2
    limit = budget + 2 * (SIGMAS * (budget / cell) ** 0.5 + 4) * cell
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


def sample_threshold(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    budget: int,
    first_tokens: int,
    local_tokens: int,
    among_all: bool = False,
) -> Thresholds:
    """A score that a few more than `budget` tokens of each row should reach, and how many at most.

    With n sampled scores of the N tokens between the first first_tokens and the last local_tokens, of which b are to
    be found, it is the (e + d)-th largest sampled score, e = b n / N, d = 5 sqrt(e) + 4, rounded down in its last 14
    bits, and the limit is budget + 2 d tokens a sample; -inf where that is no sample, for rows within the budget and
    for places without a row. It depends on nothing but the row.

    scores [places, >= samples] f32, or with among_all the scores of all tokens, of which the samples are taken; rows
    [places] int32 (-1: none), lengths [M] int32.
    """
    places = rows.shape[0]
    found = Thresholds(scores.new_empty(places), rows.new_empty(places))
    if places:
        held = held_for(scores.shape[1] // CELL if among_all else scores.shape[1])
        sample_threshold_kernel[(places,)](
            scores,
            scores.stride(0),
            rows,
            lengths,
            *found,
            **_search_constants(budget, first_tokens, local_tokens, among_all, held),
            num_warps=HELD[held],
        )
    return found


def held_for(samples: int) -> int:
    """The smallest compiled number of held samples that takes rows of at most `samples`, of which MOST are held."""
    return next(held for held in HELD if min(samples, MOST) <= held)


def _search_constants(
    budget: int, first_tokens: int, local_tokens: int, among_all: bool, held: int
) -> dict[str, int | float]:
    return {
        "BUDGET": budget,
        "FIRST": first_tokens,
        "LOCAL": local_tokens,
        "CELL": CELL,
        "MOST": MOST,
        "HELD": held,
        "SIGMAS": SIGMAS,
        "BITS": BITS,
        "AMONG_ALL": among_all,
    }


def compile_sample_keys():
    """The copy, compiled for sm_90 without a GPU or a launch."""
    kinds = dict.fromkeys(COPIED, "*i32") | {"table_width": "i32", "pages": "*fp8e4nv", "out": "*fp8e4nv"}
    kinds |= {"page_scales": "*fp32", "out_scales": "*fp32"}
    constants = {"CELL": CELL, "PAGE_BYTES": PAGE_BYTES, "KEY_BYTES": KEY_BYTES}
    return compile_sm90(sample_keys_kernel, kinds, constants, {"num_warps": COPY_WARPS})


def compile_sample_threshold(budget: int, first_tokens: int, local_tokens: int, among_all: bool, held: int):
    """The search for one setting and number of held samples, compiled for sm_90 without a GPU or a launch."""
    kinds = dict.fromkeys(SEARCHED, "*i32") | {"score_stride": "i32", "scores": "*fp32", "thresholds": "*fp32"}
    constants = _search_constants(budget, first_tokens, local_tokens, among_all, held)
    return compile_sm90(sample_threshold_kernel, kinds, constants, {"num_warps": HELD[held]})
