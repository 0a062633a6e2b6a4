"""Ties go to the lower index: in the final selection, between candidates, blocks, pages and heads."""

from dataclasses import replace

import pytest
import torch

from indexer_kernels import MODES, select_ragged
from indexer_kernels.reference.candidates import block_candidates, group_candidates, page_candidates, token_candidates
from indexer_kernels.reference.choice import keep_within_budget, select_tokens
from indexer_kernels.reference.routing import route_heads
from tests.support.compare import assert_same_selection
from tests.support.inputs import make_batch
from tests.support.small import CASES, SMALL, brute_force_batch


def equal_scores(num_tokens=700, num_heads=4):
    """One row that sees num_tokens identical keys."""
    q = torch.ones((1, num_heads, 128)).to(torch.float8_e4m3fn)
    k = torch.ones((num_tokens, 128)).to(torch.float8_e4m3fn)
    ends = torch.tensor([num_tokens], dtype=torch.int32)
    return q, torch.ones((1, num_heads)), k, torch.ones(num_tokens), torch.zeros_like(ends), ends


@pytest.mark.parametrize("mode", MODES)
def test_all_equal_selects_the_first(mode):
    got = select_ragged(mode, *equal_scores(), SMALL, backend="reference")
    assert_same_selection(got, [set(range(64))], [700], 64)


def test_tied_candidates_are_the_lowest():
    """700 visible tokens of equal score: the forced ones, and then the lowest others up to the budget."""
    scores, lengths = torch.ones(1, 700), torch.tensor([700])
    tokens = token_candidates(scores, lengths, SMALL)  # 192, of which 64 + 40 forced
    assert members(tokens) == set(range(64 + 88)) | set(range(660, 700))
    pages = page_candidates(scores, lengths, replace(SMALL, candidates=384))  # 6 of 11 pages; 0 and 10 forced
    assert members(pages) == set(range(5 * 64)) | set(range(640, 700))
    group = group_candidates(scores, torch.tensor([696]), lengths, SMALL)  # scans 0 .. 696, plus 697 .. 699
    assert members(group) == set(range(64 + 88)) | set(range(657, 700))
    means = torch.ones(21, 128)  # 6 of 22 blocks of 32; 0, 20 and 21 forced
    q, weights, *_ = equal_scores()
    blocks = block_candidates(q, weights, means, lengths, 700, SMALL)
    assert members(blocks) == set(range(4 * 32)) | set(range(640, 700))


def members(mask):
    return set(mask[0].nonzero().flatten().tolist())


def test_boundary_ties_among_small_integers():
    """Scores that repeat often, cut exactly where a run of equal scores lies."""
    batch = make_batch([900], [40], num_heads=3, seed=21, values="small_ints")
    scores = torch.stack([
        (batch.k[0].float() @ batch.q[m].float().T).clamp_min(0) @ batch.weights[m] * batch.k_scale[0]
        for m in range(40)
    ])  # fmt: skip
    cut = 0
    for m, length in enumerate(batch.lengths):
        ordered = scores[m, :length].sort(descending=True).values
        cut += int(ordered[63] == ordered[64])
    assert cut >= 5, "too few rows are cut inside a tie for this test to mean anything"
    for mode, params in CASES.values():
        got = select_ragged(mode, *batch.ragged, params, backend="reference")
        assert_same_selection(got, brute_force_batch(mode, batch, params), batch.lengths, 64)


def test_tied_heads_route_to_the_lower():
    routing = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    assert route_heads(routing, 2).tolist() == [[1, 2], [0, 1], [0, 3]]
    assert route_heads(routing, 9).tolist() == [[0, 1, 2, 3]] * 3, "all heads, in native's order"


def test_equal_heads_of_equal_queries_tie_exactly():
    """Heads with the same query and gate have bitwise the same statistics, so the lower ones are routed."""
    batch = make_batch([701], [5], num_heads=1, seed=22)
    q = batch.q.view(torch.uint8).expand(-1, 9, -1).contiguous().view(torch.float8_e4m3fn)
    gates = batch.weights.expand(-1, 9).contiguous()
    gates[:, 4:] *= -1  # the routing score is an absolute value: sign does not break the tie
    got = select_ragged("misa", q, gates, *batch.ragged[2:], replace(SMALL, active_heads=4), backend="reference")
    alone = select_ragged("native", q[:, :4], gates[:, :4], *batch.ragged[2:], SMALL, backend="reference")
    assert torch.equal(got, alone)


def test_signed_zeros_tie():
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    everything = torch.ones_like(scores, dtype=torch.bool)
    assert select_tokens(scores, everything, 2).tolist() == [[0, 1]]


def test_nan_and_infinite_scores_stay_inside_the_mask():
    """NaN ranks last among the eligible, -inf before nothing: the count is kept and the mask obeyed."""
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[5.0, nan, -inf, 1.0, inf, nan]])
    eligible = torch.tensor([[False, True, True, True, True, True]])
    assert set(select_tokens(scores, eligible, 2)[0].tolist()) == {4, 3}
    assert set(select_tokens(scores, eligible, 5)[0].tolist()) == {1, 2, 3, 4, 5}
    forced = torch.tensor([[True, False, True, False, False, False]])
    assert keep_within_budget(scores, eligible, forced, 2).tolist() == [[False, False, True, False, True, False]]
