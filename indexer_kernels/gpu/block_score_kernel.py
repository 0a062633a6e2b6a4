"""TileLang body of block scores. One CTA scores two (H=64) or four (H=32) rows of a tile against its share of the
block means.
"""

import functools

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.target import FP8, HEAD_DIM, PASS_CONFIGS, TARGET
from indexer_kernels.row_plan import TILE_ROWS

THREADS = 256
TILE_BLOCKS = 128


def block_score_prim_func(num_heads: int, block_size: int):
    """t[m, b] = sum_h w[m, h] * relu(q[m, h] . mean[b]), rows in tile order; only tiles of blocks that some row has
    in full.

    splits CTAs share the block tiles of a row pair: one for prefill, more where there are too few rows to fill the
    chip. Tiles whose rows see at most covered_length tokens are skipped: their selection needs no scores.
    """
    product_rows = 128 // num_heads
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
            q_shared = T.alloc_shared((128, HEAD_DIM), "bfloat16")
            mean_shared = T.alloc_shared((TILE_BLOCKS, HEAD_DIM), "bfloat16")
            product = T.alloc_fragment((TILE_BLOCKS, 128), "float32")
            product3 = T.reshape(product, (TILE_BLOCKS, product_rows, num_heads))
            gate = T.alloc_fragment((128,), "float32")
            score = T.alloc_fragment((TILE_BLOCKS, product_rows), "float32")
            needed = T.alloc_var("int32")
            if (tile_rows[tile, part * product_rows] >= 0) and (tile_length[tile] > covered_length):
                needed = T.min(T.ceildiv(tile_length[tile] // block_size, TILE_BLOCKS), block_tiles)
                for i, d in T.Parallel(128, HEAD_DIM):
                    q_shared[i, d] = T.cast(
                        q[
                            T.max(tile_rows[tile, part * product_rows + i // num_heads], 0) * num_heads + i % num_heads,
                            d,
                        ],
                        "bfloat16",
                    )
                for i in T.Parallel(128):
                    gate[i] = weights[T.max(tile_rows[tile, part * product_rows + i // num_heads], 0), i % num_heads]
                for step in T.serial(T.ceildiv(T.max(needed - split_ids[split], 0), splits)):
                    T.copy(means[tile_request[tile], (split_ids[split] + step * splits) * TILE_BLOCKS, 0], mean_shared)
                    T.gemm(
                        mean_shared,
                        q_shared,
                        product,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    for b, i in T.Parallel(TILE_BLOCKS, 128):
                        product[b, i] = T.max(product[b, i], 0) * gate[i]
                    T.reduce_sum(product3, score, dim=2)
                    for r, b in T.Parallel(product_rows, TILE_BLOCKS):
                        out[
                            tile * TILE_ROWS + part * product_rows + r,
                            (split_ids[split] + step * splits) * TILE_BLOCKS + b,
                        ] = score[b, r]

    return block_score.with_attr("global_symbol", f"block_score_h{num_heads}_b{block_size}")


@functools.cache
def build(num_heads: int, block_size: int):
    """Compiled once per model shape and block size, whatever the batch."""
    return tilelang.compile(
        block_score_prim_func(num_heads, block_size),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=PASS_CONFIGS,
    )
