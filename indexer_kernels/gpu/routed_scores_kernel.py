"""TileLang body of the routed scan: every visible token against the few routed heads of its row, in fp8.

The keys come to their products as `key_scan_kernel` brings them. The 8 rows of a group sit innermost in the columns,
(group, head, row), so the sum over heads never leaves a thread.

What leaves the chip is one of three forms: every score, the best score of 16 keys, or one bit a key, set where the
score reaches a threshold of its row (a 32nd of the bytes). In a bit's word stand 8 keys of 4 rows, as the lanes of a
warp hold them.
"""

import functools
from typing import Literal

import tilelang
import tilelang.language as T

from indexer_kernels.gpu.build_once import build_once
from indexer_kernels.gpu.key_scan_kernel import key_scan
from indexer_kernels.gpu.relu_kernel import PRODUCT_LIMIT, relu_share
from indexer_kernels.gpu.target import FP8, HEAD_DIM, PAGE_TOKENS, PASS_CONFIGS, TARGET, WARP_KEYS
from indexer_kernels.row_plan import TILE_ROWS

GROUP_ROWS = 8
MOST_COLUMNS = 256  # the widest wgmma
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

    scan = key_scan(columns, consumers, units, num_tiles, splits, num_sms)

    @T.macro
    def load_unit(weights, thresholds, gate, threshold, unit: T.Ref):
        for g, h, c in T.Parallel(groups, active_heads, GROUP_ROWS):
            gate[g, h, c] = weights[unit * groups + g, h, c] * PRODUCT_LIMIT
        if form == "mask":
            for g, c in T.Parallel(groups, GROUP_ROWS):
                threshold[g, c] = thresholds[unit * groups + g, c]

    @T.macro
    def sum_up(gate, threshold, out, unit: T.Ref, first: T.Ref, n, product, k_scale):
        product4 = T.reshape(product, (stage_keys, groups, active_heads, GROUP_ROWS))
        score = T.alloc_fragment((stage_keys, groups, GROUP_ROWS), "float32")
        T.clear(score)
        for h in T.unroll(active_heads, explicit=True):
            for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                score[i, g, c] = T.ieee_fmaf(relu_share(product4[i, g, h, c]), gate[g, h, c], score[i, g, c])
        if form == "mask":
            for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                # Every lane of a warp holds, and writes, the same word.
                out[unit, (first + n) * cells + i // WARP_KEYS, i // 8 % 2 * (words // 2) + g * 2 + c % 2] = T.cast(
                    T.ballot_sync(score[i, g, c] * k_scale[i] >= threshold[g, c]), "int32"
                )
        elif form == "maxima":
            score4 = T.reshape(score, (cells, WARP_KEYS, groups, GROUP_ROWS))
            best = T.alloc_fragment((cells, groups, GROUP_ROWS), "float32")
            for i, g, c in T.Parallel(stage_keys, groups, GROUP_ROWS):
                score[i, g, c] = score[i, g, c] * k_scale[i]
            T.reduce_max(score4, best, dim=1)
            for g, c, i in T.Parallel(groups, GROUP_ROWS, cells):
                out[unit * rows + g * GROUP_ROWS + c, (first + n) * cells + i] = best[i, g, c]
        else:
            for g, c, i in T.Parallel(groups, GROUP_ROWS, stage_keys):
                out[unit * rows + g * GROUP_ROWS + c, (first + n) * stage_keys + i] = score[i, g, c] * k_scale[i]

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
            gate = T.alloc_fragment((groups, active_heads, GROUP_ROWS), "float32")
            threshold = T.alloc_fragment((groups, GROUP_ROWS), "float32")
            scan(
                sm,
                q,
                keys,
                scales,
                page_table,
                tile_request,
                lambda unit: tile_pages[unit // units],
                functools.partial(load_unit, weights, thresholds, gate, threshold),
                functools.partial(sum_up, gate, threshold, out),
            )

    name = f"routed_{form}_a{active_heads}"
    return routed_scores.with_attr("global_symbol", name)


@build_once
def build(active_heads: int, form: Form, num_sms: int):
    """Compiled once per active head count and output form, whatever the batch."""
    return tilelang.compile(
        routed_scores_prim_func(active_heads, form, num_sms),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=configs(form),
    )


def configs(form: Form) -> dict:
    # The lanes of a warp store one word of the mask, the same from each; the check reads that as a race.
    return {**PASS_CONFIGS, tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: form == "mask"}
