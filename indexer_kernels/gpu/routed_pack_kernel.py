"""TileLang body that lays out the routed heads for the scan. One CTA gathers the rows of one tile."""

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PASS_CONFIGS, TARGET
from indexer_kernels.row_plan import TILE_ROWS

THREADS = 128
GROUP_ROWS = 8
GROUPS = TILE_ROWS // GROUP_ROWS


def routed_pack_prim_func(num_heads: int, active_heads: int):
    """packed_q[tile, g, a, c] = q[row, heads[row, a]] with row = tile_rows[tile, 8 g + c]; gates likewise, 0 for no
    row.
    """
    num_rows, num_tiles = T.dynamic("num_rows"), T.dynamic("num_tiles")
    columns = TILE_ROWS * active_heads

    @T.prim_func
    def routed_pack(
        q: T.Tensor((num_rows * num_heads, HEAD_DIM), FP8),
        weights: T.Tensor((num_rows, num_heads), "float32"),
        heads: T.Tensor((num_rows, active_heads), "int32"),
        tile_rows: T.Tensor((num_tiles, TILE_ROWS), "int32"),
        packed_q: T.Tensor((num_tiles * columns, HEAD_DIM), FP8),
        packed_gate: T.Tensor((num_tiles * columns,), "float32"),
    ):
        with T.Kernel(num_tiles, threads=THREADS) as tile:
            row = T.alloc_shared((TILE_ROWS,), "int32")
            source = T.alloc_shared((columns,), "int32")
            slot_row = T.alloc_shared((columns,), "int32")
            for i in T.Parallel(TILE_ROWS):
                row[i] = tile_rows[tile, i]
            for i in T.Parallel(columns):
                slot_row[i] = row[i // (active_heads * GROUP_ROWS) * GROUP_ROWS + i % GROUP_ROWS]
            for i in T.Parallel(columns):
                if slot_row[i] >= 0:
                    source[i] = slot_row[i] * num_heads + heads[slot_row[i], i // GROUP_ROWS % active_heads]
                    packed_gate[tile * columns + i] = weights[
                        slot_row[i], heads[slot_row[i], i // GROUP_ROWS % active_heads]
                    ]
                else:
                    source[i] = 0
                    packed_gate[tile * columns + i] = 0
            for i, d in T.Parallel(columns, HEAD_DIM):
                packed_q[tile * columns + i, d] = q[source[i], d]

    return routed_pack.with_attr("global_symbol", f"routed_pack_h{num_heads}_a{active_heads}")


@build_once
def build(num_heads: int, active_heads: int):
    """Compiled once per model shape and active head count, whatever the batch."""
    return tilelang.compile(
        routed_pack_prim_func(num_heads, active_heads),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=PASS_CONFIGS,
    )
