"""What makes builders safe to call from several threads: one thread builds a kernel, the others wait for it."""

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Build = TypeVar("Build", bound=Callable[..., Any])
_guard = threading.Lock()
_locks: dict[Hashable, threading.Lock] = {}


def lock_of(kernel: Hashable) -> threading.Lock:
    """The lock of one kernel, which names it with all that it is compiled for."""
    with _guard:
        return _locks.setdefault(kernel, threading.Lock())


def build_once(build: Build) -> Build:
    """`functools.cache` whose misses wait for each other: it alone would let two threads build the same kernel.

    Every launch asks for its kernel: once it is there, nothing is locked. A build that fails is tried again at the
    next call.
    """
    built = functools.cache(build)

    @functools.wraps(build)
    def alone(*setting: Hashable) -> Any:
        with lock_of((build, setting)):
            return built(*setting)

    return functools.cache(alone)  # type: ignore[return-value]
