"""Triton kernel that lists the tokens whose score reaches a threshold. One program lists the candidates of one row.

`bit_list_kernel` does the same from the scan's bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.sample_threshold_kernel import Thresholds

WORDS = 512  # words of 8 tokens per step
NUM_WARPS = 4
DYNAMIC = [
    "scores",
    "score_stride",
    "rows",
    "lengths",
    "thresholds",
    "limits",
    "request",
    "page_table",
    "table_width",
    "positions",
    "slots",
    "counts",
    "unsure",
    "width",
]


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=DYNAMIC)
def candidate_list_kernel(
    scores,  # [places, >= tokens] f32
    score_stride,
    rows,  # [places] int32, the query row of each place or -1
    lengths,  # [M] int32
    thresholds,  # [places] f32
    limits,  # [places] int32, the most candidates a list should have
    request,  # [M] int32
    page_table,  # [R, table_width] int32
    table_width,
    positions,  # [places, width] int32 out: positions in the request
    slots,  # [places, width] int32 out: page id * 64 + position % 64
    counts,  # [places] int32 out: candidates of the row
    unsure,  # [places] int32 out: 1 where the threshold let too few or too many through
    width,
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    WORDS: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place)
    if row < 0:
        tl.store(counts + place, 0)
        tl.store(unsure + place, 0)
        return
    length = tl.load(lengths + row)
    prunes = length > BUDGET
    local = tl.maximum(length - LOCAL, FIRST)
    base = scores + place.to(tl.int64) * score_stride
    table = page_table + tl.load(request + row).to(tl.int64) * table_width
    out = place.to(tl.int64) * width
    every = tl.full((), 0x11111111, tl.uint32)
    written = tl.zeros((), tl.int32)
    for start in range(0, tl.cdiv(length, 8), WORDS):
        word = start + tl.arange(0, WORDS)
        token = word * 8
        inside = token < length
        kept = tl.zeros((WORDS,), tl.uint32) + every
        if prunes:
            key = tl.arange(0, 8)
            seen = (token[:, None] + key[None, :]) < length
            score = tl.load(base + token[:, None] + key[None, :], mask=seen, other=float("-inf"))
            reaches = (score >= tl.load(thresholds + place)).to(tl.int32)
            kept = tl.sum(reaches << (4 * key)[None, :], axis=1).to(tl.uint32, bitcast=True)
        if (start * 8 < FIRST) | ((start + WORDS) * 8 > local):
            forced = tl.zeros((WORDS,), tl.uint32)
            visible = tl.zeros((WORDS,), tl.uint32)
            for k in tl.static_range(8):
                is_forced = (token + k < FIRST) | (token + k >= local)
                forced = forced | (is_forced.to(tl.uint32) << (4 * k))
                visible = visible | ((token + k < length).to(tl.uint32) << (4 * k))
            kept = (kept | forced) & visible
        # Nibble k of the product counts the kept keys 0 .. k of the word.
        running = kept * every
        total = (running >> 28).to(tl.int32)
        before = written + tl.cumsum(total) - total
        slot_of_word = tl.load(table + word // 8, mask=inside, other=0) * 64 + token % 64
        kept = tl.where(before + total <= width, kept, 0)
        for k in tl.static_range(8):
            entry = before + ((running >> (4 * k)) & 15).to(tl.int32) - 1
            chosen = ((kept >> (4 * k)) & 1) == 1
            if WITH_POSITIONS:
                tl.store(positions + out + entry, token + k, mask=chosen)
            tl.store(slots + out + entry, slot_of_word + k, mask=chosen)
        written += tl.sum(total)
    enough = (written >= tl.minimum(length, BUDGET)) & (written <= tl.load(limits + place))
    tl.store(counts + place, tl.minimum(written, width))
    tl.store(unsure + place, tl.where(enough, 0, 1))


class Lists(NamedTuple):
    """Candidate tokens of each place, ascending: positions and cache slots [places, W] int32 (positions None where
    nobody reads them), how many [places] int32, and unsure [places] int32, 1 where the list is not to be used.
    """

    positions: torch.Tensor | None
    slots: torch.Tensor
    counts: torch.Tensor
    unsure: torch.Tensor

    @property
    def written(self) -> tuple[torch.Tensor, ...]:
        """positions, slots and counts as kernels take them: a place that is not written where positions are None."""
        return (self.slots if self.positions is None else self.positions, self.slots, self.counts)

    def part(self, places: slice) -> "Lists":
        positions = None if self.positions is None else self.positions[places]
        return Lists(positions, *(tensor[places] for tensor in self[1:]))


def empty_lists(places: int, width: int, with_positions: bool, device: torch.device) -> Lists:
    slots = torch.empty((places, width), dtype=torch.int32, device=device)
    positions = torch.empty_like(slots) if with_positions else None
    return Lists(positions, slots, slots.new_empty(places), slots.new_empty(places))


def list_candidates(
    scores: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    thresholds: Thresholds,
    request: torch.Tensor,
    page_table: torch.Tensor,
    lists: Lists,
    budget: int,
    first_tokens: int,
    local_tokens: int,
) -> None:
    """Write to `lists` every token that reaches its place's threshold, the first first_tokens and last local_tokens.

    scores [places, >= tokens] f32, rows [places] int32 (-1: none). A row that sees at most `budget` tokens keeps them
    all and its scores are not read. A list is unsure with fewer than budget tokens, or more than its limit.
    """
    if rows.shape[0]:
        candidate_list_kernel[(rows.shape[0],)](
            scores,
            scores.stride(0),
            rows,
            lengths,
            *thresholds,
            request,
            page_table,
            page_table.stride(0),
            *lists.written,
            lists.unsure,
            lists.slots.shape[1],
            **_constants(budget, first_tokens, local_tokens, lists.positions is not None),
            num_warps=NUM_WARPS,
        )


def _constants(budget: int, first_tokens: int, local_tokens: int, with_positions: bool) -> dict[str, int | bool]:
    return {
        "BUDGET": budget,
        "FIRST": first_tokens,
        "LOCAL": local_tokens,
        "WORDS": WORDS,
        "WITH_POSITIONS": with_positions,
    }


def compile_for(budget: int, first_tokens: int, local_tokens: int, with_positions: bool):
    """The variant for one setting, compiled for sm_90 without a GPU or a launch."""
    kinds = dict.fromkeys(DYNAMIC, "*i32") | dict.fromkeys(("score_stride", "table_width", "width"), "i32")
    kinds |= dict.fromkeys(("scores", "thresholds"), "*fp32")
    constants = _constants(budget, first_tokens, local_tokens, with_positions)
    return compile_sm90(candidate_list_kernel, kinds, constants, {"num_warps": NUM_WARPS})
