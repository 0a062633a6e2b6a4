"""What every TileLang kernel is compiled for, and the page geometry it reads."""

import tilelang
from tilelang import tvm

from indexer_kernels.page_layout import HEAD_DIM, PAGE_TOKENS

__all__ = ["FP8", "HEAD_DIM", "PAGE_TOKENS", "PASS_CONFIGS", "TARGET", "WARP_KEYS"]

TARGET = {"kind": "cuda", "arch": "sm_90a"}
# Indices are clamped where they can leave their tensor, so the guards TileLang would add cost without protecting.
# Warp specialisation is written by hand or not wanted: TileLang 0.1.12's own pass miscompiles patterns used here.
PASS_CONFIGS = {
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True,
}
FP8 = "float8_e4m3fn"
WARP_KEYS = 16  # keys one warp holds of a wgmma tile: 64 per warpgroup, four warps


def register_types() -> None:
    """Has TVM register now what it would at the first use: its table of types has no lock, and kernels are built by
    several threads, which only read it once everything is there.
    """
    x = tvm.tirx.Var("x", "int32")
    tvm.arith.Analyzer().canonical_simplify(x * 2 + x)
    tvm.IRModule({}).script()


register_types()
