"""How much of native's selection a mode finds, row by row, summed up on the device."""

from typing import NamedTuple

import torch

from sglang_ext.readback import Readback

# Upper bounds of the histogram over rows; a row of 2048 tokens that misses two is at 0.999.
BOUNDS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
SLOTS = 1024  # (phase, mode, layer) that can be told apart: the memory exists before it is needed


class Key(NamedTuple):
    """What is measured."""

    phase: str
    mode: str
    layer: int


class Total(NamedTuple):
    """Rows measured, the sum of their overlaps, and how many of them reach at most each of BOUNDS."""

    rows: int
    overlap: float
    at_most: tuple[int, ...]

    @property
    def mean(self) -> float:
        return self.overlap / self.rows if self.rows else 1.0


def row_overlap(ours: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
    """|ours & native| / |native| of each row: float64 [S], `recall` of scripts/eval_recall.py.

    ours, native [S, K] int32: entries of a row are distinct, -1 is none; entries mean the same in both. A row for which
    native has nothing is 1. Nothing is read back.
    """
    found = native.sort(dim=1).values
    place = torch.searchsorted(found, ours.contiguous()).clamp_(max=found.shape[1] - 1)
    both = (found.gather(1, place) == ours) & (ours >= 0)
    wanted = (native >= 0).sum(1)
    return (both.sum(1) / wanted.clamp_min(1)).double().masked_fill(wanted == 0, 1.0)


class Overlaps:
    """Totals per phase, mode and layer in device memory, and their copies on the host."""

    def __init__(self) -> None:
        self._slots: dict[Key, int] = {}
        self._cells: torch.Tensor | None = None
        self._copy: Readback | None = None
        self._changed = False

    def prepare(self, device: torch.device) -> torch.Tensor:
        """The memory [SLOTS, 2 + bounds] float64; pinned memory is best allocated before serving starts."""
        if self._cells is None:
            self._cells = torch.zeros((SLOTS, 2 + len(BOUNDS)), dtype=torch.float64, device=device)
            self._bounds = torch.tensor(BOUNDS, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
            self._copy = Readback(self._cells)
        return self._cells

    def add(self, key: Key, overlap: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Rows of one layer: overlap [S] float64; counts [S] bool: rows that say something, None: all.

        Raises RuntimeError for a kind of rows more than SLOTS.
        """
        cells = self.prepare(overlap.device)
        if key not in self._slots and len(self._slots) == SLOTS:
            raise RuntimeError(
                f"no memory for the overlap of {key}: there are {SLOTS} phases, modes and layers already"
            )
        slot = self._slots.setdefault(key, len(self._slots))
        rows = torch.ones_like(overlap) if counts is None else counts.double()
        at_most = (overlap[:, None] <= self._bounds) * rows[:, None]
        cells[slot] += torch.cat([torch.stack([rows, overlap * rows], 1), at_most], 1).sum(0)
        self._changed = True

    def send(self) -> None:
        """Queue a copy to the host on the current stream, if anything has changed since the last one."""
        if self._changed and self._copy is not None and self._copy.start():
            self._changed = False

    def read(self, wait: bool = False) -> dict[Key, Total]:
        """Totals as of the last copy that has arrived; wait: as of now, after waiting for the device."""
        if self._cells is None or self._copy is None:
            return {}
        cells = (self._cells.cpu() if wait else self._copy.read()).tolist()
        totals = {}
        for key, slot in self._slots.items():
            rows, overlap, *at_most = cells[slot]
            if rows:
                totals[key] = Total(int(rows), overlap, tuple(int(count) for count in at_most))
        return totals
