"""TileLang body of the routed scan: every visible token against the few routed heads of its row, in fp8.

A persistent CTA takes tiles of 16 rows of one request. One producer warp streams the request's pages through a ring of
shared-memory stages by TMA; each consumer warpgroup owns one page of a stage (64 keys are the A operand of its
wgmma). The 8 rows of a group sit innermost in the columns, (group, head, row), so the sum over heads never leaves a
thread.

What leaves the chip is one of three forms: every score, the best score of 16 keys, or one bit a key, set where the
score reaches a threshold of its row (a 32nd of the bytes). In a bit's word stand 8 keys of 4 rows, as the lanes of a
warp hold them.
"""

import functools
from typing import Literal

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS, PASS_CONFIGS, TARGET, WARP_KEYS
from indexer_kernels.row_plan import TILE_ROWS

GROUP_ROWS = 8
GROUPS = TILE_ROWS // GROUP_ROWS
STAGES = 4
PRODUCER_REGISTERS = 24
MASK_WORDS = 8  # 32-bit words of one cell of 16 keys and 16 rows
Form = Literal["scores", "maxima", "mask"]


def stage_pages(active_heads: int) -> int:
    """Pages per stage, one for each consumer warpgroup.

    Three hide each other's epilogues better than two, four would spill; with 16 heads the accumulators leave room for
    two.
    """
    return 2 if active_heads > 8 else 3


