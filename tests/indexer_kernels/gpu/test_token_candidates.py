"""Candidates as single tokens on a GPU. The backend refuses them until these tests have passed on one, so they call the
pipeline itself.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.gpu import pipeline, token_rerank_kernel, token_select_kernel
from indexer_kernels.reference.candidates import token_candidates
from indexer_kernels.reference.scores import token_scores
from tests.support.compare import assert_form, overlap
from tests.support.inputs import make_batch, slots_of

pytestmark = pytest.mark.gpu

SHAPES = {
    "one row, one key": ([1], [1]),
    "63 rows": ([63], [63]),
    "4001 rows": ([4001], [4001]),
    "last rows of several": ([131, 9000, 1, 20000], [131, 401, 1, 63]),
}
SMALL = IndexerParams(top_k=256, route_block=256, candidates=1024, candidate_unit="token")
DEFAULT = IndexerParams(candidate_unit="token")


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("values", ["normal", "ties"])
@pytest.mark.parametrize("budget", [1024, 8192])
def test_token_select(shape, budget, values):
    batch = make_batch(*shape, num_heads=32, device="cuda", seed=31)
    plan, params = batch.plan, IndexerParams(top_k=256, candidates=budget)
    scores = torch.randn(plan.num_rows, -(-plan.max_length // 64) * 64, device="cuda")
    if values == "ties":
        scores = (scores * 2).round()
    found = token_select_kernel.empty_token_candidates(plan.num_rows, budget, scores.device)
    rows = torch.arange(plan.num_rows, dtype=torch.int32, device="cuda")
    token_select_kernel.token_select(
        scores, rows, plan.row_lengths, plan.row_request, batch.page_table, found, params.local_tokens
    )
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 200)):
        length = int(plan.row_lengths[row])
        want = token_candidates(scores[row : row + 1, :length], plan.row_lengths[row : row + 1], params)[0].nonzero()
        count = int(found.counts[row])
        assert torch.equal(found.positions[row, :count].long(), want[:, 0])
        assert found.slots[row, :count].tolist() == slots_of(batch, row, want[:, 0].tolist())


@pytest.mark.parametrize("num_heads", [64, 32])
def test_token_rerank(shape, num_heads):
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=32)
    plan, budget = batch.plan, 1024
    found = token_select_kernel.empty_token_candidates(plan.num_rows, budget, batch.q.device)
    scores = torch.randn(plan.num_rows, -(-plan.max_length // 64) * 64, device="cuda")
    rows = torch.arange(plan.num_rows, dtype=torch.int32, device="cuda")
    token_select_kernel.token_select(
        scores, rows, plan.row_lengths, plan.row_request, batch.page_table, found, SMALL.local_tokens
    )
    got = token_rerank_kernel.token_rerank(batch.q, batch.weights, batch.k_pages, found)
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 200)):
        request, count = int(plan.row_request[row]), int(found.counts[row])
        every = token_scores(
            batch.q[row : row + 1], batch.weights[row : row + 1], batch.k[request], batch.k_scale[request]
        )
        want = every[0, found.positions[row, :count].long()]
        error = (got[row, :count] - want).norm() / want.norm()
        assert error < 1e-3, f"row {row}: relative error {float(error):.2e}"


@pytest.mark.parametrize("params", [SMALL, DEFAULT], ids=["small", "default"])
@pytest.mark.parametrize("num_heads", [64, 32])
@pytest.mark.parametrize("statistic", ["sum", "max"])
def test_selects_what_the_reference_selects(statistic, num_heads, params, shape):
    params = dataclasses.replace(params, route_statistic=statistic)
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=33)
    got = pipeline.select_rows("misa_rerank", *batch.paged, params)
    assert_form(got, batch.lengths, params.top_k)
    want = select_rows("misa_rerank", *batch.paged, params, backend="reference")
    # A head that rounding tips moves a row's candidates, of which all heads then take the best again.
    assert overlap(got.cpu(), want.cpu()) >= 0.985


def test_slots_and_repetition():
    batch = make_batch([9000, 131], [70, 5], num_heads=64, device="cuda", seed=34)
    positions = pipeline.select_rows("misa_rerank", *batch.paged, DEFAULT)
    slots = pipeline.select_rows("misa_rerank", *batch.paged, DEFAULT, output="slot")
    again = pipeline.select_rows("misa_rerank", *batch.paged, DEFAULT)
    for row, length in enumerate(batch.lengths):
        count = min(length, DEFAULT.top_k)
        chosen = sorted(positions[row, :count].tolist())
        assert set(slots[row, :count].tolist()) == set(slots_of(batch, row, chosen))
        assert sorted(again[row, :count].tolist()) == chosen


@pytest.mark.parametrize("length", [8192, 8193, 5000])
def test_budget_that_covers_the_row_is_native(length):
    batch = make_batch([length], [3], num_heads=64, device="cuda", seed=35)
    got = pipeline.select_rows("misa_rerank", *batch.paged, DEFAULT)
    want = pipeline.select_rows("native", *batch.paged, DEFAULT)
    rows = [row for row, seen in enumerate(batch.lengths) if seen <= DEFAULT.candidates]
    assert overlap(got[rows].cpu(), want[rows].cpu()) > 0.999
