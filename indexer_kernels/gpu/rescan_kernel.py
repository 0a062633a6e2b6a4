"""Triton kernels for the rows whose sample misled: all tokens are scored again and the best are kept exactly.

How many rows that are is known on the device alone. So their lists are gathered first; then many programs score the
first of them, a stretch each, and one program chooses the candidates of a row. Lists beyond those whose scores can be
held are scored by that one program itself.
"""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.group_proxy_kernel import proxy_column
from indexer_kernels.gpu.keep_best_kernel import choice_constants, keep_best
from indexer_kernels.gpu.lists import Lists
from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES

TILE = 128  # keys of one product
STRETCH = 2048  # keys of one program
LEAST_HEADS = 16  # columns of one product, of which only the active heads count: the least of a tensor core
LISTS = 4096  # lists looked at in one step
NUM_WARPS = 8
KEYS = ["places", "keys", "scales", "rows", "lengths", "request", "page_table", "table_width"]
GATHERED = ["unsure", "num_lists", "wanted"]
SCORED = ["q", "gate", *KEYS, "wanted", "scratch", "scratch_stride"]
CHOSEN = [*SCORED, "num_lists", "positions", "slots", "counts", "width"]


@triton.jit(do_not_specialize=GATHERED, do_not_specialize_on_alignment=GATHERED)
def gather_unsure_kernel(
    unsure,  # [lists] int32
    num_lists,
    wanted,  # [lists] int32 out: the unsure lists in their order, then -1
    LISTS: tl.constexpr,
):
    written = tl.zeros((), tl.int32)
    for start in range(0, num_lists, LISTS):
        index = start + tl.arange(0, LISTS)
        is_unsure = tl.load(unsure + index, mask=index < num_lists, other=0)
        tl.store(wanted + index, -1, mask=index < num_lists)
        tl.debug_barrier()  # before another thread stores to the same word; entries go to the front, never past here
        slot = written + tl.cumsum(is_unsure) - 1
        tl.store(wanted + slot, index, mask=is_unsure != 0)
        written += tl.sum(is_unsure)


