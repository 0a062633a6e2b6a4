"""Each step of the reference alone, on numbers small enough to check by hand, or against its formula in float64."""

import pytest
import torch

from indexer_kernels.page_layout import pack_pages
from indexer_kernels.reference.candidates import forced_units, group_candidates, page_candidates, visible_units
from indexer_kernels.reference.choice import keep_within_budget, ranks, select_tokens
from indexer_kernels.reference.routing import route_heads, routing_scores, take_heads
from indexer_kernels.reference.scores import block_scores, page_maxima, token_scores
from indexer_kernels.reference.statistics import block_means, blocks_of_pages, page_means
from tests.support.inputs import NAN_BYTE, make_batch
from tests.support.small import SMALL

NAN, INF = float("nan"), float("inf")


def unit(*axes):
    """Rows of fp8 unit vectors along the given axes, axis 0 .. 127; -a - 1 is the negative of axis a."""
    rows = torch.zeros(len(axes), 128)
    for i, axis in enumerate(axes):
        rows[i, axis if axis >= 0 else -axis - 1] = 1.0 if axis >= 0 else -1.0
    return rows.to(torch.float8_e4m3fn)


def test_token_scores_by_hand():
    """Two heads: 2 * relu(q0 . k) - 3 * relu(q1 . k), times the key's scale."""
    q = torch.stack([unit(0).float()[0], unit(1).float()[0]]).to(torch.float8_e4m3fn)[None]
    weights = torch.tensor([[2.0, -3.0]])
    scores = token_scores(q, weights, unit(0, 1, -1, 5), torch.tensor([1.0, 0.5, 1.0, 1.0]))
    assert scores.tolist() == [[2.0, -1.5, 0.0, 0.0]] and scores.dtype == torch.float32


def test_token_scores_against_the_formula():
    batch = make_batch([300], [7], num_heads=5, seed=81)
    q, k = batch.q.double(), batch.k[0].double()
    want = torch.einsum("mhd,nd->mhn", q, k).clamp_min(0) * batch.weights.double()[:, :, None]
    want = want.sum(1) * batch.k_scale[0].double()
    got = token_scores(batch.q, batch.weights, batch.k[0], batch.k_scale[0])
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-4)
    assert got.std() > 1 and (got < 0).any()


def test_a_score_does_not_depend_on_the_other_rows_and_columns():
    batch = make_batch([300], [7], num_heads=5, seed=82)
    q, weights, k, k_scale = batch.q, batch.weights, batch.k[0], batch.k_scale[0]
    whole = token_scores(q, weights, k, k_scale)
    for rows, columns in ((slice(0, 1), slice(0, 300)), (slice(2, 5), slice(17, 18)), (slice(3, 7), slice(0, 299))):
        part = token_scores(q[rows], weights[rows], k[columns], k_scale[columns])
        assert torch.equal(part, whole[rows, columns])


def test_dot_products_are_exact():
    """448 * 448 twice, with opposite signs and a tiny product between them: float32 sums lose it in most orders."""
    q, k = torch.zeros(1, 1, 128), torch.zeros(1, 128)
    q[0, 0, [3, 40, 90]], k[0, [3, 40, 90]] = torch.tensor([448, 2.0**-9, 448]), torch.tensor([448, 1.0, -448])
    fp8 = torch.float8_e4m3fn
    assert token_scores(q.to(fp8), torch.ones(1, 1), k.to(fp8), torch.ones(1)).item() == 2.0**-9


def test_nan_keys_stay_in_their_column():
    batch = make_batch([100], [3], num_heads=5, seed=83)
    clean = token_scores(batch.q, batch.weights, batch.k[0], batch.k_scale[0])
    raw = batch.k[0].view(torch.uint8).clone()
    raw[[7, 50]] = NAN_BYTE
    got = token_scores(batch.q, batch.weights, raw.view(torch.float8_e4m3fn), batch.k_scale[0])
    others = [n for n in range(100) if n not in (7, 50)]
    assert got[:, [7, 50]].isnan().all() and torch.equal(got[:, others], clean[:, others])


