"""Runs misa and misa_rerank of the gpu backend in Triton's interpreter, on a CPU, against the references.

A program of its own, like `interpreted_kernels`; what multiplies matrices in TileLang, head routing, the scan and the
scores of a list, is computed by the reference.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_token_modes

Prints how many rows were compared; an assertion ends it.
"""

import dataclasses

import torch

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.gpu import (
    bit_list_kernel,
    keep_best_kernel,
    pipeline,
    sample_kernel,
    sample_threshold_kernel,
    token_modes,
    work,
)
from indexer_kernels.gpu.lists import Lists
from indexer_kernels.gpu.routed import Keys, Routed
from indexer_kernels.gpu.routed_scores_kernel import unit_rows
from indexer_kernels.gpu.work import Work
from indexer_kernels.reference.routing import route_heads, routing_scores
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.reference.statistics import block_means
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.compare import assert_form, assert_nothing_lost, overlap
from tests.support.emulated_cuda import build_bit_list, build_sample_threshold
from tests.support.inputs import Batch, make_batch
from tests.support.interpreted_kernels import packed_heads

PARAMS = IndexerParams(top_k=64, candidates=256, local_tokens=40, active_heads=4, route_block=64)
SHAPES = (([700, 131, 1, 385, 256], [6, 3, 1, 3, 2]), ([1500], [21]), ([2000, 1900], [3, 2]))


def float_route(batch: Batch):
    def route(job: Work) -> Routed:
        heads = torch.empty((job.plan.num_rows, job.params.active_heads), dtype=torch.int32)
        for row, request in enumerate(batch.row_request):
            means = block_means(batch.k[request], batch.k_scale[request], job.params.route_block)
            blocks = job.plan.row_lengths[row : row + 1] // job.params.route_block
            tensors = (job.q[row : row + 1], job.weights[row : row + 1], means, blocks)
            scores = routing_scores(*tensors, job.params.route_statistic)
            heads[row] = route_heads(scores, job.params.active_heads)[0].int()
        return Routed(heads, *packed_heads(batch, heads))

    return route


def float_scan(job, routed, scanned: Keys, tile_pages, tiles, width, form, thresholds=None) -> torch.Tensor:
    """`routed_scan` by the reference: NaN past a tile's pages, and no bit there."""
    packed, active = routed.of_tiles(tiles), job.params.active_heads
    count = tiles.stop - tiles.start
    q = packed.q.view(torch.uint8).view(-1, active, 8, 128).transpose(1, 2).reshape(count, TILE_ROWS, active, 128)
    gate = packed.gate.view(-1, active, 8).transpose(1, 2).reshape(count, TILE_ROWS, active)
    scores = torch.full((count, TILE_ROWS, width * 64), float("nan"))
    for tile in range(count):
        pages = int(tile_pages[tiles][tile])
        if not pages:
            continue
        page = scanned.page_table[int(job.plan.tile_request[tiles][tile]), :pages].long()
        keys = scanned.keys.view(torch.uint8).view(-1, 66, 128)[page, :64].reshape(-1, 128).view(torch.float8_e4m3fn)
        scales = scanned.scales.view(-1, 33, 64)[page, 32].flatten()
        scores[tile, :, : pages * 64] = token_scores(q[tile].view(torch.float8_e4m3fn), gate[tile], keys, scales)
    if form == "scores":
        return scores.view(count * TILE_ROWS, -1)
    return mask_of((scores >= thresholds.view(count, TILE_ROWS, 1)).view(-1, unit_rows(active), width * 64))


def mask_of(reached: torch.Tensor) -> torch.Tensor:
    """The scan's words of reached [units, rows, keys] bool: int32 [units, cells, words]."""
    rows, words = reached.shape[1], reached.shape[1] // 2
    mask = torch.zeros((len(reached), reached.shape[2] // 16, words), dtype=torch.int64)
    for inside in range(rows):
        for key in range(16):
            word = key // 8 * (words // 2) + inside // 8 * 2 + inside % 2
            mask[:, :, word] |= reached[:, inside, key::16].long() << (key % 8 * 4 + inside % 8 // 2)
    return torch.where(mask >= 1 << 31, mask - (1 << 32), mask).int()


def float_token_scores(job: Work, q, weights, rows, lists: Lists) -> torch.Tensor:
    scores = torch.full(lists.slots.shape, float("nan"))
    for place, row in enumerate(rows.tolist()):
        slots = lists.slots[place, : int(lists.counts[place])].long()
        if row >= 0 and len(slots):
            keys, scale = (
                job.pool.keys[slots // 64 * 66 + slots % 64],
                job.pool.scales[slots // 64 * 33 + 32, slots % 64],
            )
            scores[place, : len(slots)] = token_scores(q[row : row + 1], weights[row : row + 1], keys, scale)[0]
    return scores


def check_modes(batch: Batch) -> None:
    token_modes.route = float_route(batch)
    lengths = batch.lengths
    native = select_rows("native", *batch.paged, PARAMS, backend="reference")
    for mode in ("misa", "misa_rerank"):
        params = dataclasses.replace(PARAMS, candidate_unit="token")
        got = pipeline.select_rows(mode, *batch.paged, params)
        assert_form(got, lengths, params.top_k)
        want = select_rows(mode, *batch.paged, params, backend="reference")
        if mode == "misa":
            assert overlap(got, want) > 0.998, overlap(got, want)
        else:
            assert_nothing_lost(got, want, native, 0.001)
        slots = pipeline.select_rows(mode, *batch.paged, params, output="slot")
        table = batch.page_table[batch.plan.row_request.long()].long()
        back = torch.where(got >= 0, table.gather(1, got.clamp_min(0).long() // 64) * 64 + got % 64, -1)
        assert torch.equal(slots.long().sort(1).values, back.sort(1).values)


def main() -> None:
    keep_best_kernel.BLOCK = 512
    bit_list_kernel.build, sample_threshold_kernel.build = build_bit_list, build_sample_threshold
    token_modes.routed_scan, token_modes.token_scores = float_scan, float_token_scores
    token_modes.num_sms = lambda _device: 2
    compared = 0
    for scratch, sigmas in ((1 << 30, 5.0), (1 << 12, 0.0)):  # one slice or many; lists that hold, lists that do not
        work.SCRATCH_BYTES, sample_kernel.SIGMAS = scratch, sigmas
        for lengths, rows in SHAPES:
            batch = make_batch(lengths, rows, num_heads=32, seed=9)
            check_modes(batch)
            compared += batch.plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
