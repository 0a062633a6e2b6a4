"""Stored page means on the CPU: against loops over tokens, and selections that read them."""

import re
from dataclasses import replace

import pytest
import torch

from indexer_kernels import select_rows
from indexer_kernels.page_means import (
    check_page_means,
    page_mean_buffer,
    update_last_page_means,
    update_page_means,
)
from indexer_kernels.row_plan import plan_decode
from tests.support import brute_force as brute
from tests.support.compare import assert_same_selection, overlap
from tests.support.inputs import Batch, make_batch
from tests.support.small import SMALL

LENGTHS = [700, 1, 64, 131, 512, 63]
PARAMS = replace(SMALL, block_size=64, top_blocks=4)
WHOLE = replace(PARAMS, block_size=128, top_blocks=3, route_block=64, route_statistic="max")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(LENGTHS, 1, num_heads=6, seed=31)


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.k_pages, batch.page_table, torch.tensor(batch.lengths, dtype=torch.int32)


def means_of(batch: Batch) -> torch.Tensor:
    """Means of the full pages, NaN elsewhere."""
    means = torch.full((len(batch.k_pages), 128), float("nan"), dtype=torch.bfloat16)
    update_page_means(*tensors(batch), means)
    return means


def mean_by_hand(batch: Batch, request: int, page: int) -> torch.Tensor:
    total = torch.zeros(128, dtype=torch.float64)
    for token in range(64 * page, 64 * page + 64):
        total += batch.k[request][token].double() * batch.k_scale[request][token].double()
    return (total / 64).float().bfloat16()


def test_a_new_buffer_is_zero():
    means = page_mean_buffer(7, "cpu")
    assert means.shape == (7, 128) and means.dtype == torch.bfloat16 and not means.any()


