"""From a decision to SGLang's indices: output forms, rows left alone, and the split of a prompt's last rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from indexer_kernels import IndexerParams, select_ragged
from indexer_kernels.row_plan import TILE_ROWS, RowPlan, plan_extend, plan_rows
from sglang_ext.runner import OutputForm, Rows, run, split_tail
from tests.support.compare import assert_same_selection
from tests.support.inputs import Batch, make_batch, slots_of

PARAMS = IndexerParams(top_k=24, candidates=96, block_size=16, top_blocks=4, route_block=32, active_heads=2)
POSITION, SLOT = OutputForm("position"), OutputForm("slot")
UNTOUCHED = 777
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Rows that see fewer than top_k tokens, whole pages and more; the second request is a one-row chunk."""
    return make_batch([200, 65, 20, 130], [5, 1, 20, 17], num_heads=8, seed=3)


def wanted(batch: Batch, mode: str = "misa") -> list[set[int]]:
    """Selected positions per row, computed over the other layout."""
    selected = select_ragged(mode, *batch.ragged, PARAMS, backend="reference")
    return [{entry for entry in row if entry >= 0} for row in selected.tolist()]


def call(batch: Batch, rows: Rows, form: OutputForm, out: torch.Tensor, mode: str = "misa", extra: int = 0) -> None:
    """run(), with `extra` rows of padding after the queries."""
    pad = torch.zeros((extra, *batch.q.shape[1:]), dtype=torch.uint8)
    q = torch.cat([batch.q.view(torch.uint8), pad]).view(torch.float8_e4m3fn)
    weights = torch.cat([batch.weights, torch.full((extra, batch.weights.shape[1]), float("nan"))])
    run(mode, rows, q, weights, batch.k_pages, batch.page_table, PARAMS, form, "reference", None, out)


def new_out(rows: int) -> torch.Tensor:
    return torch.full((rows, PARAMS.top_k), UNTOUCHED, dtype=torch.int32)


def check(out: torch.Tensor, want: list[set[int]], lengths: list[int], shift: list[int] | None = None) -> None:
    """out holds `want` per row, each entry moved by shift[row]; packed first, then -1."""
    if shift is not None:
        # looked at before the shift is undone, which would turn a moved -1 back into one
        assert all((row[len(some) :] == -1).all() for row, some in zip(out, want)), "an offset moved a -1"
        out = torch.where(out >= 0, out - torch.tensor(shift, dtype=torch.int32)[:, None], out)
    assert_same_selection(out, want, lengths, PARAMS.top_k)


@pytest.mark.parametrize("mode", ["native", "misa", "misa_rerank", "hisa", "group_rerank"])
def test_positions(batch, mode):
    out = new_out(len(batch.lengths))
    call(batch, Rows(batch.plan), POSITION, out, mode)
    check(out, wanted(batch, mode), batch.lengths)


def test_misa_differs_from_native(batch):
    """Otherwise the tests here could not tell the modes apart."""
    assert wanted(batch, "misa") != wanted(batch, "native")


def test_slots(batch):
    out = new_out(len(batch.lengths))
    call(batch, Rows(batch.plan), SLOT, out)
    for row, positions in enumerate(wanted(batch)):
        count = len(positions)
        assert sorted(out[row, :count].tolist()) == sorted(slots_of(batch, row, sorted(positions)))
        assert out[row, count:].tolist() == [-1] * (PARAMS.top_k - count)


def test_positions_with_offsets(batch):
    """SGLang's offset of a row is where its request's keys start among all keys of the batch."""
    out = new_out(len(batch.lengths))
    call(batch, Rows(batch.plan), OutputForm("position", batch.ks), out)
    assert min(batch.lengths) < PARAMS.top_k, "some row must have -1 entries, which no offset may move"
    check(out, wanted(batch), batch.lengths, shift=batch.ks.tolist())


@pytest.mark.parametrize("form", ["position", "slot", "offsets"])
@pytest.mark.parametrize("queries", [0, 3])
def test_padding_rows_are_untouched(batch, form, queries):
    """out and the offsets may be longer than the plan, and q longer still."""
    rows = len(batch.lengths)
    offsets = torch.cat([batch.ks, torch.full((4,), 10**6, dtype=torch.int32)]) if form == "offsets" else None
    plain, padded = new_out(rows), new_out(rows + 4)
    for out in (plain, padded):
        call(
            batch, Rows(batch.plan), OutputForm("slot" if form == "slot" else "position", offsets), out, "misa", queries
        )
    assert torch.equal(padded[:rows], plain)
    assert (padded[rows:] == UNTOUCHED).all()


def part(batch: Batch, chosen: list[int]) -> Rows:
    """The chosen rows of the batch."""
    index = torch.tensor(chosen)
    plan = plan_rows(torch.tensor(batch.row_request)[index], torch.tensor(batch.lengths)[index], len(batch.k))
    return Rows(plan, index)


@pytest.mark.parametrize("form", ["position", "slot", "offsets"])
def test_picked_rows(batch, form):
    chosen = [0, 3, 5, 6, 7, 25, 26, 42]
    made = OutputForm("slot" if form == "slot" else "position", batch.ks if form == "offsets" else None)
    whole, some = new_out(len(batch.lengths)), new_out(len(batch.lengths))
    call(batch, Rows(batch.plan), made, whole)
    call(batch, part(batch, chosen), made, some)
    others = [row for row in range(len(batch.lengths)) if row not in chosen]
    assert torch.equal(some[chosen].sort(dim=1).values, whole[chosen].sort(dim=1).values)
    assert (some[others] == UNTOUCHED).all()


