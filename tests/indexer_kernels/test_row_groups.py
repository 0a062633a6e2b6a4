"""Which rows share one scan in group_rerank, and the proxy query they share."""

import pytest
import torch

from indexer_kernels.row_groups import group_proxies, group_rows
from indexer_kernels.row_plan import plan_decode, plan_extend
from tests.support.inputs import make_batch


def rows_of(request, lengths, group):
    found = group_rows(torch.tensor(request), torch.tensor(lengths), group)
    assert found.rows.dtype == found.row_place.dtype == torch.int32 and found.rows.shape[1] == group
    for row, place in enumerate(found.row_place.tolist()):
        assert found.rows.flatten()[place] == row
    return [[row for row in rows if row >= 0] for rows in found.rows.tolist()]


def test_groups_are_aligned_to_the_request():
    """Positions 6 .. 12 of one request: a chunk that begins and ends inside a group."""
    assert rows_of([0] * 7, range(7, 14), 4) == [[0, 1], [2, 3, 4, 5], [6]]
    assert rows_of([0] * 7, range(7, 14), 2) == [[0, 1], [2, 3], [4, 5], [6]]
    assert rows_of([0] * 7, range(7, 14), 1) == [[row] for row in range(7)]


def test_groups_do_not_mix_requests():
    """The last row of one request and the first of the next have one position // group."""
    assert rows_of([0, 0, 1, 1, 2], [1, 2, 3, 4, 4], 4) == [[0, 1], [2, 3], [4]]


def test_rows_without_tokens_share_groups_of_their_own():
    assert rows_of([0, 0, 0, 1], [0, 1, 0, 0], 4) == [[0, 2], [1], [3]]


def test_rows_in_any_order():
    """Groups come by request and position; a repeated position that does not fit makes another group."""
    assert rows_of([1, 0, 1, 0, 1], [8, 3, 5, 2, 6], 4) == [[3, 1], [2, 4, 0]]
    assert rows_of([0] * 3, [5, 5, 6], 2) == [[0, 1], [2]]


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert group_rows(empty, empty, 4).rows.shape == (0, 4)
    assert plan_extend([], []).groups(4).rows.shape == (0, 4)


def test_plans_hold_the_groups():
    plan = plan_extend([5, 0], [4, 3])
    assert plan.groups(4).rows.tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, -1]]
    assert plan.groups(4).row_place.tolist() == [0, 1, 2, 4, 8, 9, 10]
    assert plan.groups(4) is plan.groups(4), "made once for all layers"
    assert plan.groups(2).rows.tolist() == [[0, -1], [1, 2], [3, -1], [4, 5], [6, -1]]
    decode = plan_decode(torch.tensor([9, 0, 9], dtype=torch.int32), 1)
    assert decode.groups(4).rows.tolist() == [[0], [1], [2]] and decode.groups(4).row_place.tolist() == [0, 1, 2]


def exact(proxies):
    """The mean query that the proxy stands for, and its gate, in float64."""
    return proxies.q.double(), proxies.weights.double()


def test_the_proxy_is_the_mean():
    """To 1/16 of an entry, the rounding of e4m3, and to what of it is below 2^-9 of the scale; the gate to float32."""
    batch = make_batch([403], [11], num_heads=3, seed=1)  # positions 392 .. 402
    rows = batch.plan.groups(4).rows
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]
    q, weights = exact(group_proxies(batch.q, batch.weights, rows))
    for g, members in enumerate([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]):
        mean, gate = batch.q[members].double().mean(0), batch.weights[members].double().mean(0)
        scale = weights[g] / gate
        power = scale.log2().round()
        assert torch.allclose(scale, 2**power, rtol=1e-6)
        largest = mean.abs().amax(1) / 2**power
        assert (largest <= 448).all() and (largest > 224).all()
        error = (q[g] * 2 ** power[:, None] - mean).abs()
        assert (error <= mean.abs() / 16 + 2.0**-10 * 2 ** power[:, None]).all()


def test_the_proxy_of_equal_rows_is_their_query():
    batch = make_batch([403], [11], num_heads=3, seed=2)
    q = batch.q.view(torch.uint8)[torch.arange(11) // 4 * 4].view(torch.float8_e4m3fn)
    weights = batch.weights[torch.arange(11) // 4 * 4]
    got, gates = exact(group_proxies(q, weights, batch.plan.groups(4).rows))
    scale = gates / weights[[0, 4, 8]]
    assert torch.equal(got * scale.round(decimals=12)[:, :, None], q[[0, 4, 8]].double())


@pytest.mark.parametrize("values", ["normal", "small_ints"])
def test_bitwise_the_same_in_any_company(values):
    """Alone, among others, in another order, twice."""
    batch = make_batch([403, 77, 1], [11, 6, 1], num_heads=5, seed=3, values=values)
    rows = batch.plan.groups(4).rows
    whole = group_proxies(batch.q, batch.weights, rows)
    again = group_proxies(batch.q, batch.weights, rows)
    for one, two in zip(whole, again):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(4))
    moved = group_rows(torch.tensor(batch.row_request)[order], torch.tensor(batch.lengths)[order], 4)
    q = batch.q.view(torch.uint8)[order].view(torch.float8_e4m3fn)
    shuffled = group_proxies(q, batch.weights[order], moved.rows)
    for g in range(len(rows)):
        alone = group_proxies(batch.q, batch.weights, rows[g : g + 1])
        for part, single, other in zip(whole, alone, shuffled):
            assert torch.equal(part[g : g + 1].view(torch.uint8), single.view(torch.uint8))
            assert torch.equal(part[g].view(torch.uint8), other[g].view(torch.uint8))


def test_extreme_queries():
    """Zero, the largest and the smallest fp8 value, and a row that is not there and holds NaN."""
    q = torch.zeros((5, 1, 128))
    q[1], q[2], q[3] = 448.0, 2.0**-9, -448.0
    q[4] = float("nan")
    rows = torch.tensor([[0, -1], [1, -1], [2, -1], [1, 3], [1, 1]], dtype=torch.int32)
    got, gates = exact(group_proxies(q.to(torch.float8_e4m3fn), torch.ones(5, 1), rows))
    assert (got * gates[:, :, None])[:, 0, 0].tolist() == [0.0, 448.0, 2.0**-9, 0.0, 448.0]
