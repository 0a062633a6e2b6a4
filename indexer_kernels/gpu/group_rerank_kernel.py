"""Triton kernel of group_rerank that reads a row's choice back from its group's list.

The rows of a group share one list: the tokens that the scan chose, and behind them the group's own positions up to the
longest row. A row's candidates are a prefix of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.lists import Lists

PICKS = 1024  # entries that a program of group_pick_kernel takes at a time
PICK_DYNAMIC = [
    "chosen",
    "row_place",
    "request",
    "scanned",
    "counts",
    "listed",
    "page_table",
    "table_width",
    "out",
    "top_k",
    "list_width",
]


class GroupList(NamedTuple):
    """The candidates of G groups, and what lies behind them.

    chosen            tokens that the scan chose, a list each
    rows [G, W]       the rows of each group, then -1
    request [G]       page-table row of each group
    scanned [G]       tokens that the group's first position sees: the position of the first token behind the chosen
    columns [G]       length of the list: the chosen tokens, and the group's positions up to its longest row. All int32
    """

    chosen: Lists
    rows: torch.Tensor
    request: torch.Tensor
    scanned: torch.Tensor
    columns: torch.Tensor

    def part(self, groups: slice) -> "GroupList":
        return GroupList(self.chosen.part(groups), *(part[groups] for part in self[1:]))


@triton.jit(do_not_specialize=PICK_DYNAMIC, do_not_specialize_on_alignment=PICK_DYNAMIC)
def group_pick_kernel(
    chosen,  # [G * ROWS, top_k] int32: indices into the group's list, -1: none
    row_place,  # [M] int32
    request,  # [G] int32
    scanned,  # [G] int32
    counts,  # [G] int32
    listed,  # [G, list_width] int32: positions or slots
    page_table,  # [R, table_width] int32
    table_width,
    out,  # [M, top_k] int32 out: positions or slots, -1: none
    top_k,
    list_width,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PICKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(row_place + row).to(tl.int64)
    group = place // ROWS
    count = tl.load(counts + group)
    behind = tl.load(scanned + group) - count
    table = page_table + tl.load(request + group).to(tl.int64) * table_width
    for start in range(0, top_k, PICKS):
        entry = start + tl.arange(0, PICKS)
        inside = entry < top_k
        index = tl.load(chosen + place * top_k + entry, mask=inside, other=-1)
        own = index >= count
        found = tl.load(listed + group * list_width + index, mask=(index >= 0) & (index < count), other=-1)
        position = behind + index
        if SLOTS:
            page = tl.load(table + position // 64, mask=own, other=0)
            found = tl.where(own, page * 64 + position % 64, found)
        else:
            found = tl.where(own, position, found)
        tl.store(out + row * top_k + entry, found, mask=inside)


def group_pick(
    chosen: torch.Tensor,
    row_place: torch.Tensor,
    page_table: torch.Tensor,
    groups: GroupList,
    slots: bool,
    out: torch.Tensor,
) -> None:
    """out[m, i] = what the group's list has at chosen[row_place[m], i], as slot or as position; -1 stays.

    chosen [G * W, K] int32, row_place [M] int32, out [M, K] int32 (contiguous).
    """
    if out.shape[0]:
        listed = groups.chosen.slots if slots else groups.chosen.positions
        group_pick_kernel[(out.shape[0],)](
            chosen,
            row_place,
            groups.request,
            groups.scanned,
            groups.chosen.counts,
            listed,
            page_table,
            page_table.stride(0),
            out,
            out.shape[1],
            listed.shape[1],
            ROWS=groups.rows.shape[1],
            SLOTS=slots,
            PICKS=PICKS,
        )


def compile_pick_for(num_rows: int, slots: bool):
    """The variant of group_pick for one list, compiled for sm_90."""
    kinds = {name: "i32" if name in ("table_width", "top_k", "list_width") else "*i32" for name in PICK_DYNAMIC}
    constants = {"ROWS": num_rows, "SLOTS": slots, "PICKS": PICKS}
    return compile_sm90(group_pick_kernel, kinds, constants, {"num_warps": 4})
