"""TileLang body of head routing. One CTA serves two (H=64) or four (H=32) rows of a tile."""

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PASS_CONFIGS, TARGET
from indexer_kernels.row_plan import TILE_ROWS

HEADS = 128  # of all rows of a CTA, 64 for each of its warpgroups
THREADS = 256
TILE_BLOCKS = 128
STAGES = 2
# Ranks of a row are distinct (ties are broken by index), so no two threads store to one slot; the check cannot know.
CONFIGS = PASS_CONFIGS | {tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: True}


def head_route_prim_func(num_heads: int, active_heads: int, route_block: int, statistic: str):
    """r[m, h] = |w[m, h]| * sum (statistic "max": max) over the row's full blocks of relu(q[m, h] . mean[b]); heads[m]
    are the active_heads largest.

    Rank counting, not sorting: a head's slot is the number of heads with a larger r, or an equal r and a lower index.
    """
    product_rows, by_sum = HEADS // num_heads, statistic == "sum"
    num_rows, num_tiles = T.dynamic("num_rows"), T.dynamic("num_tiles")
    num_requests, block_tiles = T.dynamic("num_requests"), T.dynamic("block_tiles")

    @T.prim_func
    def head_route(
        q: T.Tensor((num_rows * num_heads, HEAD_DIM), FP8),
        weights: T.Tensor((num_rows, num_heads), "float32"),
        means: T.Tensor((num_requests, block_tiles * TILE_BLOCKS, HEAD_DIM), "bfloat16"),
        lengths: T.Tensor((num_rows,), "int32"),
        tile_request: T.Tensor((num_tiles,), "int32"),
        tile_rows: T.Tensor((num_tiles, TILE_ROWS), "int32"),
        heads: T.Tensor((num_rows, active_heads), "int32"),
    ):
        with T.Kernel(TILE_ROWS // product_rows, num_tiles, threads=THREADS) as (part, tile):
            q_shared = T.alloc_shared((HEADS, HEAD_DIM), "bfloat16")
            mean_shared = T.alloc_shared((TILE_BLOCKS, HEAD_DIM), "bfloat16")
            routing_shared = T.alloc_shared((HEADS,), "float32")
            product = T.alloc_fragment((HEADS, TILE_BLOCKS), "float32")
            positive = T.alloc_fragment((HEADS,), "float32")
            routing = T.alloc_fragment((HEADS,), "float32")
            rank = T.alloc_fragment((HEADS,), "int32")
            request, most, least = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            # Rows of a tile are filled from the front, so an empty first slot means an empty part.
            if tile_rows[tile, part * product_rows] >= 0:
                request = tile_request[tile]
                most = 0
                least = lengths[tile_rows[tile, part * product_rows]] // route_block
                for r in T.serial(product_rows):
                    most = T.max(most, lengths[T.max(tile_rows[tile, part * product_rows + r], 0)] // route_block)
                    least = T.min(least, lengths[T.max(tile_rows[tile, part * product_rows + r], 0)] // route_block)
                for i, d in T.Parallel(HEADS, HEAD_DIM):
                    q_shared[i, d] = T.cast(
                        q[
                            T.max(tile_rows[tile, part * product_rows + i // num_heads], 0) * num_heads + i % num_heads,
                            d,
                        ],
                        "bfloat16",
                    )
                T.clear(routing)
                for b in T.Pipelined(T.min(T.ceildiv(most, TILE_BLOCKS), block_tiles), num_stages=STAGES):
                    T.copy(means[request, b * TILE_BLOCKS, 0], mean_shared)
                    T.gemm(
                        q_shared,
                        mean_shared,
                        product,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    if (b + 1) * TILE_BLOCKS > least:  # some row does not have all of these blocks in full
                        for i, j in T.Parallel(HEADS, TILE_BLOCKS):
                            product[i, j] = T.if_then_else(
                                b * TILE_BLOCKS + j
                                < lengths[T.max(tile_rows[tile, part * product_rows + i // num_heads], 0)]
                                // route_block,
                                product[i, j],
                                0,
                            )
                    if by_sum:
                        for i, j in T.Parallel(HEADS, TILE_BLOCKS):
                            product[i, j] = T.max(product[i, j], 0)
                        T.reduce_sum(product, positive, dim=1)
                        for i in T.Parallel(HEADS):
                            routing[i] = routing[i] + positive[i]
                    else:
                        T.reduce_max(product, positive, dim=1)  # routing starts at 0: no need to cut below it
                        for i in T.Parallel(HEADS):
                            routing[i] = T.max(routing[i], positive[i])
                for i in T.Parallel(HEADS):
                    # NaN, of a gate that is NaN or of 0 * inf, becomes 0: unordered, two heads would get one slot and
                    # leave another unwritten, and whoever reads a head from there reads past the queries.
                    routing_shared[i] = T.max(
                        routing[i]
                        * T.abs(
                            weights[T.max(tile_rows[tile, part * product_rows + i // num_heads], 0), i % num_heads]
                        ),
                        0,
                    )
                T.sync_threads()
                for i in T.Parallel(HEADS):
                    rank[i] = 0
                    for other in T.serial(num_heads):
                        if (routing_shared[i // num_heads * num_heads + other] > routing_shared[i]) or (
                            (routing_shared[i // num_heads * num_heads + other] == routing_shared[i])
                            and (other < i % num_heads)
                        ):
                            rank[i] = rank[i] + 1
                    if (rank[i] < active_heads) and (tile_rows[tile, part * product_rows + i // num_heads] >= 0):
                        heads[tile_rows[tile, part * product_rows + i // num_heads], rank[i]] = i % num_heads

    return head_route.with_attr("global_symbol", f"head_route_h{num_heads}_a{active_heads}_b{route_block}_{statistic}")


@build_once
def build(num_heads: int, active_heads: int, route_block: int, statistic: str):
    """Compiled once per model shape and routing setting, whatever the batch."""
    return tilelang.compile(
        head_route_prim_func(num_heads, active_heads, route_block, statistic),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=CONFIGS,
    )
