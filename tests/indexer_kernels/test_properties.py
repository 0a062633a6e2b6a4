"""What holds for every mode, every setting and every batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer_kernels import MODES, IndexerParams, select_ragged, select_rows
from tests.support.compare import assert_form, assert_same_selection
from tests.support.inputs import make_batch
from tests.support.small import brute_force_batch


@st.composite
def all_params(draw):
    top_k = draw(st.integers(1, 96))
    block_size = draw(st.sampled_from([1, 16, 32, 64, 128]))
    unit = draw(st.sampled_from(["token", "page"]))
    candidates = top_k + draw(st.integers(0, 250))
    return IndexerParams(
        top_k=top_k,
        active_heads=draw(st.integers(1, 4)),
        route_block=draw(st.sampled_from([16, 64, 128])),
        candidates=-(-(candidates + 63) // 64) * 64 if unit == "page" else candidates,
        block_size=block_size,
        top_blocks=-(-(top_k - 1) // block_size) + 1 + draw(st.integers(0, 12)),
        group=draw(st.integers(1, 6)),
        local_tokens=draw(st.integers(1, 150)),
        candidate_unit=unit,
    )


@st.composite
def batches(draw):
    """1 to 3 requests of up to 400 tokens, up to 8 rows each."""
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
    rows = [min(length, draw(st.integers(0, 8))) for length in lengths]
    values = draw(st.sampled_from(["normal", "small_ints"]))
    return make_batch(lengths, rows, num_heads=draw(st.integers(1, 4)), seed=draw(st.integers(0, 999)), values=values)


@settings(max_examples=150)
@given(mode=st.sampled_from(MODES), batch=batches(), params=all_params())
def test_form_and_layouts(mode, batch, params):
    """min(length, K) distinct visible tokens, then -1; the two layouts agree; so does the brute force."""
    got = select_ragged(mode, *batch.ragged, params, backend="reference")
    assert_form(got, batch.lengths, params.top_k)
    assert torch.equal(got, select_rows(mode, *batch.paged, params, backend="reference"))
    # Where the forced candidates alone exceed the budget, which of them stay is no part of the definition.
    unit = 64 if params.candidate_unit == "page" else 1
    forced_units = 64 // unit + (params.local_tokens + unit - 2) // unit + 1
    forced_fit = forced_units <= params.candidates // unit
    blocks_fit = 1 + (params.local_tokens + params.block_size - 2) // params.block_size + 1 <= params.top_blocks
    if mode in ("native", "misa") or (blocks_fit if mode == "hisa" else forced_fit):
        assert_same_selection(got, brute_force_batch(mode, batch, params), batch.lengths, params.top_k)


@settings(max_examples=100)
@given(
    mode=st.sampled_from(["misa_rerank", "hisa", "group_rerank"]),
    batch=batches(),
    params=all_params(),
)
def test_covering_budget_is_native(mode, batch, params):
    """Rows whose length is within the budget select exactly native's tokens, whatever rows are beside them."""
    native = select_ragged("native", *batch.ragged, params, backend="reference")
    got = select_ragged(mode, *batch.ragged, params, backend="reference")
    budget = params.top_blocks * params.block_size if mode == "hisa" else params.candidates
    covered = [m for m, length in enumerate(batch.lengths) if length <= budget]
    assert torch.equal(got[covered], native[covered])


@settings(max_examples=60)
@given(batch=batches(), params=all_params(), factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_scale_of_the_gates_changes_nothing(batch, params, factor):
    q, weights, *keys = batch.ragged
    for mode in MODES:
        want = select_ragged(mode, q, weights, *keys, params, backend="reference")
        assert torch.equal(select_ragged(mode, q, weights * factor, *keys, params, backend="reference"), want)


@settings(max_examples=60)
@given(batch=batches(), params=all_params(), extra=st.integers(1, 30))
def test_native_selections_nest(batch, params, extra):
    """A larger top_k selects everything that a smaller one selects."""
    larger = IndexerParams(top_k=params.top_k + extra)
    few = select_ragged("native", *batch.ragged, params, backend="reference")
    many = select_ragged("native", *batch.ragged, larger, backend="reference")
    for small, large in zip(few.tolist(), many.tolist()):
        assert set(small) - {-1} <= set(large)
