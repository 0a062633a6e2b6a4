"""TileLang body of the routed scan: every visible token against the few routed heads of its row, in fp8.

A persistent CTA takes shares of the keys of a tile's rows. One producer warp streams the request's pages through a ring
of shared-memory stages by TMA; each consumer warpgroup owns one page of a stage (64 keys are the A operand of its
wgmma). The 8 rows of a group sit innermost in the columns, (group, head, row), so the sum over heads never leaves a
thread. The warpgroups take turns with the tensor cores, so that one multiplies while another sums up.

What leaves the chip is one of three forms: every score, the best score of 16 keys, or one bit a key, set where the
score reaches a threshold of its row (a 32nd of the bytes). In a bit's word stand 8 keys of 4 rows, as the lanes of a
warp hold them.
"""

import functools
from typing import Literal

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.relu_kernel import PRODUCT_LIMIT, relu_share
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS, PASS_CONFIGS, TARGET, WARP_KEYS
from indexer_kernels.row_plan import TILE_ROWS

GROUP_ROWS = 8
STAGES = 4
PRODUCER_REGISTERS = 24
MOST_COLUMNS = 256  # the widest wgmma
TURN = 1  # the first of the named barriers that hand the tensor cores on; 0 is the CTA's own
Form = Literal["scores", "maxima", "mask"]


