"""Compiles every kernel for sm_90a, with or without a GPU, and says what the compiler said."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from indexer_kernels.gpu import (
    block_means_kernel,
    block_score_kernel,
    head_route_kernel,
    page_select_kernel,
    routed_pack_kernel,
    routed_scores_kernel,
    token_rerank_kernel,
    token_select_kernel,
)
from indexer_kernels.params import IndexerParams

H200_SMS = 132
GPU_MODES = ("misa", "misa_rerank", "hisa")


class Compiled(NamedTuple):
    """One kernel: its name and the error that stopped its compilation, None when it compiled."""

    name: str
    error: str | None


def kernel_builders(params: IndexerParams, num_heads: int, modes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What `modes` need with one setting and model shape, by name."""
    active, route_block = params.active_heads, params.route_block
    builders: dict[str, Callable[[], object]] = {}
    if "misa" in modes or "misa_rerank" in modes:
        builders[f"block_means {route_block}"] = lambda: block_means_kernel.build(route_block // 64)
        builders[f"head_route H={num_heads}"] = lambda: head_route_kernel.build(
            num_heads, active, route_block, params.route_statistic
        )
        builders[f"routed_pack H={num_heads}"] = lambda: routed_pack_kernel.build(num_heads, active)
    if "misa" in modes:
        builders["routed_scores token"] = lambda: routed_scores_kernel.build(active, False, H200_SMS)
    if "misa_rerank" in modes and params.candidate_unit == "token":
        builders["routed_scores token"] = lambda: routed_scores_kernel.build(active, False, H200_SMS)
        builders["token_select"] = lambda: token_select_kernel.compile_for(params.candidates, params.local_tokens)
        builders[f"token_rerank H={num_heads}"] = lambda: token_rerank_kernel.compile_for(num_heads, params.candidates)
    elif "misa_rerank" in modes:
        builders["routed_scores page"] = lambda: routed_scores_kernel.build(active, True, H200_SMS)
        builders |= _select_builders("page_select", params.candidates // 64, 1, 4, params.local_tokens)
    if "hisa" in modes:
        builders[f"block_means {params.block_size}"] = lambda: block_means_kernel.build(params.block_size // 64)
        builders[f"block_score H={num_heads}"] = lambda: block_score_kernel.build(num_heads, params.block_size)
        unit_pages = params.block_size // 64
        builders |= _select_builders("block_select", params.top_blocks, unit_pages, 1, params.local_tokens)
    return builders


def _select_builders(
    name: str, budget: int, unit_pages: int, values: int, local_tokens: int
) -> dict[str, Callable[[], object]]:
    """One variant for each capacity that some context needs: a longer prompt must not wait for a compiler."""
    compile_for = functools.partial(page_select_kernel.compile_for, budget, unit_pages, values, local_tokens)
    longest = page_select_kernel.CAPACITIES[-1] // unit_pages
    return {
        f"{name} {capacity}": functools.partial(compile_for, capacity)
        for capacity in page_select_kernel.CAPACITIES
        if capacity <= page_select_kernel.capacity_for(longest)
    }


def compile_all(
    params: IndexerParams | None = None, num_heads: int = 64, modes: Sequence[str] = GPU_MODES
) -> Iterator[Compiled]:
    """Compile each kernel of `modes` in turn (seconds each when nothing is cached) and yield its outcome."""
    for name, build in kernel_builders(params or IndexerParams(), num_heads, modes).items():
        try:
            build()
        except Exception as error:  # the compilers raise types of their own; the caller reports every one of them
            yield Compiled(name, f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}")
        else:
            yield Compiled(name, None)
