"""Each kernel of the gpu backend against its reference step, on awkward sizes and poisoned memory."""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import block_score_kernel, head_route_kernel
from indexer_kernels.gpu import work as gpu_work
from indexer_kernels.gpu.deep_gemm_logits import paged_logits
from indexer_kernels.gpu.routed import cache_keys, route, routed_scan, whole_stages
from indexer_kernels.gpu.routed_scores_kernel import unit_rows
from indexer_kernels.gpu.work import pages_of, table_pages
from indexer_kernels.reference.candidates import visible_units
from indexer_kernels.reference.routing import routing_scores
from indexer_kernels.reference.scores import block_scores, token_scores
from indexer_kernels.reference.statistics import block_means
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.gpu_calls import work_of
from tests.support.inputs import Batch, make_batch
from tests.support.page_choice import check_choice, score_columns

pytestmark = pytest.mark.gpu

# fp8 products are exact in float32; what remains is the order of summation and the tensor core's accumulation.
FP8_SCORE = 1e-3
BF16_MEAN = 4e-3  # means are rounded to bfloat16 once

SHAPES = {
    "one row, one key": ([1], [1]),
    "63 rows": ([63], [63]),
    "4001 rows": ([4001], [4001]),
    "last rows of several": ([131, 2500, 1, 4001], [131, 40, 1, 65]),
}
PARAMS = IndexerParams(top_k=256, active_heads=8, route_block=256, candidates=1024, block_size=128, top_blocks=8)


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert got.isfinite().all()
    assert want.norm() > 0
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < relative, f"relative error {error:.2e}, allowed {relative:.0e}"


def request_rows(batch: Batch, request: int) -> torch.Tensor:
    return (batch.plan.row_request == request).nonzero().squeeze(1)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=[64, 32], ids=["H64", "H32"])
def batch(request, shape):
    return make_batch(*shape, num_heads=request.param, device="cuda", seed=3)


@pytest.mark.parametrize("block", [64, 128, 1024])
def test_block_means(batch, block):
    means = gpu_work.block_means(work_of(batch, PARAMS), block)
    for request, (k, k_scale) in enumerate(zip(batch.k, batch.k_scale)):
        full = len(k) // block
        if full:
            assert_close(means[request, :full].float(), block_means(k, k_scale, block), BF16_MEAN)
        assert (means[request, full:] == 0).all(), "blocks that are not full must be zero"


@pytest.mark.parametrize(("statistic", "route_block"), [("sum", 256), ("max", 64)])
@pytest.mark.parametrize("active_heads", [4, 8, 16])
def test_head_route_takes_the_heads_of_largest_routing_score(batch, active_heads, statistic, route_block):
    params = dataclasses.replace(PARAMS, active_heads=active_heads, route_statistic=statistic, route_block=route_block)
    work = work_of(batch, params)
    means = gpu_work.block_means(work, params.route_block)
    heads = torch.full((batch.plan.num_rows, active_heads), -1, dtype=torch.int32, device="cuda")
    head_route_kernel.build(batch.q.shape[1], active_heads, params.route_block, statistic)(
        batch.q.view(-1, 128),
        batch.weights,
        means,
        batch.plan.row_lengths,
        batch.plan.tile_request,
        batch.plan.tile_rows,
        heads,
    )
    assert (heads.sort(dim=1).values.diff(dim=1) > 0).all(), "heads of a row must be distinct"
    for request in range(len(batch.k)):
        rows = request_rows(batch, request)
        num_blocks = batch.plan.row_lengths[rows] // params.route_block
        exact = block_means(batch.k[request], batch.k_scale[request], params.route_block)
        # Tight against the means the kernel read, loose against means that were never rounded. Rounding moves a routing
        # score by a share of sum_b |w| sum_d |q_d mean_d|, which relu's arguments may cancel to nearly nothing.
        for statistics, rounding in ((means[request].float(), 2.0**-13), (exact, 2.0**-9)):
            routing = routing_scores(batch.q[rows], batch.weights[rows], statistics, num_blocks, statistic)
            magnitudes = batch.q[rows].float().abs(), batch.weights[rows], statistics.abs()
            reach = routing_scores(*magnitudes, num_blocks, statistic)
            taken = routing.gather(1, heads[rows].long()).sort(dim=1, descending=True).values
            best = routing.sort(dim=1, descending=True).values[:, :active_heads]
            assert (best - taken <= 2 * rounding * reach.amax(dim=1, keepdim=True)).all()
        without = num_blocks == 0
        first = torch.arange(active_heads, dtype=torch.int32, device="cuda")
        assert (heads[rows][without].sort(dim=1).values == first).all(), "ties go to the lower head"


