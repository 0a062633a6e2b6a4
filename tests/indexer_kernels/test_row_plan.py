"""Plans: every row exactly once, no tile of two requests, places that agree with tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from indexer_kernels.row_plan import TILE_ROWS, plan_decode, plan_extend, plan_rows

EXTENDS = {
    "nothing": ([], []),
    "no rows": ([5, 0], [0, 0]),
    "one row": ([0], [1]),
    "one full tile": ([100], [16]),
    "one row more": ([100], [17]),
    "mixed": ([0, 5000, 64, 7, 300], [40, 1, 0, 16, 33]),
}


def check(plan, request, lengths, num_requests):
    """The invariants that kernels rely on."""
    assert plan.num_rows == len(request) and plan.num_tiles == len(plan.tile_length)
    assert plan.row_request.tolist() == request and plan.row_lengths.tolist() == lengths
    for name in ("row_request", "row_lengths", "request_lengths", "tile_request", "tile_rows", "tile_length"):
        assert getattr(plan, name).dtype == torch.int32, name
    assert plan.row_place.dtype == torch.int32 and plan.tile_rows.shape == (plan.num_tiles, TILE_ROWS)

    longest = [max([n for n, r in zip(lengths, request) if r == wanted], default=0) for wanted in range(num_requests)]
    assert plan.request_lengths.tolist() == longest
    assert sorted(row for row in plan.tile_rows.flatten().tolist() if row >= 0) == list(range(len(request)))
    for tile, rows in enumerate(plan.tile_rows.tolist()):
        held = [row for row in rows if row >= 0]
        assert held and rows == held + [-1] * (TILE_ROWS - len(held)), "filled from the front"
        assert {request[row] for row in held} == {int(plan.tile_request[tile])}
        assert int(plan.tile_length[tile]) == max(lengths[row] for row in held)
        assert held == list(range(held[0], held[0] + len(held))), "consecutive rows"
    flat = plan.tile_rows.flatten()
    assert flat[plan.row_place.long()].tolist() == list(range(len(request)))


@pytest.mark.parametrize(("prefixes", "extends"), EXTENDS.values(), ids=EXTENDS)
def test_plan_extend(prefixes, extends):
    plan = plan_extend(prefixes, extends)
    request = [r for r, count in enumerate(extends) for _ in range(count)]
    lengths = [prefix + i + 1 for prefix, count in zip(prefixes, extends) for i in range(count)]
    check(plan, request, lengths, len(prefixes))
    assert plan.max_length == max(lengths, default=0)
    assert plan.tile_length.tolist() == sorted(plan.tile_length.tolist(), reverse=True), "longest tiles first"


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 50)), max_size=6))
def test_plan_extend_of_anything(requests):
    prefixes, extends = [p for p, _ in requests], [e for _, e in requests]
    plan = plan_extend(prefixes, extends)
    request = [r for r, count in enumerate(extends) for _ in range(count)]
    lengths = [prefix + i + 1 for prefix, count in zip(prefixes, extends) for i in range(count)]
    check(plan, request, lengths, len(requests))
    assert plan.num_tiles == sum(-(-count // TILE_ROWS) for count in extends)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), max_size=70))
def test_plan_rows_of_anything(rows):
    """Requests in any order and rows that see nothing: more tiles, the same invariants."""
    request, lengths = [r for r, _ in rows], [n for _, n in rows]
    plan = plan_rows(torch.tensor(request, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64), 4)
    check(plan, request, lengths, 4)
    assert plan.max_length == max(lengths, default=0)


@pytest.mark.parametrize("lengths", [[], [7], [0, 64, 1, 9000]], ids=str)
def test_plan_decode(lengths):
    row_lengths = torch.tensor(lengths, dtype=torch.int32)
    plan = plan_decode(row_lengths, table_pages=150)
    check(plan, list(range(len(lengths))), lengths, len(lengths))
    assert plan.max_length == 150 * 64 >= max(lengths, default=0)


def test_plan_decode_follows_its_lengths():
    """A captured graph is replayed with other lengths in the same memory."""
    row_lengths = torch.tensor([3, 4], dtype=torch.int32)
    plan = plan_decode(row_lengths, 1)
    row_lengths += 10
    assert plan.row_lengths.tolist() == plan.request_lengths.tolist() == plan.tile_length.tolist() == [13, 14]


def test_what_a_plan_derives_is_made_once_for_all_layers():
    plan = plan_extend([100], [40])
    assert plan.kept("lengths", lambda: plan.row_lengths * 2) is plan.kept("lengths", lambda: plan.row_lengths * 2)
    assert plan.kept("other", lambda: plan.row_lengths * 3)[0] == 303


def test_a_plan_for_one_forward_derives_once():
    """Lengths do not change within a forward; the next one has a plan of its own."""
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    plan = plan_decode(lengths, 4)
    first = plan.for_one_forward()
    assert first.row_lengths is plan.row_lengths and first.kept("twice", lambda: lengths * 2).tolist() == [10, 18]
    lengths += 1
    assert first.kept("twice", lambda: pytest.fail("made again")).tolist() == [10, 18]
    assert plan.for_one_forward().kept("twice", lambda: lengths * 2).tolist() == [12, 20]
    assert first.for_one_forward().kept("twice", lambda: lengths * 2).tolist() == [12, 20]


def test_what_a_decode_plan_derives_follows_its_lengths():
    """A captured graph writes new lengths to the tensor that the plan was made from."""
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    plan = plan_decode(lengths, 4)
    assert plan.kept("twice", lambda: plan.row_lengths * 2).tolist() == [10, 18]
    lengths += 1
    assert plan.kept("twice", lambda: plan.row_lengths * 2).tolist() == [12, 20]


@pytest.mark.parametrize("group", [2, 4])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=60))
def test_scans_of_any_rows(group, rows):
    """A scan for each group, in the order of the groups, over what its first position sees."""
    request, lengths = [r for r, _ in rows], [n for _, n in rows]
    plan = plan_rows(torch.tensor(request, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64), 3)
    groups = plan.groups(group).rows.tolist()
    first = [next(n for n in range(lengths[g[0]], -group, -1) if n % group == 1) for g in groups]
    check(plan.scans(group), [request[g[0]] for g in groups], [max(n, 0) for n in first], 3)
    assert plan.scans(group) is plan.scans(group)


def test_scans_of_decode_follow_the_lengths():
    lengths = torch.tensor([8, 0, 1, 5], dtype=torch.int32)
    plan = plan_decode(lengths, 2)
    assert plan.scans(4).row_lengths.tolist() == [5, 0, 1, 5] and plan.scans(4).max_length == plan.max_length
    lengths[0] = 9
    assert plan.scans(4).row_lengths.tolist() == [9, 0, 1, 5]
    forward = plan.for_one_forward()
    assert forward.scans(4) is forward.scans(4) and forward.scans(4).one_forward
