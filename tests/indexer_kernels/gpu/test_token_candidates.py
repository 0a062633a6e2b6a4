"""misa, and misa_rerank with single tokens as candidates, on a GPU: each kernel and the whole chain."""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_paged, select_rows
from indexer_kernels.gpu import pipeline, token_modes, work
from indexer_kernels.gpu.lists import Lists, empty_lists
from indexer_kernels.gpu.routed import route
from indexer_kernels.gpu.sample_kernel import list_width, sample_keys
from indexer_kernels.gpu.sample_threshold_kernel import Thresholds, sample_threshold
from indexer_kernels.gpu.token_modes import candidate_lists
from indexer_kernels.reference.candidates import token_candidates
from indexer_kernels.reference.routing import take_heads
from indexer_kernels.reference.scores import token_scores
from tests.support.compare import assert_form, assert_nothing_lost, overlap
from tests.support.exact_choice import exact_choice
from tests.support.gpu_calls import DECODE_LENGTHS, assert_a_graph_follows_the_lengths, work_of
from tests.support.inputs import Batch, make_batch, slots_of

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
def test_exact_choice(shape, budget, values):
    batch = make_batch(*shape, num_heads=32, device="cuda", seed=31)
    plan, params = batch.plan, IndexerParams(top_k=256, candidates=budget)
    scores = torch.randn(plan.num_rows, -(-plan.max_length // 64) * 64, device="cuda")
    if values == "ties":
        scores = (scores * 2).round()
    lists = chosen_by(batch, scores, params)
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 200)):
        length = int(plan.row_lengths[row])
        want = token_candidates(scores[row : row + 1, :length], plan.row_lengths[row : row + 1], params)[0].nonzero()
        count = int(lists.counts[row])
        assert torch.equal(lists.positions[row, :count].long(), want[:, 0])
        assert lists.slots[row, :count].tolist() == slots_of(batch, row, want[:, 0].tolist())


def chosen_by(batch: Batch, scores: torch.Tensor, params: IndexerParams) -> Lists:
    """Exactly the best tokens of each row by scores [M, >= tokens]."""
    plan = batch.plan
    rows = torch.arange(plan.num_rows, dtype=torch.int32, device="cuda")
    lists = empty_lists(plan.num_rows, params.candidates, True, scores.device)
    forced = (64, params.local_tokens)
    row_of = (rows, plan.row_lengths, plan.row_request, batch.page_table)
    exact_choice(scores, *row_of, lists, params.candidates, *forced)
    return lists


@pytest.mark.parametrize("num_heads", [64, 32, 8])
def test_token_scores(shape, num_heads):
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=32)
    plan = batch.plan
    noise = torch.randn(plan.num_rows, -(-plan.max_length // 64) * 64, device="cuda")
    lists, rows = chosen_by(batch, noise, SMALL), torch.arange(plan.num_rows, dtype=torch.int32, device="cuda")
    scores = token_modes.token_scores(work_of(batch, SMALL), batch.q, batch.weights, rows, lists)
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 200)):
        request, count = int(plan.row_request[row]), int(lists.counts[row])
        chosen = lists.positions[row, :count].long()
        keys = batch.k[request][chosen], batch.k_scale[request][chosen]
        assert_close(scores[row, :count], token_scores(batch.q[row : row + 1], batch.weights[row : row + 1], *keys)[0])


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("budget", [1024, 8192])
def test_lists_hold_the_best_by_routed_score(shape, budget):
    """Lists of the whole chain, sample, threshold, scan and expansion: the row's best tokens are all in them, and a
    list is unsure exactly when the sample misled it, which it does not in noise.
    """
    params = IndexerParams(top_k=256, route_block=256, candidates=budget)
    batch = make_batch(*shape, num_heads=64, device="cuda", seed=36)
    job, plan = work_of(batch, params), batch.plan
    routed = route(job)
    sample = sample_keys(batch.k_pages, batch.page_table, plan.request_lengths, plan.max_length)
    width = list_width(budget, plan.max_length, 128)
    forced = (64, params.local_tokens)
    lists = candidate_lists(job, routed, sample, slice(0, plan.num_tiles), budget, width, *forced)
    assert not lists.unsure.any()
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 100)):
        request, length, place = int(plan.row_request[row]), batch.lengths[row], int(plan.row_place[row])
        q, weights = take_heads(
            batch.q[row : row + 1], batch.weights[row : row + 1], routed.heads[row : row + 1].long()
        )
        scores = token_scores(q, weights, batch.k[request][:length], batch.k_scale[request][:length])
        want = token_candidates(scores, plan.row_lengths[row : row + 1], params)[0]
        listed = lists.positions[place, : int(lists.counts[place])].long()
        assert (listed.diff() > 0).all() and min(length, budget) <= len(listed) <= width
        missed = want.clone()
        missed[listed] = False
        assert not missed.any()
        assert lists.slots[place, : len(listed)].tolist() == slots_of(batch, row, listed.tolist())