def test_every_full_page_and_no_other(batch):
    means = means_of(batch)
    written = set()
    for request, length in enumerate(batch.lengths):
        for page in range(length // 64):
            slot = int(batch.page_table[request, page])
            written.add(slot)
            assert torch.equal(means[slot], mean_by_hand(batch, request, page))
    assert len(written) == 700 // 64 + 1 + 2 + 8
    assert means[[slot for slot in range(len(means)) if slot not in written]].isnan().all()


def test_from_a_page_on(batch):
    whole, means = means_of(batch), page_mean_buffer(len(batch.k_pages), "cpu")
    update_page_means(*tensors(batch), means, first_page=torch.tensor([9, 0, 1, -3, 8, 5], dtype=torch.int32))
    written = [int(batch.page_table[r, p]) for r, pages in ((0, (9,)), (3, (0, 1))) for p in pages]
    assert int(means.any(1).sum()) == len(written) and torch.equal(means[written], whole[written])


def test_the_last_full_page_of_each_row(batch):
    """Rows of one request in a verify step, a row without a full page, and one that pads the batch."""
    rows = torch.tensor([0, 0, 0, 2, 5, 1])
    lengths = torch.tensor([639, 640, 641, 64, 63, 1], dtype=torch.int32)
    means = page_mean_buffer(len(batch.k_pages), "cpu")
    update_last_page_means(batch.k_pages, batch.page_table[rows], lengths, means)
    written = [int(batch.page_table[r, p]) for r, p in ((0, 8), (0, 9), (2, 0))]
    assert int(means.any(1).sum()) == 3 and torch.equal(means[written], means_of(batch)[written])


def test_a_page_written_anew_is_put_right_by_the_next_step(batch):
    """Rejected draft tokens filled a page; other tokens take their place."""
    k_pages = batch.k_pages.clone()
    table, means = batch.page_table[:1], page_mean_buffer(len(k_pages), "cpu")
    k_pages[table[0, 9].long(), 128 * 40 : 128 * 64] = 0
    update_last_page_means(k_pages, table, torch.tensor([640], dtype=torch.int32), means)
    draft = means[table[0, 9].long()].clone()
    update_last_page_means(batch.k_pages, table, torch.tensor([640], dtype=torch.int32), means)
    right = means[table[0, 9].long()]
    assert torch.equal(right, mean_by_hand(batch, 0, 9)) and not torch.equal(draft, right)


def test_check_counts_pages_that_differ(batch):
    means = means_of(batch)
    assert int(check_page_means(*tensors(batch), means)) == 0
    for request, page in ((0, 3), (0, 9), (4, 0)):
        means[batch.page_table[request, page].long(), 5] *= -1
    count = check_page_means(*tensors(batch), means)
    assert count.dtype == torch.int32 and count.shape == () and int(count) == 3
    means[batch.page_table[0, 10].long()] = 7  # partly filled: not stored, not checked
    assert int(check_page_means(*tensors(batch), means)) == 3


@pytest.mark.parametrize("params", [PARAMS, WHOLE], ids=["pages", "pairs of pages"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_hisa_by_stored_means_is_hisa(phase, params):
    rows = [12, 7, 3] if phase == "prefill" else 1
    batch = make_batch([700, 260, 64], rows, num_heads=6, seed=32)
    lengths, means = batch.plan.request_lengths, page_mean_buffer(len(batch.k_pages), "cpu")
    update_page_means(batch.k_pages, batch.page_table, lengths, means)
    plan = batch.plan if phase == "prefill" else plan_decode(lengths, batch.page_table.shape[1])
    by_keys, by_means, by_others = (
        select_rows("hisa", *batch.paged[:4], plan, params, page_means=given) for given in (None, means, -means)
    )
    assert torch.equal(by_keys, by_means)
    assert not torch.equal(by_means, by_others), "the means are read: others choose other blocks"


@pytest.mark.parametrize("params", [PARAMS, WHOLE], ids=["pages", "pairs of pages"])
def test_routed_blocks_against_loops(params):
    """misa_rerank by stored means: the block stage of hisa with the heads of misa, all heads re-rank."""
    batch = make_batch([1500, 700, 1, 64, 900, 1100, 1301], 1, num_heads=8, seed=33)
    plan = plan_decode(tensors(batch)[2], batch.page_table.shape[1])
    got = select_rows("misa_rerank", *batch.paged[:4], plan, params, page_means=means_of(batch))
    want = []
    for request, length in enumerate(batch.lengths):
        row = brute.Row(
            batch.q[request].double(),
            batch.weights[request].double(),
            batch.k[request][:length].double(),
            batch.k_scale[request][:length].double(),
        )
        pool = set(range(length))
        if length >= params.route_block:
            heads = brute.routed_heads(row, params.route_block, params.route_statistic, params.active_heads)
            routed = row._replace(q=row.q[heads], weights=row.weights[heads])
            pool = brute.best_blocks(routed, params.block_size, params.top_blocks, params.local_tokens)
        want.append(brute.best(brute.head_sum(row, range(len(row.weights))), pool, params.top_k))
    assert_same_selection(got, want, batch.lengths, params.top_k)
    hisa = select_rows("hisa", *batch.paged[:4], plan, params, page_means=means_of(batch))
    assert 0.3 < overlap(got, hisa) < 1, "few heads choose other blocks"


def test_a_plan_for_one_forward_selects_the_same(batch):
    plan = plan_decode(tensors(batch)[2], batch.page_table.shape[1])
    arguments = {"params": PARAMS, "page_means": means_of(batch)}
    once = select_rows("hisa", *batch.paged[:4], plan.for_one_forward(), **arguments)
    assert torch.equal(once, select_rows("hisa", *batch.paged[:4], plan, **arguments))


@pytest.mark.parametrize("mode", ["hisa", "misa_rerank"])
def test_the_last_means_may_be_updated_on_the_way(batch, mode):
    plan = plan_decode(tensors(batch)[2], batch.page_table.shape[1])
    means, stale = means_of(batch), means_of(batch)
    last = [int(batch.page_table[r, length // 64 - 1]) for r, length in enumerate(batch.lengths) if length >= 64]
    stale[last] = 7.0
    want = select_rows(mode, *batch.paged[:4], plan, PARAMS, page_means=means)
    got = select_rows(mode, *batch.paged[:4], plan, PARAMS, page_means=stale, update_means=True)
    assert torch.equal(got, want) and torch.equal(stale.view(torch.int16), means.view(torch.int16))


def test_what_is_refused(batch):
    means = means_of(batch)
    with pytest.raises(ValueError, match="^page_means with update_means must come with a plan made by plan_decode"):
        select_rows("hisa", *batch.paged, PARAMS, page_means=means, update_means=True)
    with pytest.raises(ValueError, match="^update_means=True must come with page_means"):
        select_rows("hisa", *batch.paged, PARAMS, update_means=True)
    for mode in ("native", "misa", "group_rerank"):
        with pytest.raises(ValueError, match=re.escape(f"mode (page_means given)='{mode}' must be one of ('hisa', ")):
            select_rows(mode, *batch.paged, PARAMS, page_means=means)
    with pytest.raises(ValueError, match="^page_means with mode='misa_rerank' must come with a plan made by plan_dec"):
        select_rows("misa_rerank", *batch.paged, PARAMS, page_means=means)
    with pytest.raises(ValueError, match="^block_size=32 must be a multiple of 64 with page_means"):
        select_rows("hisa", *batch.paged, SMALL, page_means=means)
    plan = plan_decode(tensors(batch)[2], batch.page_table.shape[1])
    with pytest.raises(ValueError, match="^route_block=96 must be a multiple of 64 with page_means"):
        params = replace(PARAMS, route_block=96)
        select_rows("misa_rerank", *batch.paged[:4], plan, params, page_means=means)
    for bad, error in ((means.float(), TypeError), (means[:-1], ValueError), (means.T.contiguous().T, ValueError)):
        with pytest.raises(error, match="^page_means (has dtype|has shape|must be contiguous)"):
            select_rows("hisa", *batch.paged, PARAMS, page_means=bad)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": torch.tensor([9000] * 6, dtype=torch.int32)}, ValueError, "lengths has 9000, must be at most"),
        (
            {"lengths": torch.tensor([1] * 5, dtype=torch.int32)},
            ValueError,
            re.escape("lengths has shape [5], must be"),
        ),
        ({"lengths": torch.tensor([1] * 6)}, TypeError, "lengths has dtype torch.int64, must be torch.int32"),
        ({"means": torch.zeros((3, 128), dtype=torch.bfloat16)}, ValueError, re.escape("means has shape [3, 128]")),
        ({"page_table": torch.full((6, 11), 99, dtype=torch.int32)}, ValueError, "page_table has page id 99, must be"),
        ({"page_table": torch.zeros((11, 6), dtype=torch.int32).T}, ValueError, "page_table must have unit column str"),
        ({"backend": "cpu"}, ValueError, "backend='cpu' must be one of"),
        ({"backend": "gpu"}, NotImplementedError, "backend='gpu', page means: k_pages is on cpu"),
    ],
)
def test_bad_input(batch, changes, error, message):
    k_pages, page_table, lengths = tensors(batch)
    given = {"k_pages": k_pages, "page_table": page_table, "lengths": lengths, "means": means_of(batch)} | changes
    with pytest.raises(error, match=f"^{message}"):
        update_page_means(**given)
    given["row_lengths"] = given.pop("lengths")
    with pytest.raises(error, match=f"^{message}"):
        update_last_page_means(**given)


def test_first_page_is_checked(batch):
    with pytest.raises(TypeError, match="^first_page has dtype torch.int64, must be torch.int32"):
        update_page_means(*tensors(batch), means_of(batch), first_page=torch.zeros(6, dtype=torch.int64))
