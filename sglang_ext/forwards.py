"""What one forward runs: its decision, its rows, and where they are kept between its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from indexer_kernels.row_plan import plan_decode, plan_extend
from sglang_ext import policy
from sglang_ext.policy import Decision
from sglang_ext.runner import Rows, split_tail
from sglang_ext.trace_capture import TracePlan

KEPT = "sglang_ext_forward"  # attribute of SGLang's per-forward metadata


@dataclass(slots=True)
class Forward:
    """What one forward runs, the same for all its layers. parts: (mode, its rows); made_of: what a decode was planned
    from; trace: what is kept of it, if anything; layer: which asked last.
    """

    phase: str
    decision: Decision
    num_rows: int
    parts: tuple[tuple[str, Rows], ...] = ()
    made_of: tuple[torch.Tensor, ...] = ()
    trace: TracePlan | None = None
    layer: int = -1

    def planned_from(self, made_of: tuple[torch.Tensor, ...], num_rows: int) -> bool:
        """Whether this is the plan of a decode over these very tensors."""
        same = len(self.made_of) == len(made_of) and all(a is b for a, b in zip(self.made_of, made_of))
        return same and self.num_rows == num_rows

    def enter(self, layer_id: int) -> None:
        """A decode's layer begins. Layers come in ascending order, so one that is not above the last is the first of
        another forward over the same metadata, as in the runs before a graph's capture and in the capture itself: what
        layers derive from the lengths is then made anew, and recorded.
        """
        if layer_id <= self.layer:
            self.parts = tuple((mode, rows.for_one_forward()) for mode, rows in self.parts)
        self.layer = layer_id


class Prompts(NamedTuple):
    """The requests of a prefill batch: tokens they see, rows they bring, tokens of their whole prompts."""

    seen: tuple[int, ...]
    extend: tuple[int, ...]
    whole: list[int]


def kept_forward(attention: object) -> Forward | None:
    """What an earlier layer of this forward left on SGLang's metadata."""
    return getattr(attention, KEPT, None)


def keep_forward(attention: object, forward: Forward) -> None:
    """Leave it for the forward's other layers. SGLang's metadata is frozen; it sets attributes on it the same way."""
    object.__setattr__(attention, KEPT, forward)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is recording. (SGLang's own flag is set in eager pieces between graphs too.)"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def plan_prefill(
    forward: Forward,
    seen: tuple[int, ...],
    extend: list[int],
    tail_rows: int,
    whole: list[int] | None,
    device: torch.device,
) -> None:
    """Fill in the forward's parts: request r brings extend[r] rows and its last sees seen[r] tokens.

    tail_rows: the last rows of each prompt run native; whole [R]: tokens of the prompts, None where they are not known,
    and then the whole forward runs native with its reason.
    """
    mode = forward.decision.mode
    prefixes = [length - rows for length, rows in zip(seen, extend)]
    if not tail_rows:
        forward.parts = ((mode, Rows(plan_extend(prefixes, extend, device))),)
        return
    if whole is None:
        forward.decision = Decision("native", policy.PROMPT_UNKNOWN)
        return
    body, tail = split_tail(prefixes, extend, whole, tail_rows, device)
    forward.parts = ((mode, body), ("native", tail))


def plan_decode_rows(forward: Forward, lengths: torch.Tensor, page_table: torch.Tensor) -> bool:
    """Fill in a decode's parts; whether they may be kept: SGLang refreshes a graph's metadata in place, so a plan that
    reads the lengths themselves follows every replay.

    A plan made inside a capture would live in that graph's memory, and is not kept.
    """
    plan = plan_decode(lengths, page_table.shape[1])
    forward.parts = ((forward.decision.mode, Rows(plan).for_one_forward()),)
    return plan.row_lengths is lengths and not capturing(lengths.device)


def prompt_lengths(known: Prompts | None, seen: tuple[int, ...], extend: Sequence[int]) -> list[int] | None:
    """Lengths of the whole prompts; None for another forward than that of the batch made last: SGLang's warm-up
    and graph capture serve no request.
    """
    if known is None or known.seen != seen or known.extend != tuple(extend) or len(known.whole) != len(seen):
        return None
    return known.whole
