"""TileLang body of block means over the paged key cache. One CTA averages the dequantised keys of one full block."""

import functools

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS, PASS_CONFIGS, TARGET

THREADS = 128


def block_means_prim_func(block_pages: int):
    """means[r, b] = 1 / (64 block_pages) * sum over the block's tokens of key * scale; zero past the last full block.

    Summed in float32, one page after the other, so a mean does not depend on which call computed it; stored as
    bfloat16.
    """
    num_requests, table_width, pool_pages = T.dynamic("num_requests"), T.dynamic("table_width"), T.dynamic("pool_pages")
    num_blocks = T.dynamic("num_blocks")

    @T.prim_func
    def block_means(
        keys: T.Tensor((pool_pages * 66, HEAD_DIM), FP8),
        scales: T.Tensor((pool_pages * 33, PAGE_TOKENS), "float32"),
        page_table: T.Tensor((num_requests, table_width), "int32"),
        lengths: T.Tensor((num_requests,), "int32"),
        means: T.Tensor((num_requests, num_blocks, HEAD_DIM), "bfloat16"),
    ):
        with T.Kernel(num_blocks, num_requests, threads=THREADS) as (block, request):
            value = T.alloc_fragment((PAGE_TOKENS, HEAD_DIM), "float32")
            total = T.alloc_fragment((PAGE_TOKENS, HEAD_DIM), "float32")
            mean = T.alloc_fragment((HEAD_DIM,), "float32")
            page = T.alloc_var("int32")
            T.clear(total)
            if (block + 1) * block_pages * PAGE_TOKENS <= lengths[request]:
                for p in T.serial(block_pages):
                    page = page_table[request, block * block_pages + p]
                    for i, d in T.Parallel(PAGE_TOKENS, HEAD_DIM):
                        value[i, d] = T.cast(keys[page * 66 + i, d], "float32")
                    for i, d in T.Parallel(PAGE_TOKENS, HEAD_DIM):
                        total[i, d] = T.ieee_fmaf(value[i, d], scales[page * 33 + 32, i], total[i, d])
            T.reduce_sum(total, mean, dim=0)
            for d in T.Parallel(HEAD_DIM):
                means[request, block, d] = T.cast(mean[d] * (1.0 / (block_pages * PAGE_TOKENS)), "bfloat16")

    return block_means.with_attr("global_symbol", f"block_means_p{block_pages}")


@functools.cache
def build(block_pages: int):
    """Compiled once per block size, whatever the batch."""
    return tilelang.compile(
        block_means_prim_func(block_pages), target=TARGET, execution_backend="tvm_ffi", pass_configs=PASS_CONFIGS
    )
