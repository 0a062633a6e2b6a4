"""TileLang body of block scores. One CTA scores four (H=64) or eight (H=32) rows of a tile against its share of the
block means.
"""

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PASS_CONFIGS, TARGET
from indexer_kernels.row_plan import TILE_ROWS

# One warpgroup a CTA, two CTAs an SM: one multiplies while the other sums up.
THREADS = 128
TILE_BLOCKS = 64
COLUMNS = 256  # of one product, the widest wgmma: every mean is read as seldom as can be
STAGES = 2


def block_score_prim_func(num_heads: int, block_size: int):
    """t[m, b] = sum_h w[m, h] * relu(q[m, h] . mean[b]), rows in tile order; only tiles of blocks that some row has
    in full.

    splits CTAs share the block tiles of a product's rows: one for prefill, more where there are too few rows to fill
    the chip. Tiles whose rows see at most covered_length tokens are skipped: their selection needs no scores.
    """
    product_rows, steps = COLUMNS // num_heads, num_heads // 8
    num_rows, num_tiles = T.dynamic("num_rows"), T.dynamic("num_tiles")
    num_requests, block_tiles, splits = T.dynamic("num_requests"), T.dynamic("block_tiles"), T.dynamic("splits")

    @T.prim_func
    def block_score(
        q: T.Tensor((num_rows * num_heads, HEAD_DIM), FP8),
        weights: T.Tensor((num_rows, num_heads), "float32"),
        means: T.Tensor((num_requests, block_tiles * TILE_BLOCKS, HEAD_DIM), "bfloat16"),
        tile_request: T.Tensor((num_tiles,), "int32"),
        tile_rows: T.Tensor((num_tiles, TILE_ROWS), "int32"),
        tile_length: T.Tensor((num_tiles,), "int32"),
        split_ids: T.Tensor((splits,), "int32"),
        out: T.Tensor((num_tiles * TILE_ROWS, block_tiles * TILE_BLOCKS), "float32"),
        covered_length: T.int32,
    ):
        with T.Kernel(TILE_ROWS // product_rows, splits, num_tiles, threads=THREADS) as (part, split, tile):
            q_shared = T.alloc_shared((COLUMNS, HEAD_DIM), "bfloat16")
            mean_shared = T.alloc_shared((TILE_BLOCKS, HEAD_DIM), "bfloat16")
            product = T.alloc_fragment((TILE_BLOCKS, COLUMNS), "float32")
            # Columns as (row, 8 heads, head): a thread holds two of every 8, and adds those up before lanes meet.
            product4 = T.reshape(product, (TILE_BLOCKS, product_rows, steps, 8))
            partial = T.alloc_fragment((TILE_BLOCKS, product_rows, 8), "float32")
            score = T.alloc_fragment((TILE_BLOCKS, product_rows), "float32")
            gate = T.alloc_fragment((COLUMNS,), "float32")
            gate3 = T.reshape(gate, (product_rows, steps, 8))
            needed = T.alloc_var("int32")
            # Rows of a tile are filled from the front, so an empty first slot means an empty part.
            if (tile_rows[tile, part * product_rows] >= 0) and (tile_length[tile] > covered_length):
                needed = T.min(T.ceildiv(tile_length[tile] // block_size, TILE_BLOCKS), block_tiles)
                for i, d in T.Parallel(COLUMNS, HEAD_DIM):
                    q_shared[i, d] = T.cast(
                        q[
                            T.max(tile_rows[tile, part * product_rows + i // num_heads], 0) * num_heads + i % num_heads,
                            d,
                        ],
                        "bfloat16",
                    )
                for i in T.Parallel(COLUMNS):
                    gate[i] = weights[T.max(tile_rows[tile, part * product_rows + i // num_heads], 0), i % num_heads]
                for step in T.Pipelined(T.ceildiv(T.max(needed - split_ids[split], 0), splits), num_stages=STAGES):
                    T.copy(means[tile_request[tile], (split_ids[split] + step * splits) * TILE_BLOCKS, 0], mean_shared)
                    T.gemm(
                        mean_shared,
                        q_shared,
                        product,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    T.clear(partial)
                    for h in T.unroll(steps, explicit=True):
                        for b, r, c in T.Parallel(TILE_BLOCKS, product_rows, 8):
                            partial[b, r, c] = T.ieee_fmaf(
                                T.max(product4[b, r, h, c], 0), gate3[r, h, c], partial[b, r, c]
                            )
                    T.reduce_sum(partial, score, dim=2)
                    for r, b in T.Parallel(product_rows, TILE_BLOCKS):
                        out[
                            tile * TILE_ROWS + part * product_rows + r,
                            (split_ids[split] + step * splits) * TILE_BLOCKS + b,
                        ] = score[b, r]

    return block_score.with_attr("global_symbol", f"block_score_h{num_heads}_b{block_size}")


@build_once
def build(num_heads: int, block_size: int):
    """Compiled once per model shape and block size, whatever the batch."""
    return tilelang.compile(
        block_score_prim_func(num_heads, block_size),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=PASS_CONFIGS,
    )
