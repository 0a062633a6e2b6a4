"""TileLang body that scores a list of candidate tokens for the row, or the rows of a group, that share the list.

One CTA scores a stretch of one list. The candidates lie scattered over the cache: their keys are gathered by address,
128 bytes each, ahead of the product with the heads of all rows.
"""

from typing import NamedTuple

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.relu_kernel import PRODUCT_LIMIT, relu_share
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS, PASS_CONFIGS, TARGET

TILE = 128  # a list is a whole number of these wide
COLUMNS = 16  # the least columns of a product
MOST_LISTS = 65535  # of a launch: the limit of a grid's second dimension


class Shape(NamedTuple):
    """Candidates of one product, candidates of one CTA, threads, stages of the ring of tiles."""

    tile: int
    stretch: int
    threads: int
    stages: int


def shape_of(list_rows: int) -> Shape:
    """The fastest of nine that were measured on an H200 (docs/performance.md): with one row a list is bound by its
    gathering and wants many CTAs on an SM, with several rows by the products.
    """
    return Shape(128, 2048, 256, 2) if list_rows == 1 else Shape(64, 2048, 128, 4)


def token_scores_prim_func(num_heads: int, list_rows: int):
    """out[list * list_rows + w, i] = scale[j] * sum_h weights[r, h] * relu(q[r, h] . key[j]), r = rows[list, w], for
    the columns[list] candidates j of a list.

    Candidate i is slots[list, i] for i < counts[list], and the token at position behind[list] + i of page-table row
    request[list] from there on. Where rows is -1 and past columns[list], out holds anything.
    """
    heads, (tile, stretch_tokens, threads, stages) = list_rows * num_heads, shape_of(list_rows)
    columns_of_product = max(COLUMNS, heads)
    num_rows, pool_pages = T.dynamic("num_rows"), T.dynamic("pool_pages")
    lists, list_tiles, out_tiles = T.dynamic("lists"), T.dynamic("list_tiles"), T.dynamic("out_tiles")
    num_requests, table_width = T.dynamic("num_requests"), T.dynamic("table_width")

    @T.prim_func
    def token_scores(
        q: T.Tensor((num_rows * num_heads, HEAD_DIM), FP8),
        weights: T.Tensor((num_rows * num_heads,), "float32"),
        keys: T.Tensor((pool_pages * 66, HEAD_DIM), FP8),
        scales: T.Tensor((pool_pages * 33 * PAGE_TOKENS,), "float32"),
        page_table: T.Tensor((num_requests, table_width), "int32"),
        rows: T.Tensor((lists, list_rows), "int32"),
        request: T.Tensor((lists,), "int32"),
        behind: T.Tensor((lists,), "int32"),
        slots: T.Tensor((lists, list_tiles * tile), "int32"),
        counts: T.Tensor((lists,), "int32"),
        columns: T.Tensor((lists,), "int32"),
        out: T.Tensor((lists * list_rows, out_tiles * tile), "float32"),
    ):
        with T.Kernel(T.ceildiv(out_tiles * tile, stretch_tokens), lists, threads=threads) as (stretch, block):
            q_shared = T.alloc_shared((columns_of_product, HEAD_DIM), FP8)
            k_shared = T.alloc_shared((stages, tile, HEAD_DIM), FP8)
            key_row = T.alloc_shared((stretch_tokens,), "int32")
            key_scale = T.alloc_shared((stretch_tokens,), "float32")
            product = T.alloc_fragment((tile, columns_of_product), "float32")
            # Columns as (row, 8 heads, head): a thread holds two of every 8, and adds those up before lanes meet.
            steps = columns_of_product // list_rows // 8
            product4 = T.reshape(product, (tile, list_rows, steps, 8))
            part = T.alloc_fragment((tile, list_rows, 8), "float32")
            score = T.alloc_fragment((tile, list_rows), "float32")
            gate = T.alloc_fragment((columns_of_product,), "float32")
            gate3 = T.reshape(gate, (list_rows, steps, 8))
            left, tiles, slot, at = (
                T.alloc_var("int32"),
                T.alloc_var("int32"),
                T.alloc_var("int32"),
                T.alloc_var("int32"),
            )
            left = T.min(columns[block] - stretch * stretch_tokens, stretch_tokens)
            if left > 0:
                tiles = T.ceildiv(left, tile)
                for i in T.Parallel(stretch_tokens):
                    # A list is anything past its end: read the last candidate again instead.
                    at = stretch * stretch_tokens + T.min(i, left - 1)
                    if at < counts[block]:
                        slot = slots[block, at]
                    else:
                        slot = (
                            page_table[request[block], (behind[block] + at) // PAGE_TOKENS] * PAGE_TOKENS
                            + (behind[block] + at) % PAGE_TOKENS
                        )
                    key_row[i] = slot // PAGE_TOKENS * 66 + slot % PAGE_TOKENS
                    key_scale[i] = scales[(slot // PAGE_TOKENS * 33 + 32) * PAGE_TOKENS + slot % PAGE_TOKENS]
                for i, d in T.Parallel(columns_of_product, HEAD_DIM):
                    q_shared[i, d] = q[
                        T.max(rows[block, T.min(i // num_heads, list_rows - 1)], 0) * num_heads + i % num_heads, d
                    ]
                for i in T.Parallel(columns_of_product):
                    gate[i] = T.if_then_else(
                        i < heads,
                        weights[T.max(rows[block, T.min(i // num_heads, list_rows - 1)], 0) * num_heads + i % num_heads]
                        * PRODUCT_LIMIT,
                        0,
                    )
                T.sync_threads()
                for s in T.unroll(stages - 1):
                    if s < tiles:
                        for i, d in T.Parallel(
                            tile,
                            HEAD_DIM,
                            prefer_async=True,
                            annotations={"parallel_async_without_async_commit_wait": True},
                        ):
                            k_shared[s, i, d] = keys[key_row[s * tile + i], d]
                    T.ptx_commit_group()
                for t in T.serial(tiles):
                    # The tile is there when all threads have waited for their part of it; then every thread has also
                    # left the product before, whose stage is filled again.
                    T.ptx_wait_group(stages - 2)
                    T.sync_threads()
                    if t + stages - 1 < tiles:
                        for i, d in T.Parallel(
                            tile,
                            HEAD_DIM,
                            prefer_async=True,
                            annotations={"parallel_async_without_async_commit_wait": True},
                        ):
                            k_shared[(t + stages - 1) % stages, i, d] = keys[key_row[(t + stages - 1) * tile + i], d]
                    T.ptx_commit_group()
                    T.gemm(
                        k_shared[t % stages, :, :],
                        q_shared,
                        product,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    T.clear(part)
                    for h in T.unroll(steps, explicit=True):
                        for i, w, c in T.Parallel(tile, list_rows, 8):
                            part[i, w, c] = T.ieee_fmaf(relu_share(product4[i, w, h, c]), gate3[w, h, c], part[i, w, c])
                    T.reduce_sum(part, score, dim=2)
                    for i, w in T.Parallel(tile, list_rows):
                        out[block * list_rows + w, stretch * stretch_tokens + t * tile + i] = (
                            score[i, w] * key_scale[t * tile + i]
                        )

    return token_scores.with_attr("global_symbol", f"token_scores_h{num_heads}_r{list_rows}")


@build_once
def build(num_heads: int, list_rows: int):
    """Compiled once per head count and rows of a list, whatever the batch."""
    return tilelang.compile(
        token_scores_prim_func(num_heads, list_rows),
        target=TARGET,
        execution_backend="tvm_ffi",
        # The barriers are written by hand: TileLang would put four into every tile.
        pass_configs=PASS_CONFIGS | {tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True},
    )