def test_two_parts_of_different_modes_fill_each_its_rows(batch):
    """The split of native_tail_rows, with the offsets of a ragged prefill."""
    tail = [3, 4, 5, 24, 25, 41, 42]
    body = [row for row in range(len(batch.lengths)) if row not in tail]
    out = new_out(len(batch.lengths))
    form = OutputForm("position", batch.ks)
    call(batch, part(batch, body), form, out, "misa")
    call(batch, part(batch, tail), form, out, "native")
    misa, native = wanted(batch, "misa"), wanted(batch, "native")
    want = [native[row] if row in tail else misa[row] for row in range(len(batch.lengths))]
    assert want != misa
    check(out, want, batch.lengths, shift=batch.ks.tolist())


def test_no_rows(batch):
    out = new_out(3)
    call(batch, Rows(plan_rows(torch.empty(0).long(), torch.empty(0).long(), len(batch.k))), SLOT, out)
    assert (out == UNTOUCHED).all()


# split_tail


def rows_by_hand(prefixes: list[int], extends: list[int]) -> list[tuple[int, int]]:
    """(request, tokens the row sees) of every row of the forward, in order."""
    return [(r, prefix + i + 1) for r, (prefix, n) in enumerate(zip(prefixes, extends)) for i in range(n)]


def check_plan(plan: RowPlan, rows: list[tuple[int, int]], num_requests: int) -> None:
    """The plan is one over exactly these rows: lengths, requests and tiles agree."""
    assert plan.row_request.tolist() == [request for request, _ in rows]
    assert plan.row_lengths.tolist() == [length for _, length in rows]
    longest = [max((n for r, n in rows if r == request), default=0) for request in range(num_requests)]
    assert plan.request_lengths.tolist() == longest
    assert plan.max_length == max(longest, default=0)
    placed = []
    for tile, members in enumerate(plan.tile_rows.tolist()):
        members = [row for row in members if row >= 0]
        assert {rows[row][0] for row in members} == {int(plan.tile_request[tile])}
        assert max(rows[row][1] for row in members) == int(plan.tile_length[tile])
        assert [int(plan.row_place[row]) for row in members] == [tile * TILE_ROWS + i for i in range(len(members))]
        placed += members
    assert sorted(placed) == list(range(len(rows)))


@pytest.mark.parametrize(
    ("prefixes", "extends", "prompts", "tail_rows", "tail"),
    [
        ([0], [6], [6], 2, [4, 5]),
        ([0], [6], [6], 6, [0, 1, 2, 3, 4, 5]),
        ([0], [6], [6], 99, [0, 1, 2, 3, 4, 5]),
        ([10], [6], [16], 1, [5]),
        # a chunk that ends before the prompt's end has no tail, or only what reaches into it
        ([0], [6], [16], 2, []),
        ([0], [6], [16], 10, []),
        ([0], [6], [16], 11, [5]),
        ([6], [6], [16], 4, []),
        ([6], [6], [16], 5, [5]),
        # several requests: the first finishes, the second is a middle chunk, the third is one row
        ([0, 8, 20], [4, 4, 1], [4, 40, 21], 2, [2, 3, 8]),
        # a decoding request of a mixed batch has no prompt row left
        ([0, 30], [4, 1], [4, 1 << 40], 3, [1, 2, 3]),
        ([], [], [], 3, []),
        ([0, 5], [0, 3], [0, 8], 1, [2]),
    ],
)
def test_split_tail(prefixes, extends, prompts, tail_rows, tail):
    body, last = split_tail(prefixes, extends, prompts, tail_rows, CPU)
    rows = rows_by_hand(prefixes, extends)
    assert last.picked.tolist() == tail
    assert body.picked.tolist() == [row for row in range(len(rows)) if row not in tail]
    for piece in (body, last):
        check_plan(piece.plan, [rows[row] for row in piece.picked.tolist()], len(extends))


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40), st.integers(0, 30)), max_size=5),
    st.integers(1, 50),
)
@settings(deadline=None, max_examples=100)
def test_split_tail_takes_every_row_once(requests, tail_rows):
    prefixes, extends = [p for p, _, _ in requests], [e for _, e, _ in requests]
    prompts = [p + e + rest for p, e, rest in requests]
    body, last = split_tail(prefixes, extends, prompts, tail_rows, CPU)
    rows = rows_by_hand(prefixes, extends)
    assert sorted(body.picked.tolist() + last.picked.tolist()) == list(range(len(rows)))
    for piece, in_tail in ((body, False), (last, True)):
        members = [rows[row] for row in piece.picked.tolist()]
        check_plan(piece.plan, members, len(requests))
        # the row that sees n tokens is at position n - 1
        assert all((length - 1 >= prompts[request] - tail_rows) == in_tail for request, length in members)


def test_no_tail_means_the_plan_of_an_ordinary_forward():
    body, last = split_tail([3, 0], [5, 40], [100, 100], 4, CPU)
    plain = plan_extend([3, 0], [5, 40])
    assert last.plan.num_rows == 0
    for name in ("row_request", "row_lengths", "request_lengths", "tile_request", "tile_rows", "tile_length"):
        assert torch.equal(getattr(body.plan, name), getattr(plain, name)), name


class Uploads(TorchDispatchMode):
    """Notes of every copy to another device whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        named = kwargs or {}
        if operator is torch.ops.aten._to_copy.default and named.get("device") not in (None, args[0].device):
            self.waited.append(not named.get("non_blocking", False))
        return operator(*args, **named)


def test_no_upload_of_a_split_is_waited_for():
    """It comes at the beginning of a forward, while the device is at work on the one before."""
    with Uploads() as uploads:
        split_tail([3, 0], [5, 40], [100, 40], 4, torch.device("meta"))
    assert uploads.waited and not any(uploads.waited)
