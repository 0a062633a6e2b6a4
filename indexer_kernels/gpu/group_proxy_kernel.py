"""Triton kernel of a group's proxy query. One program serves some heads of one group."""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.page_layout import HEAD_DIM
from indexer_kernels.row_groups import Proxies

HEADS = 16  # heads of one program
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows", "num_heads"], do_not_specialize_on_alignment=["rows", "num_heads"])
def group_proxy_kernel(
    q,  # [M, num_heads, DIM] fp8
    weights,  # [M, num_heads] f32
    rows,  # [G, ROWS] int32, -1: none
    num_heads,
    proxy_q,  # [G, num_heads, DIM] fp8 out
    proxy_weights,  # [G, num_heads] f32 out
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
    out = group * num_heads + head
    tl.store(proxy_q + out[:, None] * DIM + dim[None, :], (mean * inverse[:, None]).to(proxy_q.dtype.element_ty))
    tl.store(proxy_weights + out, tl.div_rn(gates, tl.zeros((HEADS,), tl.float32) + count) * scale)


def group_proxies(q: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> Proxies:
    """`indexer_kernels.row_groups.group_proxies` in one launch, bitwise the same."""
    num_groups, num_heads = rows.shape[0], q.shape[1]
    found = Proxies(q.new_empty((num_groups, num_heads, HEAD_DIM)), weights.new_empty((num_groups, num_heads)))
    if num_groups:
        group_proxy_kernel[(num_heads // HEADS, num_groups)](
            q,
            weights,
            rows,
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
        "num_heads": "i32",
        "proxy_q": "*fp8e4nv",
        "proxy_weights": "*fp32",
    }
    constants = {"ROWS": num_rows, "HEADS": HEADS, "DIM": HEAD_DIM}
    aligned = ["q", "weights", "proxy_q", "proxy_weights"]
    return compile_sm90(group_proxy_kernel, kinds, constants, {"num_warps": NUM_WARPS}, aligned)
