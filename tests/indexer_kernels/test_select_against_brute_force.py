"""The reference backend in both layouts against loops over rows, on values with and without ties."""

import pytest
import torch

from indexer_kernels import MODES, IndexerParams, select_paged, select_ragged, select_rows
from tests.support.compare import assert_same_selection, overlap
from tests.support.inputs import make_batch, slots_of
from tests.support.small import CASES, SMALL, brute_force_batch

SHAPES = {
    "one token": ([1], [1]),
    "shorter than K": ([63], [63]),
    "exactly K and one more": ([64, 65], [2, 2]),
    "one request": ([701], [70]),
    "several requests": ([700, 131, 1, 448, 64], [21, 40, 1, 18, 3]),
    "a request without rows": ([300, 200], [0, 9]),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("values", ["normal", "small_ints"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_layouts(case, shape, values):
    mode, params = case
    batch = make_batch(*shape, num_heads=6, seed=7, values=values)
    want = brute_force_batch(mode, batch, params)
    ragged = select_ragged(mode, *batch.ragged, params, backend="reference")
    assert_same_selection(ragged, want, batch.lengths, params.top_k)
    paged = select_rows(mode, *batch.paged, params, backend="reference")
    assert_same_selection(paged, want, batch.lengths, params.top_k)


@pytest.mark.parametrize("values", ["normal", "small_ints"])
def test_decode(case, values):
    """One row per request: select_paged, and select_rows as slots into a larger buffer."""
    mode, params = case
    batch = make_batch([700, 1, 64, 131, 512, 200], 1, num_heads=6, seed=8, values=values)
    want = brute_force_batch(mode, batch, params)
    seq_lens = torch.tensor(batch.lengths, dtype=torch.int32)
    paged = (batch.q, batch.weights, batch.k_pages, batch.page_table)
    got = select_paged(mode, *paged, seq_lens, params, backend="reference")
    assert_same_selection(got, want, batch.lengths, params.top_k)

    out = torch.full((8, params.top_k), -9, dtype=torch.int32)
    slots = select_rows(mode, *batch.paged, params, backend="reference", output="slot", out=out)
    assert slots is out and (out[6:] == -9).all(), "rows past the plan's are not touched"
    for row, positions in enumerate(want):
        count = min(batch.lengths[row], params.top_k)
        assert set(out[row, :count].tolist()) == set(slots_of(batch, row, sorted(positions)))
        assert (out[row, count:] == -1).all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "native"])
def test_modes_prune(name):
    """The tests above mean nothing if every mode selected what native selects."""
    mode, params = CASES[name]
    batch = make_batch([2000], [24], num_heads=8, seed=9)
    native = select_ragged("native", *batch.ragged, params, backend="reference")
    pruned = select_ragged(mode, *batch.ragged, params, backend="reference")
    assert 0.1 < overlap(pruned, native) < 0.97


def test_rows_share_little_without_reason():
    """Selections are alive: rows of different queries select different tokens."""
    batch = make_batch([1500], [8], num_heads=8, seed=10)
    native = select_ragged("native", *batch.ragged, SMALL, backend="reference")
    assert overlap(native[:1].expand(7, -1), native[1:]) < 0.5


def test_default_params_at_length():
    """The papers' budgets: rows beyond all of them, against the brute force."""
    batch = make_batch([9000], [2], num_heads=2, seed=11)
    params = IndexerParams(active_heads=1)
    for mode in MODES:
        got = select_ragged(mode, *batch.ragged, params, backend="reference")
        assert_same_selection(got, brute_force_batch(mode, batch, params), batch.lengths, params.top_k)
