"""How long sampled work takes on the device: pairs of CUDA events that are asked, never waited for."""

import time
from collections import defaultdict, deque
from typing import NamedTuple

import torch

PENDING = 4096  # pairs that may be under way; more are dropped


class Timed(NamedTuple):
    """What is timed: part "selection" is a mode's own, "shadow" what measuring it costs."""

    phase: str
    mode: str
    part: str


class Mark:
    """A moment on the current stream of a device; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._seconds = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def passed(self) -> bool:
        """Whether the device has come this far."""
        return self._event is None or self._event.query()

    def seconds_since(self, start: "Mark") -> float:
        """Of two marks that have passed."""
        if self._event is None:
            return self._seconds - start._seconds
        return start._event.elapsed_time(self._event) / 1000  # type: ignore[union-attr]


class StageTimes:
    """Sums of seconds per phase, mode and part. One layer's call is one measurement."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Timed, Mark, Mark]] = deque()
        self._totals: dict[Timed, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self.dropped = 0

    def add(self, timed: Timed, start: Mark, end: Mark) -> None:
        """Two marks of one stream, in their order."""
        if len(self._pending) >= PENDING:
            self.dropped += 1
            return
        self._pending.append((timed, start, end))

    def read(self) -> dict[Timed, tuple[int, float]]:
        """(measurements, their seconds) of those that are over."""
        while self._pending and self._pending[0][2].passed():
            timed, start, end = self._pending.popleft()
            number, seconds = self._totals[timed]
            self._totals[timed] = (number + 1, seconds + end.seconds_since(start))
        return dict(self._totals)