def test_block_means():
    """Dequantised, full blocks only, aligned to the request's first token; pages are blocks of 64."""
    k, k_scale = unit(0, 0, 1, 2, 3, 3, 9), torch.tensor([1.0, 3.0, 4.0, 8.0, 1.0, 1.0, NAN])
    means = block_means(k, k_scale, 2)
    assert means.shape == (3, 128) and means.dtype == torch.float32
    assert means[0, 0] == 2.0 and means[1, 1] == 2.0 and means[1, 2] == 4.0 and means[2, 3] == 1.0
    assert means.sum() == 2 + 2 + 4 + 1, "nothing of the partial block, poisoned or not"
    assert block_means(k, k_scale, 8).shape == (0, 128)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_block_means_are_means_of_page_means(block):
    """Every mean is rounded to bfloat16 once: that of a page, and that of a block, from its pages'."""
    batch = make_batch([700], [0], seed=84)
    k, k_scale = batch.k[0], batch.k_scale[0]
    pages = page_means(pack_pages(k[:640], k_scale[:640]))
    tokens = k[:640].double() * k_scale[:640, None].double()
    assert torch.equal(pages, tokens.view(10, 64, 128).sum(1).div(64).float().bfloat16())
    blocks = block_means(k, k_scale, block)
    per = block // 64
    joined = pages[: len(blocks) * per].double().view(-1, per, 128).sum(1) / per
    assert len(blocks) == 700 // block and torch.equal(blocks, joined.float().bfloat16().float())
    assert torch.equal(blocks, blocks_of_pages(pages, block))
    assert per == 1 or not torch.equal(blocks, joined.float()), "the average of two is rounded, too"


def test_block_scores_are_token_scores_of_the_means():
    batch = make_batch([512], [4], num_heads=5, seed=85)
    means = block_means(batch.k[0], batch.k_scale[0], 64)
    got = block_scores(batch.q, batch.weights, means)
    want = torch.einsum("mhd,bd->mhb", batch.q.double(), means.double()).clamp_min(0)
    want = (want * batch.weights.double()[:, :, None]).sum(1)
    assert got.shape == (4, 8) and torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5)


def test_routing_scores():
    """|w| * relu, summed over the row's own full blocks; a NaN block beyond them does not matter."""
    q = torch.stack([unit(0).float()[0], unit(1).float()[0], unit(2).float()[0]]).to(torch.float8_e4m3fn)
    q = q[None].float().expand(3, 3, 128).to(torch.float8_e4m3fn)
    means = torch.zeros(4, 128)
    means[0, 0], means[1, 0], means[1, 1], means[2, 2], means[3] = 1.0, 2.0, 4.0, -5.0, NAN
    weights = torch.tensor([1.0, -2.0, 7.0]).expand(3, 3)
    got = routing_scores(q, weights, means, torch.tensor([0, 1, 3]))
    assert got.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [3.0, 8.0, 0.0]]


def test_take_heads():
    batch = make_batch([64], [2], num_heads=5, seed=86)
    q, weights = take_heads(batch.q, batch.weights, torch.tensor([[1, 4], [0, 2]]))
    assert torch.equal(q, torch.stack([batch.q[0].float()[[1, 4]], batch.q[1].float()[[0, 2]]]))
    assert torch.equal(weights, torch.stack([batch.weights[0, [1, 4]], batch.weights[1, [0, 2]]]))


def test_route_heads_takes_the_largest():
    routing = torch.tensor([[0.5, 4.0, 1.0, 3.0]])
    assert [route_heads(routing, n).tolist() for n in (1, 2, 3)] == [[[1]], [[1, 3]], [[1, 2, 3]]]


