"""Takes a layer back to native where the overlap that shadow sampling measures stays too low."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_ext.overlap import Key, Total

logger = logging.getLogger("sglang_ext")

POLL_EVERY = 32  # batches between two looks at the totals: what the ranks agree on costs a message between them

Agree = Callable[[list[Key]], list[Key]]  # what one rank has found -> what all ranks act on


class Guard:
    """Judges each phase, mode and layer over windows of at least `min_rows` measured rows.

    A window whose mean overlap is under `threshold` ends in native, until the server restarts; any other is followed by
    a new one. native: what has been taken back.
    """

    def __init__(self, threshold: float, min_rows: int) -> None:
        self.threshold, self.min_rows = threshold, min_rows
        self.native: set[Key] = set()
        self._begun: dict[Key, Total] = {}
        self._batches = 0

    def poll(self, read: Callable[[], Mapping[Key, Total]], agree: Agree) -> None:
        """Called at every batch, on every rank alike, whatever the batch runs: each POLL_EVERY-th time the ranks agree.

        Ranks must change together, and their own totals may differ by a tie of scores, or arrive at another time.
        """
        self._batches += 1
        if self._batches % POLL_EVERY:
            return
        totals = read()
        for key in agree(self.judge(totals)):
            self.native.add(key)
            seen = totals.get(key)
            mean = f"{seen.mean:.4f} of {seen.rows} rows in all" if seen else "not known on this rank"
            logger.warning(
                "guard: layer %d returns to native in %s: the overlap of %s was under guard_overlap=%g (%s)",
                key.layer,
                key.phase,
                key.mode,
                self.threshold,
                mean,
            )

    def judge(self, totals: Mapping[Key, Total]) -> list[Key]:
        """What has fallen under the threshold in the window that ends here; windows that are long enough end here."""
        fallen = []
        for key, total in totals.items():
            begun = self._begun.get(key)
            rows = total.rows - (begun.rows if begun else 0)
            if key in self.native or rows < self.min_rows:
                continue
            if (total.overlap - (begun.overlap if begun else 0.0)) / rows < self.threshold:
                fallen.append(key)
            self._begun[key] = total
        return fallen


def agree_in(group: Any, source: int, fallen: list[Key]) -> list[Key]:
    """What rank `source` has found, on every rank of a torch.distributed group of CPU tensors. All must call it."""
    message = [fallen]
    torch.distributed.broadcast_object_list(message, src=source, group=group)
    return message[0]