@pytest.mark.parametrize("mode", ["misa", "misa_rerank"])
def test_rows_whose_sample_misled_select_the_same(mode, monkeypatch):
    """Thresholds that let nothing or everything through, or what they should: the selection is the same."""
    batch = make_batch([9000, 4001], [129, 63], num_heads=64, device="cuda", seed=37)
    want = select_rows(mode, *batch.paged, SMALL, backend="reference")

    def misled(scores, rows, *args):
        found = sample_threshold(scores, rows, *args)
        turn = torch.arange(len(rows), device="cuda") % 3
        wrong = torch.where(turn == 0, float("inf"), torch.where(turn == 1, float("-inf"), found.scores))
        return Thresholds(wrong, found.limits)

    monkeypatch.setattr(token_modes, "sample_threshold", misled)
    got = pipeline.select_rows(mode, *batch.paged, SMALL)
    native = want if mode == "misa" else select_rows("native", *batch.paged, SMALL, backend="reference")
    assert_nothing_lost(got, want, native, 0.015)


@pytest.mark.parametrize("params", [SMALL, DEFAULT], ids=["small", "default"])
@pytest.mark.parametrize("num_heads", [64, 32])
@pytest.mark.parametrize(
    ("statistic", "block", "active"), [("sum", 256, 8), ("max", 64, 8), ("max", 128, 16), ("sum", 256, 4)]
)
def test_finds_what_the_reference_finds(statistic, block, active, num_heads, params, shape):
    """Of native's tokens, every one that the reference finds and no fewer: its candidates are the reference's, and more
    of them.
    """
    params = dataclasses.replace(params, route_statistic=statistic, route_block=block, active_heads=active)
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=33)
    got = pipeline.select_rows("misa_rerank", *batch.paged, params)
    assert_form(got, batch.lengths, params.top_k)
    want = select_rows("misa_rerank", *batch.paged, params, backend="reference")
    native = select_rows("native", *batch.paged, params, backend="reference")
    # A head that rounding tips moves a row's candidates.
    assert_nothing_lost(got, want, native, 0.01)


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


@pytest.mark.parametrize("length", [10240, 10241, 5000])
def test_budget_that_covers_the_row_is_native(length):
    batch = make_batch([length], [3], num_heads=64, device="cuda", seed=35)
    got = pipeline.select_rows("misa_rerank", *batch.paged, DEFAULT)
    want = pipeline.select_rows("native", *batch.paged, DEFAULT)
    rows = [row for row, seen in enumerate(batch.lengths) if seen <= DEFAULT.candidates]
    assert overlap(got[rows].cpu(), want[rows].cpu()) > 0.999


@pytest.mark.parametrize("mode", ["misa", "misa_rerank"])
def test_batch_chunks_and_slices_do_not_matter(mode, monkeypatch):
    """A request's rows select the same alone, in a batch with a longer one, in two chunks, and in slices of scratch."""
    both = make_batch([5000, 20000], [96, 128], device="cuda", seed=38)
    together = pipeline.select_rows(mode, *both.paged, SMALL).sort(dim=1).values
    ragged = (both.k_all, both.k_scale_all)
    for rows in (slice(0, 96), slice(96, 160), slice(160, 224)):
        tensors = (both.q[rows], both.weights[rows], *ragged, both.ks[rows], both.ke[rows])
        assert (pipeline.select_ragged(mode, *tensors, SMALL).sort(dim=1).values == together[rows]).all()
    monkeypatch.setattr(work, "SCRATCH_BYTES", 1 << 20)
    assert (pipeline.select_rows(mode, *both.paged, SMALL).sort(dim=1).values == together).all()


def test_decode_in_a_graph_follows_the_lengths():
    batch = make_batch(DECODE_LENGTHS, 1, device="cuda", seed=39)
    lengths = batch.plan.row_lengths.clone()

    def select() -> torch.Tensor:
        tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table, lengths)
        return select_paged("misa_rerank", *tensors, SMALL, "gpu")

    assert_a_graph_follows_the_lengths(select, lengths, SMALL.top_k)


def test_scratch_is_bounded():
    batch = make_batch([30000], [2048], device="cuda", seed=40)
    for mode in ("misa", "misa_rerank"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pipeline.select_rows(mode, *batch.paged, DEFAULT, top_k_kernel=lambda *_: None)
        assert torch.cuda.max_memory_allocated() - before < 1.5 * work.SCRATCH_BYTES