def test_page_maxima():
    scores = torch.tensor([[1.0, 5.0, -2.0, -3.0, NAN], [1.0, 5.0, -2.0, -3.0, -1.0]])
    visible = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    assert page_maxima(scores, visible, 2).tolist() == [[5.0, -2.0, -INF], [1.0, -INF, -INF]]


def test_visible_and_forced_units():
    """Pages of 64: the first, and every one that holds one of the last 40 tokens; nothing a row does not see."""
    lengths = torch.tensor([0, 1, 64, 103, 104, 105, 300])
    visible = visible_units(lengths, 5, 64)
    assert visible.sum(1).tolist() == [0, 1, 1, 2, 2, 2, 5]
    forced = forced_units(lengths, 5, 64, 64, 40)
    assert [row.nonzero().flatten().tolist() for row in forced] == [[], [0], [0], [0, 1], [0, 1], [0, 1], [0, 4]]
    tokens = forced_units(torch.tensor([200]), 300, 1, 64, 40)
    assert tokens[0].nonzero().flatten().tolist() == [*range(64), *range(160, 200)]
    assert (forced_units(torch.tensor([103]), 2, 64, 64, 39) == torch.tensor([True, True])).all()
    assert forced_units(torch.tensor([168]), 3, 64, 64, 40)[0].tolist() == [True, False, True]
    assert forced_units(torch.tensor([167]), 3, 64, 64, 40)[0].tolist() == [True, True, True]


def test_ranks():
    assert ranks(torch.tensor([[3.0, 9.0, 3.0, -INF, 5.0]])).tolist() == [[2, 0, 3, 4, 1]]


def test_keep_within_budget():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, NAN]])
    visible = torch.tensor([[True, True, True, True, False]])
    forced = torch.tensor([[False, True, False, False, True]])
    assert keep_within_budget(scores, visible, forced, 2).tolist() == [[True, True, False, False, False]]
    assert keep_within_budget(scores, visible, forced, 9).tolist() == visible.tolist()


def test_select_tokens():
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0]])
    eligible = torch.tensor([[False, True, True, True]])
    assert select_tokens(scores, eligible, 2).tolist() == [[2, 3]]
    assert select_tokens(scores, eligible, 6).tolist() == [[2, 3, 1, -1, -1, -1]]


def test_page_candidates_keep_whole_visible_pages():
    """The best token of a page speaks for it; the partial last page is forced and cut at the row's end."""
    scores = torch.zeros(2, 700)
    scores[:, 200], scores[:, 333], scores[:, 650] = 5.0, 4.0, 99.0  # 650: page 10, which the second row half sees
    scores[:, 400] = 3.0
    lengths = torch.tensor([700, 645])
    kept = page_candidates(scores, lengths, SMALL.__class__(top_k=64, candidates=256, local_tokens=4, top_blocks=2))
    # Row 0: pages 0 and 10 are forced, then 3 and 5. Row 1: 645 ends in page 10, whose token 650 it does not see.
    for row, end in ((0, 700), (1, 645)):
        want = {*range(64), *range(192, 256), *range(320, 384), *range(640, end)}
        assert set(kept[row].nonzero().flatten().tolist()) == want


def test_group_candidates_scan_only_what_the_first_row_sees():
    """Rows at 300 .. 303: one list from one scan over 0 .. 300, its last 40 forced, and the group's positions."""
    scores = torch.arange(304.0).repeat(4, 1)
    scores[:, 250:301] = -1.0  # the local tokens would not be chosen for their scores
    scores[:, 301:] = NAN  # never scanned
    lengths = torch.tensor([301, 302, 303, 304])
    kept = group_candidates(scores, torch.full((4,), 300), lengths, SMALL)
    # 192 candidates: the first 64, the last 40 and the 88 best of those between.
    shared = {*range(64), *range(250 - 88, 250), *range(261, 301)}
    for row in range(4):
        assert set(kept[row].nonzero().flatten().tolist()) == shared | set(range(300, 301 + row))
