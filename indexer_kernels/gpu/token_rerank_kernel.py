"""Triton kernel that scores each row's own candidate tokens with all heads. One program scores a stretch of one row.

The candidates lie scattered over the cache: their keys are gathered by address, 128 bytes each, and multiplied with the
row's heads in fp8.
"""

import torch
import triton
import triton.language as tl

from indexer_kernels.gpu.ahead_of_launch import compile_sm90
from indexer_kernels.gpu.token_select_kernel import TokenCandidates
from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES

TILE = 128  # candidates of one product
STRETCH = 1024  # candidates of one program
NUM_WARPS = 4
NUM_STAGES = 3
DYNAMIC = ["q", "weights", "keys", "scales", "slots", "counts", "out"]
UNALIGNED = ["counts"]  # of the others alignment is used: every row of theirs begins at a multiple of 16 bytes


@triton.jit(do_not_specialize=DYNAMIC, do_not_specialize_on_alignment=UNALIGNED)
def token_rerank_kernel(
    q,  # [M, HEADS, DIM] fp8
    weights,  # [M, HEADS] f32
    keys,  # the cache's bytes as fp8
    scales,  # the cache's bytes as f32
    slots,  # [M, BUDGET] int32
    counts,  # [M] int32
    out,  # [M, BUDGET] f32
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BUDGET: tl.constexpr,
    STRETCH: tl.constexpr,
    TILE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * STRETCH
    count = tl.load(counts + row)
    stop = tl.minimum(count, first + STRETCH)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    query = tl.load(q + row * (HEADS * DIM) + head[:, None] * DIM + dim[None, :])
    gate = tl.load(weights + row * HEADS + head)
    for start in range(first, stop, TILE):
        candidate = start + tl.arange(0, TILE)
        inside = candidate < stop
        slot = tl.load(slots + row * BUDGET + candidate, mask=inside, other=0)
        page = (slot // 64).to(tl.int64)
        token = slot % 64
        key = tl.load(keys + (page * PAGE_BYTES + token * DIM)[:, None] + dim[None, :])
        scale = tl.load(scales + page * (PAGE_BYTES // 4) + KEY_BYTES // 4 + token)
        products = tl.dot(key, tl.trans(query))  # [TILE, HEADS] f32
        score = tl.sum(tl.maximum(products, 0.0) * gate[None, :], axis=1) * scale
        tl.store(out + row * BUDGET + candidate, score, mask=inside)


def token_rerank(
    q: torch.Tensor, weights: torch.Tensor, k_pages: torch.Tensor, candidates: TokenCandidates
) -> torch.Tensor:
    """out[m, i] = scale[j] * sum_h weights[m, h] * relu(q[m, h] . key[j]), j the i-th candidate of row m.

    q [M, H, 128] fp8, weights [M, H] f32, k_pages [P, 8448] uint8, candidates of the M rows [M, C] with C a multiple of
    TILE. Returns f32 [M, C]; columns past counts[m] hold anything.
    """
    num_rows, budget = candidates.slots.shape
    out = torch.empty((num_rows, budget), dtype=torch.float32, device=q.device)
    if num_rows:
        token_rerank_kernel[(triton.cdiv(budget, STRETCH), num_rows)](
            q,
            weights,
            k_pages.view(torch.float8_e4m3fn),
            k_pages.view(torch.float32),
            candidates.slots,
            candidates.counts,
            out,
            **_constants(q.shape[1], budget),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


def _constants(num_heads: int, budget: int) -> dict[str, int]:
    return {
        "HEADS": num_heads,
        "DIM": HEAD_DIM,
        "BUDGET": budget,
        "STRETCH": STRETCH,
        "TILE": TILE,
        "PAGE_BYTES": PAGE_BYTES,
        "KEY_BYTES": KEY_BYTES,
    }


def compile_for(num_heads: int, budget: int):
    """The variant for one model shape and budget, compiled for sm_90 without a GPU or a launch."""
    names = {"q": "*fp8e4nv", "keys": "*fp8e4nv", "slots": "*i32", "counts": "*i32"}
    kinds = {name: names.get(name, "*fp32") for name in DYNAMIC}
    aligned = [name for name in DYNAMIC if name not in UNALIGNED]
    options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    return compile_sm90(token_rerank_kernel, kinds, _constants(num_heads, budget), options, aligned)
