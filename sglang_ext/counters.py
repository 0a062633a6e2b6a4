"""Proof of life: how often each mode ran, in which phase and why. Read at /server_info."""

import logging
import threading
from collections import Counter
from collections.abc import Sequence

import torch

from indexer_kernels.params import MODES
from sglang_ext.readback import Readback

logger = logging.getLogger("sglang_ext")


class Counters:
    """Counts forwards, layer calls and rows per (phase, mode, reason), and runs on the device.

    Host counters step when Python runs: under a CUDA graph at capture, not at replay. `device_runs` steps on the GPU
    inside the stage of one layer, so replays count too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._rows: Counter[tuple[str, str, str]] = Counter()
        self._forwards: Counter[tuple[str, str, str]] = Counter()
        self._captured: Counter[tuple[str, str, int]] = Counter()
        self._device_runs: torch.Tensor | None = None
        self._integrity: torch.Tensor | None = None
        self._copies: dict[str, Readback] = {}
        self._beside: torch.cuda.Stream | None = None
        self._traces_written = 0
        self._traces_skipped: Counter[str] = Counter()

    def count(self, phase: str, mode: str, reason: str, rows: int) -> None:
        """One layer's call. The first of a (phase, mode, reason) is logged."""
        key = (phase, mode, reason)
        with self._lock:
            first = key not in self._calls
            self._calls[key] += 1
            self._rows[key] += rows
        if first:
            logger.info("%s runs %s: %s", phase, mode, reason)

    def count_forward(self, phase: str, mode: str, reason: str) -> None:
        """One forward's decision, whatever single layers make of it."""
        with self._lock:
            self._forwards[(phase, mode, reason)] += 1

    def count_capture(self, phase: str, mode: str, rows: int) -> None:
        """One layer's call that a CUDA graph recorded."""
        with self._lock:
            self._captured[(phase, mode, rows)] += 1

    def captured(self, phase: str, modes: Sequence[str]) -> int:
        """Calls of these modes that CUDA graphs recorded."""
        with self._lock:
            return sum(calls for (of, mode, _), calls in self._captured.items() if of == phase and mode in modes)

    def count_trace(self) -> None:
        """One trace written: one layer of one prompt."""
        with self._lock:
            self._traces_written += 1

    def skip_trace(self, reason: str) -> bool:
        """One forward (write_error: one layer) of which no trace is kept; whether it is the first for this reason."""
        with self._lock:
            self._traces_skipped[reason] += 1
            return self._traces_skipped[reason] == 1

    def step_device(self, phase: str, mode: str, device: torch.device) -> None:
        """Add one run on the current stream; call it for one layer of a forward only. Safe under capture once
        prepared.
        """
        runs = self.prepare_device(device)
        runs[_device_index(phase, mode)].add_(1)

    def prepare_device(self, device: torch.device) -> torch.Tensor:
        """The counters' memory, which must exist before a graph is captured."""
        if self._device_runs is None:
            self._device_runs = self._zeros("runs", 2 * len(MODES), device)
        return self._device_runs

    def count_integrity(self, pages: torch.Tensor, mismatches: torch.Tensor) -> None:
        """One comparison of stored means with the keys: device scalars, added without waiting. Safe under capture once
        prepared.
        """
        counted = self.prepare_integrity(pages.device)
        counted[0].add_(pages)
        counted[1].add_(mismatches)

    def prepare_integrity(self, device: torch.device) -> torch.Tensor:
        """The memory of (pages compared, mismatches), which must exist before a graph is captured."""
        if self._integrity is None:
            self._integrity = self._zeros("integrity", 2, device)
        return self._integrity

    def snapshot(self, wait: bool = True) -> dict[str, object]:
        """Plain values. wait: the device's own as of now, which is not for the forward path; else those of the call
        before this one, or a later moment.
        """
        with self._lock:
            calls, rows, captured = dict(self._calls), dict(self._rows), dict(self._captured)
            forwards = dict(self._forwards)
            written, skipped = self._traces_written, dict(self._traces_skipped)
        runs = self._values("runs", self._device_runs, 2 * len(MODES), wait)
        checked, mismatches = self._values("integrity", self._integrity, 2, wait)
        return {
            "forwards": [
                {"phase": phase, "mode": mode, "reason": reason, "forwards": n}
                for (phase, mode, reason), n in sorted(forwards.items())
            ],
            "calls": [
                {"phase": phase, "mode": mode, "reason": reason, "calls": n, "rows": rows[(phase, mode, reason)]}
                for (phase, mode, reason), n in sorted(calls.items())
            ],
            "captured": [
                {"phase": phase, "mode": mode, "rows": num_rows, "calls": n}
                for (phase, mode, num_rows), n in sorted(captured.items())
            ],
            "device_runs": {
                f"{phase}/{mode}": runs[_device_index(phase, mode)]
                for phase in ("prefill", "decode")
                for mode in MODES
                if runs[_device_index(phase, mode)]
            },
            "integrity_checked": checked,
            "integrity_mismatches": mismatches,
            "traces_written": written,
            "traces_skipped": skipped,
            "reserved_mib": torch.cuda.memory_reserved() >> 20 if torch.cuda.is_initialized() else 0,
            "allocated_mib": torch.cuda.memory_allocated() >> 20 if torch.cuda.is_initialized() else 0,
        }

    def _zeros(self, name: str, size: int, device: torch.device) -> torch.Tensor:
        memory = torch.zeros(size, dtype=torch.int64, device=device)
        self._copies[name] = Readback(memory)
        if device.type == "cuda" and self._beside is None:
            self._beside = torch.cuda.Stream(device)
        return memory

    def _values(self, name: str, memory: torch.Tensor | None, size: int, wait: bool) -> list[int]:
        if memory is None:
            return [0] * size
        if wait:
            return memory.tolist()
        # On a stream of its own: single counters only grow, so a copy in the midst of a forward is as good as any.
        with torch.cuda.stream(self._beside):
            self._copies[name].start()
        return self._copies[name].read().tolist()


def _device_index(phase: str, mode: str) -> int:
    return MODES.index(mode) + (len(MODES) if phase == "decode" else 0)
