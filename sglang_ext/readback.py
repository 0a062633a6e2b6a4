"""Small device memory as the host last saw it: copies that nobody waits for."""

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """What of `torch.cuda.Event` is used."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Readback:
    """The last finished copy of a device tensor.

    `start` queues a copy on the current stream, `read` gives the newest that has arrived; neither waits. On a CPU a
    copy arrives at once.
    """

    def __init__(self, source: torch.Tensor, make_event: Callable[[], Event] | None = None) -> None:
        on_gpu = source.device.type == "cuda"
        self._source = source
        self._latest = torch.zeros(source.shape, dtype=source.dtype, device="cpu")
        self._arriving = torch.zeros(source.shape, dtype=source.dtype, device="cpu", pin_memory=on_gpu)
        self._event = (make_event or torch.cuda.Event)() if on_gpu or make_event else None
        self._under_way = False

    def start(self) -> bool:
        """Queue a copy; False, and nothing queued, while an earlier one is under way: it would be overwritten."""
        self._take()
        if self._under_way:
            return False
        self._arriving.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._under_way = True
        return True

    def read(self) -> torch.Tensor:
        """The newest copy that has arrived; zeros before the first. Not to be written to."""
        self._take()
        return self._latest

    def _take(self) -> None:
        if self._under_way and (self._event is None or self._event.query()):
            self._latest = self._arriving.clone()
            self._under_way = False
