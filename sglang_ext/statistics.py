"""Stored block statistics of SGLang's key pools: mean keys by physical page, kept right at every write. No SGLang here.

What is written: every extend computes the means of all full pages of its requests, prefix included, so a page that came
from the radix cache, from a host or from an evicted request is right from then on. Every decode step computes, per row,
the last full page it sees. With several rows per request (target-verify, draft-extend) the rows of a step see s+1 ..
s+n tokens, n of them just written, so each page that a step filled is the last full page of exactly one of its rows.
A page that holds rejected draft tokens contains positions from the next s on: the step that rewrites the last of them
sees the page as a row's last full page again, and until then no row's length covers the page. So every page that is
full for a row has the mean of the keys it holds, however many drafts were rejected on the way.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from indexer_kernels.page_layout import PAGE_BYTES
from indexer_kernels.page_means import (
    check_page_means,
    page_mean_buffer,
    update_last_page_means,
    update_page_means,
)
from sglang_ext import policy
from sglang_ext.counters import Counters

logger = logging.getLogger("sglang_ext")

Result = TypeVar("Result")

BYTES_PER_TOKEN = 4  # per layer: 128 bf16 for a page of 64 tokens


class PoolStatistics:
    """The means of one pool's pages, a buffer per layer that has index keys.

    keys: the pool's index-key buffers [pages, ..] uint8 in layer order, 0 rows where a layer has none; start_layer: the
    id of the first. Buffers are never moved, so graphs may be captured over them.
    """

    def __init__(self, keys: Sequence[torch.Tensor], start_layer: int) -> None:
        self.start_layer = start_layer
        self.means = [page_mean_buffer(buffer.numel() // PAGE_BYTES, buffer.device) for buffer in keys]

    def of_layer(self, layer_id: int) -> torch.Tensor:
        """bf16 [pages, 128] of a layer."""
        return self.means[layer_id - self.start_layer]

    def layers(self) -> list[int]:
        """Ids of the layers that have index keys."""
        return [self.start_layer + place for place, means in enumerate(self.means) if len(means)]

    def status(self) -> dict[str, int]:
        return {
            "layers": len(self.layers()),
            "pages": max((len(means) for means in self.means), default=0),
            "bytes": sum(means.nbytes for means in self.means),
        }


class Statistics:
    """The statistics of all pools of this process: the served model's, then draft models'."""

    def __init__(self) -> None:
        self._caches: list[tuple[weakref.ref[Any], weakref.ref[PoolStatistics]]] = []

    def allocate(self, cache: object, keys: Sequence[torch.Tensor], start_layer: int) -> PoolStatistics:
        """Memory for the means of a cache's keys, which must exist before a graph is captured.

        Nothing is kept alive here: the caller leaves it on the cache.
        """
        pool = PoolStatistics(keys, start_layer)
        self._caches.append((weakref.ref(cache), weakref.ref(pool)))
        logger.warning("block statistics %s: %s", pool.status(), policy.BY_BLOCKS)
        return pool

    def caches(self) -> list[tuple[Any, PoolStatistics]]:
        """Those that live, with their caches."""
        found = [(cache(), pool()) for cache, pool in self._caches]
        return [(cache, pool) for cache, pool in found if cache is not None and pool is not None]

    def is_served_models(self, pool: PoolStatistics) -> bool:
        """Whether it is the first pool, which the served model has; draft models' follow."""
        return any(first is pool for _, first in self.caches()[:1])

    def status(self) -> list[dict[str, int]]:
        """Plain values for /server_info, one of each pool."""
        return [pool.status() for _, pool in self.caches()]


def fill(
    means: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    checks: Counters | None = None,
    trusted: torch.Tensor | None = None,
) -> None:
    """The means of all full pages of requests: k_pages [P, 8448], page_table [R, W], lengths [R] int32.

    checks: where to count what a comparison with the keys finds, of the first `trusted` [R] int32 tokens of each
    request before anything is written (they must be right already), and of all afterwards.
    """
    if checks is not None and trusted is not None:
        _check(checks, means, k_pages, page_table, trusted)
    update_page_means(k_pages, page_table, lengths, means)
    if checks is not None:
        _check(checks, means, k_pages, page_table, lengths)


def step(
    means: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    row_lengths: torch.Tensor,
    checks: Counters | None = None,
) -> None:
    """The means that a decode step may have changed: page_table [M, W], row_lengths [M] int32. May be captured."""
    update_last_page_means(k_pages, page_table, row_lengths, means)
    if checks is not None:
        _check(checks, means, k_pages, page_table, row_lengths)


def check_no_graph_reads(captured: int) -> None:
    """RuntimeError where CUDA graphs have captured selections that read statistics, which are wrong from now on."""
    if captured:
        raise RuntimeError(
            "sglang-ext: a decode step could not be followed by the block statistics (statistics_lost), and "
            f"{captured} selections in captured CUDA graphs read them; decode_mode=native serves these arguments"
        )


def _check(
    checks: Counters, means: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor
) -> None:
    checks.count_integrity((lengths // 64).sum(), check_page_means(k_pages, page_table, lengths, means))


def beside(device: torch.device, update: Callable[[], None], work: Callable[[], Result]) -> Result:
    """work(), which does not read what update() writes: on a GPU the update runs next to it on a stream of its own.

    A captured graph records two branches that join again, so the update costs native decode no time of its own.
    """
    if device.type != "cuda":
        update()
        return work()
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        update()
    result = work()
    main.wait_stream(side)
    return result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