@triton.jit
def packed_head(place, head, ACTIVE: tl.constexpr, PROXIES: tl.constexpr):
    """Where the scan's queries have head `head` of a place: routed ones as (tile, group of 8 rows, head, row)."""
    if PROXIES:
        return proxy_column(place, head, ACTIVE)
    return (place // 8 * ACTIVE + head).to(tl.int64) * 8 + place % 8


@triton.jit
def _score(
    base,
    first,
    stop,
    place,
    q,
    gate,
    keys,
    scales,
    table,
    ACTIVE: tl.constexpr,
    PROXIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    """The scan's scores of the tokens [first, stop), by the heads packed at `place`, to base + token."""
    dim = tl.arange(0, DIM)
    head = tl.arange(0, HEADS)
    packed = packed_head(place, head, ACTIVE, PROXIES)
    active = head < ACTIVE
    query = tl.load(q + packed[:, None] * DIM + dim[None, :], mask=active[:, None], other=0.0)
    weight = tl.load(gate + packed, mask=active, other=0.0)
    for start in range(first, stop, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < stop
        page = tl.load(table + token // 64, mask=inside, other=0).to(tl.int64)
        source = page * PAGE_BYTES + token % 64 * DIM
        key = tl.load(keys + source[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        scale = tl.load(scales + page * (PAGE_BYTES // 4) + KEY_BYTES // 4 + token % 64, mask=inside, other=0.0)
        products = tl.dot(key, tl.trans(query))
        score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1) * scale
        tl.store(base + token, score, mask=inside)


@triton.jit(do_not_specialize=SCORED, do_not_specialize_on_alignment=SCORED)
def rescan_scores_kernel(
    q,  # [places * ACTIVE, DIM] fp8, packed
    gate,  # [places * ACTIVE] f32, packed
    places,  # [lists] int32, where q and gate have each list's
    keys,  # the cache's bytes as fp8
    scales,  # the cache's bytes as f32
    rows,  # [lists] int32, the query row of each or -1
    lengths,  # [M] int32
    request,  # [M] int32
    page_table,  # [R, table_width] int32
    table_width,
    wanted,  # [lists] int32, the unsure ones, then -1
    scratch,  # [programs, >= tokens] f32 out
    scratch_stride,
    STRETCH: tl.constexpr,
    ACTIVE: tl.constexpr,
    PROXIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    index = tl.load(wanted + tl.program_id(1))
    if index < 0:
        return
    row = tl.load(rows + index)
    place = tl.load(places + index)
    first = tl.program_id(0) * STRETCH
    stop = tl.minimum(tl.load(lengths + row), first + STRETCH)
    table = page_table + tl.load(request + row).to(tl.int64) * table_width
    base = scratch + tl.program_id(1).to(tl.int64) * scratch_stride
    _score(
        base,
        first,
        stop,
        place,
        q,
        gate,
        keys,
        scales,
        table,
        ACTIVE,
        PROXIES,
        HEADS,
        DIM,
        TILE,
        PAGE_BYTES,
        KEY_BYTES,
    )


@triton.jit(do_not_specialize=CHOSEN, do_not_specialize_on_alignment=CHOSEN)
def rescan_choice_kernel(
    q,
    gate,
    places,
    keys,
    scales,
    rows,
    lengths,
    request,
    page_table,
    table_width,
    wanted,
    scratch,  # [programs, >= tokens] f32: scores of the first `programs` unsure lists
    scratch_stride,
    num_lists,
    positions,  # [lists, width] int32 out
    slots,  # [lists, width] int32 out
    counts,  # [lists] int32 out
    width,
    BUDGET: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_POSITIONS: tl.constexpr,
    ACTIVE: tl.constexpr,
    PROXIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    base = scratch + tl.program_id(0).to(tl.int64) * scratch_stride
    for turn in range(tl.program_id(0), num_lists, tl.num_programs(0)):
        index = tl.load(wanted + turn)
        if index >= 0:
            row = tl.load(rows + index)
            length = tl.load(lengths + row)
            table = page_table + tl.load(request + row).to(tl.int64) * table_width
            if turn >= tl.num_programs(0):
                tl.debug_barrier()
                _score(
                    base,
                    0,
                    length,
                    tl.load(places + index),
                    q,
                    gate,
                    keys,
                    scales,
                    table,
                    ACTIVE,
                    PROXIES,
                    HEADS,
                    DIM,
                    TILE,
                    PAGE_BYTES,
                    KEY_BYTES,
                )
                tl.debug_barrier()  # scores are read back by other threads than wrote them
            out = index.to(tl.int64) * width
            keep_best(
                base,
                length,
                table,
                positions + out,
                slots + out,
                counts + index,
                BUDGET,
                FIRST,
                LOCAL,
                BLOCK,
                WITH_POSITIONS,
            )


def rescan(
    packed_q: torch.Tensor,
    packed_gate: torch.Tensor,
    active_heads: int,
    proxies: bool,
    places: torch.Tensor,
    k_pages: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    request: torch.Tensor,
    page_table: torch.Tensor,
    max_length: int,
    lists: Lists,
    budget: int,
    first_tokens: int,
    local_tokens: int,
    programs: int,
) -> None:
    """Replace each unsure list by its row's exact candidates by the scan's scores, as `keep_best` chooses them.

    packed_q [>= places * A, 128] fp8 and packed_gate [>= places * A] f32 as `routed_pack_kernel` lays them out or, with
    proxies, `group_proxy_kernel`; k_pages [P, 8448] uint8. List i belongs to row rows[i], whose A heads are packed at
    places[i]; both [lists] int32. `programs` rows of max_length scores are held.
    """
    num_lists = rows.shape[0]
    if num_lists == 0:
        return
    programs = min(programs, num_lists)
    wanted = torch.empty_like(rows)
    gather_unsure_kernel[(1,)](lists.unsure, num_lists, wanted, LISTS=LISTS, num_warps=NUM_WARPS)
    scratch = torch.empty((programs, -(-max_length // 4) * 4), dtype=torch.float32, device=k_pages.device)
    constants = _score_constants(active_heads, proxies)
    scored = (
        packed_q,
        packed_gate,
        places,
        k_pages.view(torch.float8_e4m3fn),
        k_pages.view(torch.float32),
        rows,
        lengths,
        request,
        page_table,
        page_table.stride(0),
        wanted,
        scratch,
        scratch.stride(0),
    )
    rescan_scores_kernel[(triton.cdiv(max_length, STRETCH), programs)](
        *scored, STRETCH=STRETCH, **constants, num_warps=NUM_WARPS
    )
    rescan_choice_kernel[(programs,)](
        *scored,
        num_lists,
        *lists.written,
        lists.slots.shape[1],
        **choice_constants(budget, first_tokens, local_tokens, lists.positions is not None),
        **constants,
        num_warps=NUM_WARPS,
    )


def _score_constants(active: int, proxies: bool) -> dict[str, int | bool]:
    return {
        "ACTIVE": active,
        "PROXIES": proxies,
        "HEADS": max(LEAST_HEADS, active),
        "DIM": HEAD_DIM,
        "TILE": TILE,
        "PAGE_BYTES": PAGE_BYTES,
        "KEY_BYTES": KEY_BYTES,
    }


def _kinds(names: list[str]) -> dict[str, str]:
    kinds = dict.fromkeys(names, "*i32")
    kinds |= {name: "*fp8e4nv" for name in ("q", "keys") if name in kinds}
    kinds |= {name: "*fp32" for name in ("gate", "scales", "scratch") if name in kinds}
    return kinds | {name: "i32" for name in ("table_width", "scratch_stride", "num_lists", "width") if name in kinds}


def compile_gather():
    """The gathering of lists, compiled for sm_90 without a GPU or a launch."""
    return compile_sm90(gather_unsure_kernel, _kinds(GATHERED), {"LISTS": LISTS}, {"num_warps": NUM_WARPS})


def compile_scores(active: int, proxies: bool = False):
    """The scores for one number of heads and their packing, compiled for sm_90 without a GPU or a launch."""
    constants = {"STRETCH": STRETCH, **_score_constants(active, proxies)}
    return compile_sm90(rescan_scores_kernel, _kinds(SCORED), constants, {"num_warps": NUM_WARPS})


def compile_choice(
    active: int, budget: int, first_tokens: int, local_tokens: int, with_positions: bool, proxies: bool = False
):
    """The choice for one setting, compiled for sm_90 without a GPU or a launch."""
    constants = choice_constants(budget, first_tokens, local_tokens, with_positions)
    constants |= _score_constants(active, proxies)
    return compile_sm90(rescan_choice_kernel, _kinds(CHOSEN), constants, {"num_warps": NUM_WARPS})