@pytest.mark.parametrize("active_heads", [4, 8, 16])
def test_routed_scan_in_its_three_forms(batch, active_heads):
    params = dataclasses.replace(PARAMS, active_heads=active_heads)
    work = work_of(batch, params)
    routed = route(work)
    plan = batch.plan
    width = whole_stages(table_pages(work), active_heads)
    pages, tiles = pages_of(plan.tile_length), slice(0, plan.num_tiles)
    keys = cache_keys(work)
    tokens = routed_scan(work, routed, keys, pages, tiles, width, "scores")
    maxima = routed_scan(work, routed, keys, pages, tiles, width, "maxima")
    thresholds = torch.randn(plan.num_tiles * TILE_ROWS, device="cuda")
    mask = routed_scan(work, routed, keys, pages, tiles, width, "mask", thresholds).cpu()
    # The packed queries say which heads the kernel scored: unpack them for the reference.
    q = routed.q.view(torch.uint8).view(plan.num_tiles, TILE_ROWS // 8, active_heads, 8, 128).permute(0, 1, 3, 2, 4)
    q = q.reshape(-1, active_heads, 128).view(torch.float8_e4m3fn)
    gate = routed.gate.view(-1, active_heads, 8).permute(0, 2, 1).reshape(-1, active_heads)
    for request in range(len(batch.k)):
        rows = request_rows(batch, request)
        places = plan.row_place[rows].long()
        want = token_scores(q[places], gate[places], batch.k[request], batch.k_scale[request])
        length = want.shape[1]
        visible = visible_units(plan.row_lengths[rows], length, 1)
        assert_close(tokens[places, :length][visible], want[visible], FP8_SCORE)
        full = length // 16
        if full:
            best = want[:, : full * 16].view(len(rows), full, 16).amax(dim=2)
            ends = (torch.arange(full, device="cuda") + 1) * 16 <= plan.row_lengths[rows][:, None]
            if ends.any():
                assert_close(maxima[places, :full][ends], best[ends], FP8_SCORE)
        for row, place in list(zip(rows.tolist(), places.tolist()))[:: max(1, len(rows) // 50)]:
            seen = int(plan.row_lengths[row])
            key, (unit, inside) = torch.arange(seen), divmod(place, unit_rows(active_heads))
            word = mask[unit, key // 16, key % 16 // 8 * (mask.shape[2] // 2) + inside // 8 * 2 + inside % 2]
            bits = (word >> (key % 8 * 4 + inside % 8 // 2)) & 1
            assert torch.equal(bits.bool(), (tokens[place, :seen] >= thresholds[place]).cpu())


def test_block_score(batch):
    work = work_of(batch, PARAMS)
    plan = batch.plan
    means = gpu_work.block_means(work, PARAMS.block_size)
    scores = torch.full((plan.num_tiles * TILE_ROWS, means.shape[1]), float("nan"), device="cuda")
    for splits in (1, 3):
        block_score_kernel.build(batch.q.shape[1], PARAMS.block_size)(
            batch.q.view(-1, 128),
            batch.weights,
            means,
            plan.tile_request,
            plan.tile_rows,
            plan.tile_length,
            torch.arange(splits, dtype=torch.int32, device="cuda"),
            scores.fill_(float("nan")),
            0,
        )
        for request in range(len(batch.k)):
            rows = request_rows(batch, request)
            want = block_scores(batch.q[rows], batch.weights[rows], means[request].float())
            full = visible_units(plan.row_lengths[rows] // PARAMS.block_size, means.shape[1], 1)
            if full.any():
                assert_close(scores[plan.row_place[rows].long()][full], want[full], FP8_SCORE)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("budget", "unit_pages", "values"), [(8, 1, 4), (16, 2, 1), (128, 1, 1)])
def test_page_select_is_exact(shape, budget, unit_pages, values, ties):
    batch = make_batch(*shape, device="cuda", seed=5)
    columns = score_columns(batch, unit_pages, values)
    scores = torch.randn(batch.plan.num_tiles * TILE_ROWS, columns, device="cuda")
    if ties:
        scores = (scores * 2).round() * torch.where(torch.rand_like(scores) < 0.5, 1.0, -1.0)
    check_choice(batch, scores, budget, unit_pages, values)


def test_paged_logits_of_chosen_pages(batch):
    for request in range(len(batch.k)):
        rows = request_rows(batch, request)[-3:]
        length = len(batch.k[request])
        pages = list(range(0, -(-length // 64), 2))
        count = sum(min(64, length - 64 * page) for page in pages)
        table = batch.page_table[request][pages].expand(len(rows), -1).contiguous()
        counts = torch.full((len(rows),), count, dtype=torch.int32, device="cuda")
        got = paged_logits(batch.q[rows], batch.weights[rows], batch.k_pages, table, counts)[:, :count]
        tokens = torch.cat([torch.arange(64 * page, min(64 * page + 64, length)) for page in pages])
        want = token_scores(
            batch.q[rows], batch.weights[rows], batch.k[request][tokens.cuda()], batch.k_scale[request][tokens.cuda()]
        )
        assert_close(got, want, FP8_SCORE)
