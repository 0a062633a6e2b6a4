"""Compiles every kernel for sm_90a, with or without a GPU, and says what the compiler said."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch

from indexer_kernels.gpu import (
    bit_list_kernel,
    block_score_kernel,
    candidate_counts_kernel,
    decode_scores_kernel,
    group_proxy_kernel,
    group_rerank_kernel,
    group_scan_kernel,
    head_route_kernel,
    page_means_kernel,
    page_select_kernel,
    rescan_kernel,
    routed_pack_kernel,
    routed_scores_kernel,
    sample_kernel,
    sample_threshold_kernel,
    token_scores_kernel,
)
from indexer_kernels.gpu.parallel_build import InCallersThread, build_all
from indexer_kernels.gpu.work import num_sms
from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.params import IndexerParams
from indexer_kernels.row_plan import TILE_ROWS

H200_SMS = 132  # what a scan is compiled for where no GPU says how many it has
GPU_MODES = ("misa", "misa_rerank", "hisa", "group_rerank")


Wanted = tuple[str, IndexerParams]  # a mode and its parameters


class Compiled(NamedTuple):
    """One kernel: its name and the error that stopped its compilation, None when it compiled."""

    name: str
    error: str | None


def kernel_builders(params: IndexerParams, num_heads: int, modes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What `modes` need with one setting and model shape, by name."""
    active, route_block = params.active_heads, params.route_block
    builders: dict[str, Callable[[], object]] = {}
    if "misa" in modes or "misa_rerank" in modes:
        builders[f"block_means {route_block}"] = partial(page_means_kernel.compile_blocks, route_block // 64, False)
        builders[f"head_route H={num_heads}"] = partial(
            head_route_kernel.build, num_heads, active, route_block, params.route_statistic
        )
        builders[f"routed_pack H={num_heads}"] = partial(routed_pack_kernel.build, num_heads, active)
    if "misa" in modes:
        builders |= _token_builders("misa", params.top_k, (0, 0), num_heads, active)
    if "misa_rerank" in modes and params.candidate_unit == "page":
        builders["routed_scores maxima"] = partial(_build_scan, routed_scores_kernel.build, active, "maxima")
        builders |= _select_builders("page_select", params.candidates // 64, 1, 4, params.local_tokens)
    elif "misa_rerank" in modes:
        forced = (PAGE_TOKENS, params.local_tokens)
        builders |= _token_builders("misa_rerank", params.candidates, forced, num_heads, active)
    if "hisa" in modes:
        builders |= {
            f"block_means {params.block_size}{' stored' if stored else ''}": partial(
                page_means_kernel.compile_blocks, params.block_size // 64, stored
            )
            for stored in (False, True)
        }
        builders[f"block_score H={num_heads}"] = partial(block_score_kernel.build, num_heads, params.block_size)
    if "group_rerank" in modes:
        builders |= _group_builders(params, num_heads)
    if "misa_rerank" in modes or "hisa" in modes:
        builders |= _decode_builders(params, num_heads, modes)
    by_pages = "misa_rerank" in modes and params.candidate_unit == "page"
    if torch.cuda.is_available() and (by_pages or "hisa" in modes or "native" in modes):
        builders["DeepGEMM schedulers"] = InCallersThread(_compile_schedulers, num_heads)
    return builders


def _decode_builders(params: IndexerParams, num_heads: int, modes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Page means, and decode from them; none for a block size that decode cannot serve, which it then refuses."""
    builders: dict[str, Callable[[], object]] = {
        "page_means": partial(page_means_kernel.compile_update, False, False),
        "page_means from a page": partial(page_means_kernel.compile_update, False, True),
        "page_means of last pages": partial(page_means_kernel.compile_update, True, False),
        "page_means check": page_means_kernel.compile_check,
    }
    if params.block_size % 64:
        return builders
    builders["candidate_counts"] = partial(candidate_counts_kernel.compile_counts, params)
    if "misa_rerank" in modes:
        builders["route_statistics"] = partial(decode_scores_kernel.compile_statistics, num_heads, params)
    for mode, update in (("misa_rerank", False), ("hisa", False), ("hisa", True)):
        if mode in modes and (not update or decode_scores_kernel.update_is_apart(params)):
            builders[f"{mode} decode_scores{' and update' if update else ''}"] = partial(
                decode_scores_kernel.compile_scores, num_heads, params, mode == "misa_rerank", update
            )
    return builders | _select_builders(
        "block_select", params.top_blocks, params.block_size // 64, 1, params.local_tokens
    )


def _build_scan(build: Callable[..., object], *setting: int | str) -> object:
    """A scan is compiled for the number of SMs: another Hopper than an H200 has another."""
    return build(*setting, num_sms(torch.device("cuda")) if torch.cuda.is_available() else H200_SMS)


def _compile_schedulers(num_heads: int) -> None:
    """DeepGEMM compiles at a call, which needs a GPU."""
    from indexer_kernels.gpu.deep_gemm_logits import compile_schedulers

    compile_schedulers(num_heads)


def _group_builders(params: IndexerParams, num_heads: int) -> dict[str, Callable[[], object]]:
    """The group's size in prefill, single rows in decode; positions for `select_rows`, slots for a server."""
    budget, group, forced = params.candidates, params.group, (PAGE_TOKENS, params.local_tokens)
    builders: dict[str, Callable[[], object]] = {
        f"group_scan {form}": partial(_build_scan, group_scan_kernel.build, num_heads, form)
        for form in ("scores", "mask")
    }
    builders |= _sample_builders("group", budget, forced)
    builders["group rescan_scores"] = partial(rescan_kernel.compile_scores, num_heads, True)
    for positions in (False, True):
        name = "position" if positions else "slot"
        builders |= {
            f"group candidate_list {name}": partial(bit_list_kernel.build, TILE_ROWS, budget, *forced, positions, True),
            f"group rescan_choice {name}": partial(
                rescan_kernel.compile_choice, num_heads, budget, *forced, positions, True
            ),
        }
    for rows in sorted({1, group}):
        builders[f"group_proxies {rows}"] = partial(group_proxy_kernel.compile_for, rows)
        builders[f"token_scores {rows} H={num_heads}"] = partial(token_scores_kernel.build, num_heads, rows)
        for slots in (False, True):
            name = f"group_pick {rows} {'slot' if slots else 'position'}"
            builders[name] = partial(group_rerank_kernel.compile_pick_for, rows, slots)
    return builders


def _token_builders(
    mode: str, budget: int, forced: tuple[int, int], num_heads: int, active: int
) -> dict[str, Callable[[], object]]:
    """Slots for a server, and positions for `select_rows` and where SGLang asks for them: topk_transform_method RAGGED,
    top-k that is not fused.
    """
    builders: dict[str, Callable[[], object]] = {
        f"routed_scores {form}": partial(_build_scan, routed_scores_kernel.build, active, form)
        for form in ("scores", "mask")
    }
    builders |= _sample_builders(mode, budget, forced)
    builders["rescan_scores"] = partial(rescan_kernel.compile_scores, active)
    for positions in (False, True):
        name = "position" if positions else "slot"
        builders |= {
            f"{mode} candidate_list {name}": partial(
                bit_list_kernel.build, routed_scores_kernel.unit_rows(active), budget, *forced, positions, False
            ),
            f"{mode} rescan_choice {name}": partial(rescan_kernel.compile_choice, active, budget, *forced, positions),
        }
    builders[f"{mode} token_scores"] = partial(token_scores_kernel.build, active if mode == "misa" else num_heads, 1)
    return builders


def _sample_builders(mode: str, budget: int, forced: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Thresholds from a sample, a variant for each number of samples that some context needs, and what finds the lists
    that they did not get right.
    """
    compile_for = partial(sample_threshold_kernel.build_for, budget, *forced)
    builders: dict[str, Callable[[], object]] = {
        f"{mode} sample_threshold {held}": partial(compile_for, held) for held in sample_threshold_kernel.HELD
    }
    builders["sample_keys"] = sample_kernel.compile_sample_keys
    builders["rescan_gather"] = rescan_kernel.compile_gather
    return builders


def _select_builders(
    name: str, budget: int, unit_pages: int, values: int, local_tokens: int
) -> dict[str, Callable[[], object]]:
    """One variant for each capacity that some context needs: a longer prompt must not wait for a compiler."""
    compile_for = partial(page_select_kernel.compile_for, budget, unit_pages, values, local_tokens)
    longest = page_select_kernel.CAPACITIES[-1] // unit_pages
    return {
        f"{name} {capacity}": partial(compile_for, capacity)
        for capacity in page_select_kernel.CAPACITIES
        if capacity <= page_select_kernel.capacity_for(longest)
    }


def compile_all(
    params: IndexerParams | None = None,
    num_heads: int = 64,
    modes: Sequence[str] = GPU_MODES,
    workers: int | None = None,
) -> Iterator[Compiled]:
    """Compile the kernels of `modes` (seconds each when nothing is cached) and yield each one's outcome, in order.

    workers: see `build_all`, as for Raises.
    """
    builders = kernel_builders(params or IndexerParams(), num_heads, modes)
    with closing(build_all(list(builders.values()), workers)) as outcomes:
        yield from map(Compiled, builders, outcomes)


def compile_each(wanted: Sequence[Wanted], num_heads: int, workers: int | None = None) -> Iterator[list[Compiled]]:
    """`compile_all` of several modes with their own parameters, at once: the outcomes of each, in order.

    What several of them run is compiled once, and its error is told of each.
    """
    builders = [kernel_builders(params, num_heads, (mode,)) for mode, params in wanted]
    with closing(build_all([builder for of_one in builders for builder in of_one.values()], workers)) as outcomes:
        for of_one in builders:
            yield [Compiled(name, next(outcomes)) for name in of_one]
