"""Empty batches, masked rows, poison, garbage and strides: what a server hands over sooner or later."""

from dataclasses import replace

import pytest
import torch

from indexer_kernels import MODES, select_paged, select_ragged, select_rows
from indexer_kernels.row_plan import plan_extend, plan_rows
from tests.support.compare import assert_form, assert_same_selection
from tests.support.inputs import NAN_BYTE, make_batch
from tests.support.small import CASES, SMALL, brute_force_batch


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_keys", [0, 10])
def test_no_rows(mode, num_keys):
    batch = make_batch([num_keys], [0], num_heads=3)
    assert select_ragged(mode, *batch.ragged, SMALL).shape == (0, 64)
    assert select_rows(mode, *batch.paged, SMALL).shape == (0, 64)
    seq_lens = torch.empty(0, dtype=torch.int32)
    table = torch.empty((0, 4), dtype=torch.int32)
    got = select_paged(mode, batch.q, batch.weights, batch.k_pages, table, seq_lens, SMALL)
    assert got.shape == (0, 64) and got.dtype == torch.int32


def test_no_requests():
    batch = make_batch([], [], num_heads=3)
    assert select_rows("hisa", *batch.paged, SMALL).shape == (0, 64)
    assert plan_extend([], []).num_tiles == 0


def test_rows_that_see_nothing(case):
    """Empty rows select nothing and leave the others as they are, also when they share a start with a real request."""
    mode, params = case
    batch = make_batch([700, 300], [8, 8], num_heads=4, seed=31)
    *tensors, ks, ke = batch.ragged
    full = select_ragged(mode, *batch.ragged, params)
    ke = ke.clone()
    empty = [0, 5, 8, 15]
    ke[empty] = ks[empty] - torch.tensor([0, 3, 700, 0], dtype=torch.int32)
    got = select_ragged(mode, *tensors, ks, ke, params)
    assert (got[empty] == -1).all()
    kept = [m for m in range(16) if m not in empty]
    if mode == "group_rerank":  # the groups lost members, so compare with a call that never had them
        q, weights, *keys = tensors
        full[kept] = select_ragged(mode, q[kept], weights[kept], *keys, ks[kept], ke[kept], params)
    assert torch.equal(got[kept], full[kept])


@pytest.mark.parametrize("mode", MODES)
def test_nothing_visible_at_all(mode):
    batch = make_batch([130], [3], num_heads=4)
    *tensors, ks, ke = batch.ragged
    assert (select_ragged(mode, *tensors, ks, ks, SMALL) == -1).all()
    seq_lens = torch.zeros(1, dtype=torch.int32)
    table = torch.full((1, 2), -1, dtype=torch.int32)
    got = select_paged(mode, batch.q[:1], batch.weights[:1], batch.k_pages, table, seq_lens, SMALL)
    assert (got == -1).all()


def test_nan_outside_the_range_does_not_matter(case):
    """Keys before ks, after ke and of other requests are NaN; so are the scales."""
    mode, params = case
    batch = make_batch([700], [9], num_heads=4, seed=32)
    q, weights, k, k_scale, ks, ke = batch.ragged
    want = select_ragged(mode, *batch.ragged, params)
    poison = torch.full((333, 128), NAN_BYTE, dtype=torch.uint8)
    around = torch.cat([poison, k.view(torch.uint8), poison]).view(torch.float8_e4m3fn)
    nans = torch.full((333,), float("nan"))
    got = select_ragged(mode, q, weights, around, torch.cat([nans, k_scale, nans]), ks + 333, ke + 333, params)
    assert torch.equal(got, want)


def test_tokens_after_a_row_do_not_matter(case):
    """Each row of a prompt, poisoned from its own end on, alone and beside longer rows of the same request."""
    mode, params = case
    batch = make_batch([500], [12], num_heads=4, seed=33)
    q, weights, k, k_scale, ks, ke = batch.ragged
    want = select_ragged(mode, *batch.ragged, params)
    for first in (0, 4, 8):  # whole groups
        rows = slice(first, first + 4)
        end = int(ke[first + 3])
        poisoned = k.view(torch.uint8).clone()
        poisoned[end:] = NAN_BYTE
        scales = k_scale.clone()
        scales[end:] = float("nan")
        got = select_ragged(
            mode, q[rows], weights[rows], poisoned.view(torch.float8_e4m3fn), scales, ks[rows], ke[rows], params
        )
        assert torch.equal(got, want[rows])


def test_nan_keys_that_are_no_candidates_are_never_selected():
    """hisa: a NaN block mean ranks last, so a poisoned middle block is pruned, and its NaN scores reach nothing."""
    batch = make_batch([700], [4], num_heads=4, seed=34)
    q, weights, k, k_scale, ks, ke = batch.ragged
    poisoned = k.view(torch.uint8).clone()
    poisoned[320:384] = NAN_BYTE
    got = select_ragged("hisa", q, weights, poisoned.view(torch.float8_e4m3fn), k_scale, ks, ke, SMALL)
    for chosen in assert_form(got, batch.lengths, 64):
        assert not set(chosen) & set(range(320, 384))


