"""Builds many kernels at once. nvcc is a process, and TVM's and Triton's passes run without Python's lock."""

import functools
import os
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

MOST_WORKERS = 8  # of each rank: a compiler holds up to 450 MB, and an eighth of a start's compilations is seconds
Builder = Callable[[], object]


class InCallersThread(functools.partial):
    """A builder that must not move to a worker: it launches kernels, or is not known to bear other threads."""


def default_workers() -> int:
    """min(8, CPUs)."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


def build_all(builders: Sequence[Builder], workers: int | None = None) -> Generator[str | None, None, None]:
    """Call every builder and yield, in order, what went wrong: the error's type and last line, or None.

    workers: threads that build, `default_workers` if None; 1 builds each when its outcome is asked for, in the caller's
    thread. Equal builders (partials of one function with equal arguments) are called once. `InCallersThread` builders
    run where the caller is, when their turn comes. An iterator that is closed early builds nothing that had not begun.

    Threads inherit neither torch's current device nor its default one: workers take over the caller's current device,
    and builders name the device of every tensor they make. Raises ValueError for workers < 1.
    """
    count = default_workers() if workers is None else workers
    if count < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if count == 1:
        outcomes: dict[Hashable, str | None] = {}
        for builder in builders:
            name = _name(builder)
            if name not in outcomes:
                outcomes[name] = _attempt(builder)
            yield outcomes[name]
        return
    pool = ThreadPoolExecutor(count, "build-kernels", *_device_of_caller())
    try:
        building: dict[Hashable, Future[str | None]] = {}
        for builder in builders:
            name = _name(builder)
            if name not in building:
                later: Future[str | None] = Future()
                building[name] = later if isinstance(builder, InCallersThread) else pool.submit(_attempt, builder)
        for builder in builders:
            outcome = building[_name(builder)]
            if isinstance(builder, InCallersThread) and not outcome.done():
                outcome.set_result(_attempt(builder))
            yield outcome.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(builder: Builder) -> str | None:
    try:
        builder()
    except Exception as error:  # the compilers raise types of their own; the caller reports every one of them
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
    return None


def _name(builder: Builder) -> Hashable:
    """Equal for builders that build the same kernel."""
    if isinstance(builder, functools.partial):
        return builder.func, builder.args, tuple(sorted(builder.keywords.items()))
    return builder


def _device_of_caller() -> tuple[Any, ...]:
    """A pool's initializer and its arguments: workers start on device 0, another rank's."""
    if not torch.cuda.is_available():
        return ()
    return torch.cuda.set_device, (torch.cuda.current_device(),)