def routed_scores_prim_func(active_heads: int, form: Form, num_sms: int):
    """The prim_func. Only "mask" reads `thresholds`; the other forms take any tensor of that shape.

    out is f32 [tiles * 16, keys] of "scores", f32 [tiles * 16, keys / 16] of "maxima", and of "mask" int32 [tiles, keys
    / 16, 8]: word 4 * ((key % 16) // 8) + 2 * (place // 8) + place % 2 of a cell, bit 4 * (key % 8) +
    (place % 8) // 2.
    """
    consumers = stage_pages(active_heads)
    consumer_registers = 240 if consumers == 2 else 160
    stage_keys = consumers * PAGE_TOKENS
    columns = GROUPS * active_heads * GROUP_ROWS
    cells = stage_keys // WARP_KEYS
    stage_out = stage_keys if form == "scores" else cells
    num_tiles, pool_pages = T.dynamic("num_tiles"), T.dynamic("pool_pages")
    num_requests, table_width, out_stages = T.dynamic("num_requests"), T.dynamic("table_width"), T.dynamic("out_stages")

    if form == "mask":
        out_shape, out_type = (num_tiles, out_stages * cells, MASK_WORDS), "int32"
    else:
        out_shape, out_type = (num_tiles * TILE_ROWS, out_stages * stage_out), "float32"

    @T.prim_func
    def routed_scores(
        q: T.Tensor((num_tiles * columns, HEAD_DIM), FP8),
        weights: T.Tensor((num_tiles * GROUPS, active_heads, GROUP_ROWS), "float32"),
        keys: T.Tensor((pool_pages * 66, HEAD_DIM), FP8),
        scales: T.Tensor((pool_pages * 33, PAGE_TOKENS), "float32"),
        page_table: T.Tensor((num_requests, table_width), "int32"),
        tile_request: T.Tensor((num_tiles,), "int32"),
        tile_pages: T.Tensor((num_tiles,), "int32"),
        thresholds: T.Tensor((num_tiles * GROUPS, GROUP_ROWS), "float32"),
        out: T.Tensor(out_shape, out_type),
    ):
        with T.Kernel(num_sms, threads=(consumers + 1) * 128) as sm:
            q_shared = T.alloc_shared((columns, HEAD_DIM), FP8)
            k_shared = T.alloc_shared((STAGES, stage_keys, HEAD_DIM), FP8)
            product = T.alloc_fragment((stage_keys, columns), "float32")
            product4 = T.reshape(product, (stage_keys, GROUPS, active_heads, GROUP_ROWS))
            score = T.alloc_fragment((stage_keys, GROUPS, GROUP_ROWS), "float32")
            score4 = T.reshape(score, (cells, WARP_KEYS, GROUPS, GROUP_ROWS))
            best = T.alloc_fragment((cells, GROUPS, GROUP_ROWS), "float32")
            gate = T.alloc_fragment((GROUPS, active_heads, GROUP_ROWS), "float32")
            threshold = T.alloc_fragment((GROUPS, GROUP_ROWS), "float32")
            k_scale = T.alloc_fragment((stage_keys,), "float32")
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([consumers * 128] * STAGES)
            q_full, q_empty = T.alloc_barrier(1), T.alloc_barrier(consumers * 128)
            produced, consumed = T.alloc_var("int32"), T.alloc_var("int32")
            loaded, used = T.alloc_var("int32"), T.alloc_var("int32")
            request, pages, page = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            produced = 0
            consumed = 0
            loaded = 0
            used = 0
            thread = T.get_thread_binding()
            if thread >= consumers * 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < consumers * 128 + 32:
                    for wave in T.serial(T.ceildiv(num_tiles, num_sms)):
                        if wave * num_sms + sm < num_tiles:
                            pages = tile_pages[wave * num_sms + sm]
                            request = tile_request[wave * num_sms + sm]
                            if pages > 0:
                                T.barrier_wait(q_empty, (loaded & 1) ^ 1)
                                T.tma_copy(
                                    q[(wave * num_sms + sm) * columns, 0],
                                    q_shared,
                                    barrier=q_full,
                                    leader_scope_threads=32,
                                )
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(q_full)
                                loaded = loaded + 1
                                for n in T.serial(T.ceildiv(pages, consumers)):
                                    T.barrier_wait(empty[produced % STAGES], ((produced // STAGES) & 1) ^ 1)
                                    for c in T.unroll(consumers, explicit=True):
                                        # The table is garbage past the last page: read that page again instead.
                                        page = page_table[request, T.min(n * consumers + c, pages - 1)]
                                        T.tma_copy(
                                            keys[page * 66 : page * 66 + PAGE_TOKENS, 0:HEAD_DIM],
                                            k_shared[
                                                produced % STAGES, c * PAGE_TOKENS : (c + 1) * PAGE_TOKENS, 0:HEAD_DIM
                                            ],
                                            barrier=full[produced % STAGES],
                                            leader_scope_threads=32,
                                        )
                                    if T.shuffle_elect(32):
                                        T.barrier_arrive(full[produced % STAGES])
                                    produced = produced + 1
            else:
                T.set_max_nreg(consumer_registers, 1)
                for wave in T.serial(T.ceildiv(num_tiles, num_sms)):
                    if wave * num_sms + sm < num_tiles:
                        pages = tile_pages[wave * num_sms + sm]
                        request = tile_request[wave * num_sms + sm]
                        if pages > 0:
                            T.copy(weights[(wave * num_sms + sm) * GROUPS, 0, 0], gate)
                            if form == "mask":
                                T.copy(thresholds[(wave * num_sms + sm) * GROUPS, 0], threshold)
                            T.barrier_wait(q_full, used & 1)
                            page = page_table[request, T.min(thread // 128, pages - 1)]
                            for n in T.serial(T.ceildiv(pages, consumers)):
                                for i in T.Parallel(stage_keys):
                                    k_scale[i] = scales[page * 33 + 32, i % PAGE_TOKENS]
                                # The next page id travels while this page is multiplied.
                                page = page_table[request, T.min((n + 1) * consumers + thread // 128, pages - 1)]
                                T.barrier_wait(full[consumed % STAGES], (consumed // STAGES) & 1)
                                T.gemm(
                                    k_shared[consumed % STAGES, :, :],
                                    q_shared,
                                    product,
                                    transpose_B=True,
                                    clear_accum=True,
                                    policy=T.GemmWarpPolicy.FullRow,
                                )
                                T.barrier_arrive(empty[consumed % STAGES])
                                T.clear(score)
                                for h in T.unroll(active_heads, explicit=True):
                                    for i, g, c in T.Parallel(stage_keys, GROUPS, GROUP_ROWS):
                                        score[i, g, c] = T.ieee_fmaf(
                                            T.max(product4[i, g, h, c], 0), gate[g, h, c], score[i, g, c]
                                        )
                                if form == "mask":
                                    for i, g, c in T.Parallel(stage_keys, GROUPS, GROUP_ROWS):
                                        # Every lane of a warp holds, and writes, the same word.
                                        out[
                                            wave * num_sms + sm,
                                            n * cells + i // WARP_KEYS,
                                            i // 8 % 2 * 4 + g * 2 + c % 2,
                                        ] = T.cast(
                                            T.ballot_sync(score[i, g, c] * k_scale[i] >= threshold[g, c]), "int32"
                                        )
                                elif form == "maxima":
                                    for i, g, c in T.Parallel(stage_keys, GROUPS, GROUP_ROWS):
                                        score[i, g, c] = score[i, g, c] * k_scale[i]
                                    T.reduce_max(score4, best, dim=1)
                                    for g, c, i in T.Parallel(GROUPS, GROUP_ROWS, stage_out):
                                        out[
                                            (wave * num_sms + sm) * TILE_ROWS + g * GROUP_ROWS + c, n * stage_out + i
                                        ] = best[i, g, c]
                                else:
                                    for g, c, i in T.Parallel(GROUPS, GROUP_ROWS, stage_keys):
                                        out[
                                            (wave * num_sms + sm) * TILE_ROWS + g * GROUP_ROWS + c, n * stage_keys + i
                                        ] = score[i, g, c] * k_scale[i]
                                consumed = consumed + 1
                            used = used + 1
                            T.barrier_arrive(q_empty)

    name = f"routed_{form}_a{active_heads}"
    return routed_scores.with_attr("global_symbol", name)


@functools.cache
def build(active_heads: int, form: Form, num_sms: int):
    """Compiled once per active head count and output form, whatever the batch."""
    return tilelang.compile(
        routed_scores_prim_func(active_heads, form, num_sms),
        target=TARGET,
        execution_backend="tvm_ffi",
        # The lanes of a warp store one word of the mask, the same from each; the check reads that as a race.
        pass_configs={**PASS_CONFIGS, tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: form == "mask"},
    )