def unit_rows(active_heads: int) -> int:
    """Rows that one product holds: a tile, or half of one with 16 heads.

    The wider a product, the less often a key is read from L2 and shared memory.
    """
    return min(TILE_ROWS, MOST_COLUMNS // active_heads)


def stage_pages(active_heads: int) -> int:
    """Pages per stage, one for each consumer warpgroup: as many as their accumulators leave registers for."""
    return 2 if unit_rows(active_heads) * active_heads > 128 else 3


def mask_words(active_heads: int) -> int:
    """32-bit words of a cell of 16 keys and one unit's rows."""
    return unit_rows(active_heads) * WARP_KEYS // 32


def routed_scores_prim_func(active_heads: int, form: Form, num_sms: int):
    """The prim_func. Only "mask" reads `thresholds`; the other forms take any tensor of that shape.

    out is f32 [tiles * TILE_ROWS, keys] of "scores", f32 [tiles * TILE_ROWS, keys / 16] of "maxima", and of "mask"
    int32 [units, keys / 16, words], a unit being unit_rows places. Of a cell of 16 keys it is word words / 2 * ((key %
    16) // 8) + 2 * (place // 8) + place % 2, bit 4 * (key % 8) + (place % 8) // 2, place counted in the unit.

    split_ids [S] int32 says into how many shares the keys of each unit go: 0 .. S - 1.
    """
    rows, consumers = unit_rows(active_heads), stage_pages(active_heads)
    units, groups, words = TILE_ROWS // rows, rows // GROUP_ROWS, mask_words(active_heads)
    consumer_registers = 240 if consumers == 2 else 160
    stage_keys = consumers * PAGE_TOKENS
    columns = rows * active_heads
    cells = stage_keys // WARP_KEYS
    stage_out = stage_keys if form == "scores" else cells
    num_tiles, pool_pages, splits = T.dynamic("num_tiles"), T.dynamic("pool_pages"), T.dynamic("splits")
    num_requests, table_width, out_stages = T.dynamic("num_requests"), T.dynamic("table_width"), T.dynamic("out_stages")
    num_units = num_tiles * units

    if form == "mask":
        out_shape, out_type = (num_units, out_stages * cells, words), "int32"
    else:
        out_shape, out_type = (num_units * rows, out_stages * stage_out), "float32"

    @T.prim_func
    def routed_scores(
        q: T.Tensor((num_units * columns, HEAD_DIM), FP8),
        weights: T.Tensor((num_units * groups, active_heads, GROUP_ROWS), "float32"),
        keys: T.Tensor((pool_pages * 66, HEAD_DIM), FP8),
        scales: T.Tensor((pool_pages * 33, PAGE_TOKENS), "float32"),
        page_table: T.Tensor((num_requests, table_width), "int32"),
        tile_request: T.Tensor((num_tiles,), "int32"),
        tile_pages: T.Tensor((num_tiles,), "int32"),
        thresholds: T.Tensor((num_units * groups, GROUP_ROWS), "float32"),
        split_ids: T.Tensor((splits,), "int32"),
        out: T.Tensor(out_shape, out_type),
    ):
        with T.Kernel(num_sms, threads=(consumers + 1) * 128) as sm:
            q_shared = T.alloc_shared((columns, HEAD_DIM), FP8)
            k_shared = T.alloc_shared((STAGES, stage_keys, HEAD_DIM), FP8)
            product = T.alloc_fragment((stage_keys, columns), "float32")
            product4 = T.reshape(product, (stage_keys, groups, active_heads, GROUP_ROWS))
            score = T.alloc_fragment((stage_keys, groups, GROUP_ROWS), "float32")
            score4 = T.reshape(score, (cells, WARP_KEYS, groups, GROUP_ROWS))
            best = T.alloc_fragment((cells, groups, GROUP_ROWS), "float32")
            gate = T.alloc_fragment((groups, active_heads, GROUP_ROWS), "float32")
            threshold = T.alloc_fragment((groups, GROUP_ROWS), "float32")
            k_scale = T.alloc_fragment((stage_keys,), "float32")
            full = T.alloc_barrier([1] * STAGES)
            empty = T.alloc_barrier([consumers * 128] * STAGES)
            q_full, q_empty = T.alloc_barrier(1), T.alloc_barrier(consumers * 128)
            produced, consumed = T.alloc_var("int32"), T.alloc_var("int32")
            loaded, used = T.alloc_var("int32"), T.alloc_var("int32")
            unit, first, last = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            request, pages, page = T.alloc_var("int32"), T.alloc_var("int32"), T.alloc_var("int32")
            produced = 0
            consumed = 0
            loaded = 0
            used = 0
            thread = T.get_thread_binding()
            if thread >= consumers * 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < consumers * 128 + 32:
                    for wave in T.serial(T.ceildiv(num_units * splits, num_sms)):
                        if wave * num_sms + sm < num_units * splits:
                            unit = (wave * num_sms + sm) // splits
                            pages = tile_pages[unit // units]
                            request = tile_request[unit // units]
                            first = (wave * num_sms + sm) % splits * T.ceildiv(T.ceildiv(pages, consumers), splits)
                            last = T.min(
                                first + T.ceildiv(T.ceildiv(pages, consumers), splits), T.ceildiv(pages, consumers)
                            )
                            if first < last:
                                T.barrier_wait(q_empty, (loaded & 1) ^ 1)
                                T.tma_copy(q[unit * columns, 0], q_shared, barrier=q_full, leader_scope_threads=32)
                                if T.shuffle_elect(32):
                                    T.barrier_arrive(q_full)
                                loaded = loaded + 1
                                for n in T.serial(last - first):
                                    T.barrier_wait(empty[produced % STAGES], ((produced // STAGES) & 1) ^ 1)
                                    for c in T.unroll(consumers, explicit=True):
                                        # The table is garbage past the last page: read that page again instead.
                                        page = page_table[request, T.min((first + n) * consumers + c, pages - 1)]
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
                if thread >= (consumers - 1) * 128:
                    # The last warpgroup gives the first one its first turn.
                    T.named_barrier_arrive(TURN, 256)
                for wave in T.serial(T.ceildiv(num_units * splits, num_sms)):
                    if wave * num_sms + sm < num_units * splits:
                        unit = (wave * num_sms + sm) // splits
                        pages = tile_pages[unit // units]
                        request = tile_request[unit // units]
                        first = (wave * num_sms + sm) % splits * T.ceildiv(T.ceildiv(pages, consumers), splits)
                        last = T.min(
                            first + T.ceildiv(T.ceildiv(pages, consumers), splits), T.ceildiv(pages, consumers)
                        )
                        if first < last:
                            for g, h, c in T.Parallel(groups, active_heads, GROUP_ROWS):
                                gate[g, h, c] = weights[unit * groups + g, h, c] * PRODUCT_LIMIT
                            if form == "mask":
                                for g, c in T.Parallel(groups, GROUP_ROWS):
                                    threshold[g, c] = thresholds[unit * groups + g, c]
                            T.barrier_wait(q_full, used & 1)
                            page = page_table[request, T.min(first * consumers + thread // 128, pages - 1)]
                            for n in T.serial(last - first):
                                for i in T.Parallel(stage_keys):
                                    k_scale[i] = scales[page * 33 + 32, i % PAGE_TOKENS]
                                # The next page id travels while this page is multiplied.
                                page = page_table[
                                    request, T.min((first + n + 1) * consumers + thread // 128, pages - 1)
                                ]
                                T.barrier_wait(full[consumed % STAGES], (consumed // STAGES) & 1)
                                T.sync_threads(thread // 128 + TURN, 256)
                                T.wgmma_gemm(
                                    k_shared[consumed % STAGES, :, :],
                                    q_shared,
                                    product,
                                    transpose_B=True,
                                    clear_accum=True,
                                    policy=T.GemmWarpPolicy.FullRow,
                                )
                                # Its products are queued: the next warpgroup's follow, while this one's are summed up.
                                T.named_barrier_arrive((thread // 128 + 1) % consumers + TURN, 256)
                                T.wait_wgmma(0)
                                T.warpgroup_fence_operand(product, num_regs=columns // 2)
                                T.barrier_arrive(empty[consumed % STAGES])
                                T.clear(score)
                                for h in T.unroll(active_heads, explicit=True):
                                    for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                                        score[i, g, c] = T.ieee_fmaf(
                                            relu_share(product4[i, g, h, c]), gate[g, h, c], score[i, g, c]
                                        )
                                if form == "mask":
                                    for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                                        # Every lane of a warp holds, and writes, the same word.
                                        out[
                                            unit,
                                            (first + n) * cells + i // WARP_KEYS,
                                            i // 8 % 2 * (words // 2) + g * 2 + c % 2,
                                        ] = T.cast(
                                            T.ballot_sync(score[i, g, c] * k_scale[i] >= threshold[g, c]), "int32"
                                        )
                                elif form == "maxima":
                                    for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                                        score[i, g, c] = score[i, g, c] * k_scale[i]
                                    T.reduce_max(score4, best, dim=1)
                                    for g, c, i in T.Parallel(groups, GROUP_ROWS, stage_out):
                                        out[unit * rows + g * GROUP_ROWS + c, (first + n) * stage_out + i] = best[
                                            i, g, c
                                        ]
                                else:
                                    for g, c, i in T.Parallel(groups, GROUP_ROWS, stage_keys):
                                        out[unit * rows + g * GROUP_ROWS + c, (first + n) * stage_keys + i] = (
                                            score[i, g, c] * k_scale[i]
                                        )
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