def test_garbage_in_the_page_table_is_never_read(case):
    """make_batch puts huge, -1 and INT_MIN past each request's last page; any other values there change nothing."""
    mode, params = case
    batch = make_batch([131, 700, 64], [3, 9, 1], num_heads=4, seed=35)
    want = select_rows(mode, *batch.paged, params, output="slot")
    for garbage in (-(2**31), -1, 0, 2**31 - 1):
        table = batch.page_table.clone()
        for request, length in enumerate([131, 700, 64]):
            table[request, -(-length // 64) :] = garbage
        got = select_rows(mode, batch.q, batch.weights, batch.k_pages, table, batch.plan, params, output="slot")
        assert torch.equal(got, want)


def test_shuffled_pages_change_nothing_but_slots(case):
    mode, params = case
    one = make_batch([131, 700, 64], [3, 9, 1], num_heads=4, seed=36)
    order = torch.randperm(len(one.k_pages))
    moved = one.k_pages[order]
    table = one.page_table.clone()
    for request, length in enumerate([131, 700, 64]):
        pages = -(-length // 64)
        table[request, :pages] = order.argsort()[table[request, :pages].long()].to(torch.int32)
    got = select_rows(mode, one.q, one.weights, moved, table, one.plan, params)
    assert torch.equal(got, select_rows(mode, *one.paged, params))


def test_views_with_strides(case):
    mode, params = case
    batch = make_batch([300, 400], [5, 6], num_heads=4, seed=37)
    want = select_ragged(mode, *batch.ragged, params)
    spread = []
    for tensor in batch.ragged:
        wide = torch.stack([tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor] * 2, dim=1)
        wide = wide.view(torch.float8_e4m3fn) if tensor.dtype == torch.float8_e4m3fn else wide
        spread.append(wide[:, 1])
        assert not spread[-1].is_contiguous()
    assert torch.equal(select_ragged(mode, *spread, params), want)
    wide_table = torch.stack([batch.page_table, batch.page_table], dim=2)[..., 1]
    got = select_rows(mode, spread[0], spread[1], batch.k_pages, wide_table, batch.plan, params)
    assert torch.equal(got, want)


def test_inputs_are_not_written(case):
    mode, params = case
    batch = make_batch([300, 400], [5, 6], num_heads=4, seed=38)
    tensors = [*batch.ragged, batch.k_pages, batch.page_table, batch.plan.row_lengths]
    before = [tensor.contiguous().view(torch.uint8).clone() for tensor in tensors]
    select_ragged(mode, *batch.ragged, params)
    select_rows(mode, *batch.paged, params)
    assert all(torch.equal(a, b.contiguous().view(torch.uint8)) for a, b in zip(before, tensors))


def test_padding_rows_after_the_plan_are_ignored(case):
    """CUDA graphs pad the batch: q may have more rows than the plan, even of NaN."""
    mode, params = case
    batch = make_batch([300, 400], [5, 6], num_heads=4, seed=39)
    want = select_rows(mode, *batch.paged, params)
    pad = torch.full((3, 4, 128), NAN_BYTE, dtype=torch.uint8)
    q = torch.cat([batch.q.view(torch.uint8), pad]).view(torch.float8_e4m3fn)
    weights = torch.cat([batch.weights, torch.full((3, 4), float("nan"))])
    got = select_rows(mode, q, weights, batch.k_pages, batch.page_table, batch.plan, params)
    assert torch.equal(got, want)


def test_rows_of_requests_interleaved(case):
    """Rows need not be grouped by request."""
    mode, params = case
    batch = make_batch([300, 400], [6, 6], num_heads=4, seed=40)
    want = brute_force_batch(mode, batch, params)
    order = torch.randperm(12)
    q, weights, k, k_scale, ks, ke = batch.ragged
    got = select_ragged(mode, q[order], weights[order], k, k_scale, ks[order], ke[order], params)
    lengths = [batch.lengths[m] for m in order.tolist()]
    assert_same_selection(got, [want[m] for m in order.tolist()], lengths, params.top_k)
    plan = plan_rows(torch.tensor(batch.row_request)[order], torch.tensor(lengths), 2)
    paged = select_rows(mode, q[order], weights[order], batch.k_pages, batch.page_table, plan, params)
    assert torch.equal(paged, got)


@pytest.mark.parametrize("gate", [-1.0, 0.0])
def test_negative_and_zero_gates(case, gate):
    mode, params = case
    batch = make_batch([500], [5], num_heads=4, seed=41)
    weights = torch.full_like(batch.weights, gate)
    q, _, *rest = batch.ragged
    got = select_ragged(mode, q, weights, *rest, params)
    want = brute_force_batch(mode, replace(batch, weights=weights), params)
    assert_same_selection(got, want, batch.lengths, params.top_k)
