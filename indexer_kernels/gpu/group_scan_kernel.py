"""TileLang body of group_rerank's scan: every visible token against all heads of each group's proxy, in fp8.

The keys come to their products as `key_scan_kernel` brings them, as in `routed_scores_kernel`, but the order of the
columns is another: (four places, pair of heads, place, head of the pair). A quad of lanes holds 8 neighbouring columns
of a product, two to a lane. So a lane has all heads of one place and key, their sum never leaves it, and its gates fit
its registers, 64 of them for 64 heads as for 32.
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

COLUMNS = 256  # of the widest wgmma
QUAD = 4  # lanes that share the columns of a product, and places whose bits for 8 keys make one word
WORDS = TILE_ROWS // QUAD * 2  # of a cell of 16 keys and a tile
STAGE_PAGES = 2  # one for each consumer warpgroup
Form = Literal["scores", "mask"]


def unit_rows(num_heads: int) -> int:
    """Places that one product holds: 4 of 64 heads, 8 of 32."""
    return COLUMNS // num_heads


def group_scan_prim_func(num_heads: int, form: Form, num_sms: int):
    """out of the places of each tile over `tile_pages` pages of its request, in one of two forms.

    "scores": f32 [tiles * TILE_ROWS, keys]. "mask": int32 [tiles, keys / 16, WORDS], a bit set where the score reaches
    the place's threshold, laid out as `routed_scores_kernel` lays out tiles of 32 rows: of a cell of 16 keys it is word
    8 * ((key % 16) // 8) + 2 * (place // 8) + place % 2, bit 4 * (key % 8) + (place % 8) // 2. So the four places of a
    word, quad 2 * (place // 8) + place % 2 of the tile, are every second one of 8.

    q, gate: (quad, pair of heads, place of the quad, head of the pair), as `group_proxy_kernel` writes them. rows and
    thresholds [places]: rows -1 at a place without a group, whose output is anything. A tile's places are filled from
    the front; a product without a group is left out. Only "mask" reads thresholds. split_ids [S] int32 says into how
    many shares the keys of each unit of places go: 0 .. S - 1.
    """
    quads, pairs = unit_rows(num_heads) // QUAD, num_heads // 2
    units = TILE_ROWS // QUAD // quads
    stage_keys = STAGE_PAGES * PAGE_TOKENS
    cells = stage_keys // WARP_KEYS
    num_tiles, pool_pages, splits = T.dynamic("num_tiles"), T.dynamic("pool_pages"), T.dynamic("splits")
    num_requests, table_width, out_stages = T.dynamic("num_requests"), T.dynamic("table_width"), T.dynamic("out_stages")
    num_units = num_tiles * units

    if form == "mask":
        out_shape, out_type = (num_tiles, out_stages * cells, WORDS), "int32"
    else:
        out_shape, out_type = (num_tiles * TILE_ROWS, out_stages * stage_keys), "float32"

    scan = key_scan(COLUMNS, STAGE_PAGES, units, num_tiles, splits, num_sms)

    @T.macro
    def unit_pages(rows, tile_pages, quad: T.Ref, unit: T.Ref):
        pages = T.alloc_var("int32")
        quad = unit % units * quads
        pages = tile_pages[unit // units]
        if rows[unit // units * TILE_ROWS + quad // 2 * 8 + quad % 2] < 0:
            pages = 0
        return pages

    @T.macro
    def load_unit(gates, thresholds, gate, threshold, quad: T.Ref, unit: T.Ref):
        for g, h, r, d in T.Parallel(quads, pairs, QUAD, 2):
            gate[g, h, r, d] = gates[unit * quads + g, h, r, d] * PRODUCT_LIMIT
        if form == "mask":
            for g, r in T.Parallel(quads, QUAD):
                threshold[g, r] = thresholds[unit // units * TILE_ROWS + (quad + g) // 2 * 8 + r * 2 + (quad + g) % 2]

    @T.macro
    def sum_up(gate, threshold, out, quad: T.Ref, unit: T.Ref, first: T.Ref, n, product, k_scale):
        product5 = T.reshape(product, (stage_keys, quads, pairs, QUAD, 2))
        # Two sums, of every second head: each addition waits for the one before it in its own sum.
        sums = T.alloc_fragment((stage_keys, quads, QUAD, 2), "float32")
        score = T.alloc_fragment((stage_keys, quads, QUAD), "float32")
        T.clear(sums)
        for h in T.unroll(pairs, explicit=True):
            for i, g, r, d in T.Parallel(stage_keys, quads, QUAD, 2):
                sums[i, g, r, d] = T.ieee_fmaf(relu_share(product5[i, g, h, r, d]), gate[g, h, r, d], sums[i, g, r, d])
        T.reduce_sum(sums, score, dim=3)
        if form == "mask":
            for i, g, r in T.Parallel(stage_keys, quads, QUAD):
                # Every lane of a warp holds, and writes, the same word.
                out[unit // units, (first + n) * cells + i // WARP_KEYS, i // 8 % 2 * (WORDS // 2) + quad + g] = T.cast(
                    T.ballot_sync(score[i, g, r] * k_scale[i] >= threshold[g, r]), "int32"
                )
        else:
            for g, r, i in T.Parallel(quads, QUAD, stage_keys):
                out[
                    unit // units * TILE_ROWS + (quad + g) // 2 * 8 + r * 2 + (quad + g) % 2,
                    (first + n) * stage_keys + i,
                ] = score[i, g, r] * k_scale[i]

    @T.prim_func
    def group_scan(
        q: T.Tensor((num_units * COLUMNS, HEAD_DIM), FP8),
        gates: T.Tensor((num_units * quads, pairs, QUAD, 2), "float32"),
        keys: T.Tensor((pool_pages * 66, HEAD_DIM), FP8),
        scales: T.Tensor((pool_pages * 33, PAGE_TOKENS), "float32"),
        page_table: T.Tensor((num_requests, table_width), "int32"),
        rows: T.Tensor((num_tiles * TILE_ROWS,), "int32"),
        tile_request: T.Tensor((num_tiles,), "int32"),
        tile_pages: T.Tensor((num_tiles,), "int32"),
        thresholds: T.Tensor((num_tiles * TILE_ROWS,), "float32"),
        split_ids: T.Tensor((splits,), "int32"),
        out: T.Tensor(out_shape, out_type),
    ):
        with T.Kernel(num_sms, threads=(STAGE_PAGES + 1) * 128) as sm:
            gate = T.alloc_fragment((quads, pairs, QUAD, 2), "float32")
            threshold = T.alloc_fragment((quads, QUAD), "float32")
            quad = T.alloc_var("int32")
            scan(
                sm,
                q,
                keys,
                scales,
                page_table,
                tile_request,
                functools.partial(unit_pages, rows, tile_pages, quad),
                functools.partial(load_unit, gates, thresholds, gate, threshold, quad),
                functools.partial(sum_up, gate, threshold, out, quad),
            )

    return group_scan.with_attr("global_symbol", f"group_scan_{form}_h{num_heads}")


@build_once
def build(num_heads: int, form: Form, num_sms: int):
    """Compiled once per model shape and output form, whatever the batch."""
    return tilelang.compile(
        group_scan_prim_func(num_heads, form, num_sms),
        target=TARGET,
        execution_backend="tvm_ffi",
        pass_configs=configs(form),
    )


def configs(form: Form) -> dict:
    # The lanes of a warp store one word of the mask, the same from each; the check reads that as a race.
    return {**PASS_CONFIGS, tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: form == "mask"}
