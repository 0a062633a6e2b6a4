"""A row's answer is the same, bit for bit, however its prompt was chunked, batched, sliced or laid out."""

from dataclasses import replace

import pytest
import torch

from indexer_kernels import select_ragged, select_rows
from indexer_kernels.reference import modes
from indexer_kernels.row_plan import plan_extend
from tests.support.inputs import make_batch
from tests.support.model_building import default_dtype
from tests.support.small import CASES, SMALL


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("borders", [(0, 64, 96), (0, 4, 8, 60, 96), (0, 92, 96)], ids=str)
def test_chunks(case, borders):
    """Rows in several calls equal one call; borders are multiples of the group, as SGLang's are."""
    mode, params = case
    batch = make_batch([496], [96], num_heads=4, seed=51)
    q, weights, k, k_scale, ks, ke = batch.ragged
    whole = select_ragged(mode, *batch.ragged, params)
    for begin, end in zip(borders, borders[1:]):
        rows = slice(begin, end)
        seen = int(ke[end - 1])  # a chunk's cache holds no later keys
        part = select_ragged(mode, q[rows], weights[rows], k[:seen], k_scale[:seen], ks[rows], ke[rows], params)
        assert torch.equal(part, whole[rows])


def test_one_row_at_a_time(case):
    """Also where a matrix product becomes a vector product."""
    mode, params = case
    params = replace(params, group=1)
    batch = make_batch([389], [24], num_heads=4, seed=52)
    q, weights, k, k_scale, ks, ke = batch.ragged
    whole = select_ragged(mode, *batch.ragged, params)
    for m in range(24):
        row, seen = slice(m, m + 1), int(ke[m])
        alone = select_ragged(mode, q[row], weights[row], k[:seen], k_scale[:seen], ks[row], ke[row], params)
        assert torch.equal(alone, whole[row])


def test_default_dtype(case):
    mode, params = case
    batch = make_batch([496], [24], num_heads=4, seed=54)
    whole = select_ragged(mode, *batch.ragged, params)
    with default_dtype(torch.bfloat16):
        assert torch.equal(select_ragged(mode, *batch.ragged, params), whole)


def test_batch_neighbours(case):
    mode, params = case
    batch = make_batch([300, 1, 512, 131], [12, 1, 24, 8], num_heads=4, seed=53)
    together = select_rows(mode, *batch.paged, params)
    begin = 0
    for request, count in enumerate([12, 1, 24, 8]):
        rows = slice(begin, begin + count)
        begin += count
        length = len(batch.k[request])
        plan = plan_extend([length - count], [count])
        table = batch.page_table[request : request + 1]
        alone = select_rows(mode, batch.q[rows], batch.weights[rows], batch.k_pages, table, plan, params)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("rows_per_slice", [1, 3, 7])
def test_row_slices(case, rows_per_slice, monkeypatch):
    mode, params = case
    batch = make_batch([500], [22], num_heads=4, seed=54)
    whole = select_ragged(mode, *batch.ragged, params)
    monkeypatch.setattr(modes, "SLICE_ELEMENTS", rows_per_slice * 500)
    assert torch.equal(select_ragged(mode, *batch.ragged, params), whole)


def test_layouts(case):
    mode, params = case
    batch = make_batch([300, 65, 512], [12, 3, 24], num_heads=4, seed=55)
    assert torch.equal(select_ragged(mode, *batch.ragged, params), select_rows(mode, *batch.paged, params))


def test_later_tokens_change_a_group_only_through_its_rows():
    """group_rerank scans what the group's first row would see, whichever of its rows are in the call."""
    batch = make_batch([403], [3], num_heads=4, seed=56)  # positions 400 .. 402
    q, weights, k, k_scale, ks, ke = batch.ragged
    same = [2, 2, 2]  # equal queries: the mean does not depend on how many of them are present
    q = q.view(torch.uint8)[same].view(torch.float8_e4m3fn)
    weights = weights[same]
    whole = select_ragged("group_rerank", q, weights, k, k_scale, ks, ke, SMALL)
    last = select_ragged("group_rerank", q[2:], weights[2:], k, k_scale, ks[2:], ke[2:], SMALL)
    assert torch.equal(last, whole[2:])


@pytest.mark.parametrize("mode", ["misa_rerank", "hisa", "group_rerank"])
def test_covering_budget_is_bitwise_native(mode):
    batch = make_batch([500, 192], [20, 20], num_heads=5, seed=57)
    params = replace(SMALL, candidates=512, top_blocks=16)
    assert torch.equal(select_ragged(mode, *batch.ragged, params), select_ragged("native", *batch.ragged, params))


def test_misa_with_all_heads_is_bitwise_native():
    batch = make_batch([500], [20], num_heads=5, seed=58)
    for active_heads in (5, 8):
        params = replace(SMALL, active_heads=active_heads)
        assert torch.equal(select_ragged("misa", *batch.ragged, params), select_ragged("native", *batch.ragged, params))


@pytest.mark.parametrize("mode", ["misa", "misa_rerank"])
def test_rows_without_a_full_block_are_native(mode):
    """route_block above every length but the last row's: only that row is routed."""
    batch = make_batch([450], [20], num_heads=8, seed=59)
    params = replace(SMALL, route_block=450)
    native = select_ragged("native", *batch.ragged, params)
    got = select_ragged(mode, *batch.ragged, params)
    assert torch.equal(got[:19], native[:19])
    assert set(got[19].tolist()) != set(native[19].tolist())
