"""Triton kernel of a group's proxy query. One program serves some heads of one group."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.page_layout import HEAD_DIM
from indexer_kernels.row_plan import TILE_ROWS

HEADS = 16  # heads of one program
NUM_WARPS = 4
DYNAMIC = ["rows", "places", "num_heads"]


class PackedProxies(NamedTuple):
    """The proxies of groups at the places of whole tiles, in the order of `group_scan_kernel`'s columns: q [places * H,
    128] fp8, gates [places * H] f32. Places without a group hold anything.
    """

    q: torch.Tensor
    gates: torch.Tensor

    def of_tiles(self, tiles: slice, num_heads: int) -> "PackedProxies":
        columns = TILE_ROWS * num_heads
        packed = slice(tiles.start * columns, tiles.stop * columns)
        return PackedProxies(self.q[packed], self.gates[packed])


@triton.jit
def proxy_column(place, head, num_heads):
    """Where the scan has a head of a place's proxy: (four places, pair of heads, place, head of the pair)."""
    quad = (place // 8 * 2 + place % 2).to(tl.int64)
    return ((quad * (num_heads // 2) + head // 2) * 4 + place % 8 // 2) * 2 + head % 2


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=DYNAMIC)
def group_proxy_kernel(
    q,  # [M, num_heads, DIM] fp8
    weights,  # [M, num_heads] f32
    rows,  # [G, ROWS] int32, -1: none
    places,  # [G] int32
    num_heads,
    proxy_q,  # [places * num_heads, DIM] fp8 out
    proxy_gates,  # [places * num_heads] f32 out
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    total = tl.zeros((HEADS, DIM), tl.float32)
    gates = tl.zeros((HEADS,), tl.float32)
    count = tl.zeros((), tl.float32)
    for place in tl.static_range(ROWS):
        row = tl.load(rows + group * ROWS + place)
        at = tl.maximum(row, 0).to(tl.int64) * num_heads + head
        total += tl.where(row >= 0, tl.load(q + at[:, None] * DIM + dim[None, :]).to(tl.float32), 0.0)
        gates += tl.where(row >= 0, tl.load(weights + at), 0.0)
        count += tl.where(row >= 0, 1.0, 0.0)
    mean = tl.div_rn(total, tl.zeros((HEADS, DIM), tl.float32) + count)
    largest = tl.max(tl.abs(mean), axis=1)
    # largest = mantissa * 2^exponent with mantissa in [0.5, 1), and the largest fp8, 448, is 0.875 * 2^9.
    bits = largest.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    exponent = tl.where(largest > 0.0, (bits >> 23) - 126 - 9 + (mantissa > 0.875).to(tl.int32), -9)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    out = proxy_column(tl.load(places + group), head, num_heads)
    tl.store(proxy_q + out[:, None] * DIM + dim[None, :], (mean * inverse[:, None]).to(proxy_q.dtype.element_ty))
    tl.store(proxy_gates + out, tl.div_rn(gates, tl.zeros((HEADS,), tl.float32) + count) * scale)


def group_proxies(
    q: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, num_places: int
) -> PackedProxies:
    """`indexer_kernels.row_groups.group_proxies` of rows [G, W], bitwise the same, group g at place places[g]."""
    num_groups, num_heads = rows.shape[0], q.shape[1]
    columns = num_places * num_heads
    found = PackedProxies(q.new_empty((columns, HEAD_DIM)), weights.new_empty(columns))
    if num_groups:
        group_proxy_kernel[(num_heads // HEADS, num_groups)](
            q,
            weights,
            rows,
            places,
            num_heads,
            *found,
            ROWS=rows.shape[1],
            HEADS=HEADS,
            DIM=HEAD_DIM,
            num_warps=NUM_WARPS,
        )
    return found


def compile_for(num_rows: int):
    """The variant for groups of num_rows rows, compiled for sm_90 without a GPU or a launch."""
    kinds = {
        "q": "*fp8e4nv",
        "weights": "*fp32",
        "rows": "*i32",
        "places": "*i32",
        "num_heads": "i32",
        "proxy_q": "*fp8e4nv",
        "proxy_gates": "*fp32",
    }
    constants = {"ROWS": num_rows, "HEADS": HEADS, "DIM": HEAD_DIM}
    aligned = ["q", "weights", "proxy_q", "proxy_gates"]
    return compile_sm90(group_proxy_kernel, kinds, constants, {"num_warps": NUM_WARPS}, aligned)
