"""Page means and decode from stored means on the GPU: bits, selections, graphs."""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.gpu import candidate_counts_kernel, decode_scores_kernel, page_means_kernel
from indexer_kernels.page_means import (
    check_page_means,
    page_mean_buffer,
    update_last_page_means,
    update_page_means,
)
from indexer_kernels.reference.scores import block_scores
from indexer_kernels.reference.statistics import blocks_of_pages
from indexer_kernels.row_plan import plan_decode
from tests.support.compare import assert_form, overlap
from tests.support.gpu_calls import CountingTopK
from tests.support.inputs import Batch, make_batch, slots_of

pytestmark = pytest.mark.gpu

HISA = IndexerParams(top_k=256, block_size=128, top_blocks=8, active_heads=8)
SETTINGS = {
    "blocks of 128": HISA,
    "blocks of 64, sums": dataclasses.replace(HISA, block_size=64, top_blocks=16, route_statistic="sum"),
    "blocks of 256": dataclasses.replace(HISA, block_size=256, top_blocks=5, route_block=64, local_tokens=300),
    "defaults": IndexerParams(),
}
LENGTHS = [20000, 9000, 1, 8192, 8193, 63, 64, 4001, 1024, 1025]
MODES = ("hisa", "misa_rerank")
AGREEMENT = {"hisa": 0.99, "misa_rerank": 0.98}  # a near tie of two heads moves a row's blocks


def lengths_of(batch: Batch) -> torch.Tensor:
    return batch.plan.request_lengths.clone()


def means_of(batch: Batch) -> torch.Tensor:
    """Means of the full pages, NaN elsewhere."""
    means = torch.full((len(batch.k_pages), 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    update_page_means(batch.k_pages, batch.page_table, lengths_of(batch), means, backend="gpu")
    return means


def decode(batch: Batch, mode: str, lengths: torch.Tensor, params: IndexerParams, means: torch.Tensor, **others):
    plan = plan_decode(lengths, batch.page_table.shape[1]).for_one_forward()
    tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table)
    return select_rows(mode, *tensors, plan, params, page_means=means, **{"backend": "gpu"} | others)


@pytest.fixture(params=[64, 32], ids=["H64", "H32"])
def batch(request) -> Batch:
    return make_batch(LENGTHS, 1, num_heads=request.param, device="cuda", seed=3)


def test_means_of_every_kernel_are_bitwise_equal():
    batch = make_batch(LENGTHS, 1, num_heads=1, device="cuda", seed=4)
    lengths, means = lengths_of(batch), means_of(batch)
    exact = torch.full_like(means, float("nan"))
    update_page_means(batch.k_pages, batch.page_table, lengths, exact, backend="reference")
    assert torch.equal(means.isnan(), exact.isnan()), "all full pages, and no other"
    known = ~exact.isnan().any(1)
    assert known.sum() == (lengths // 64).sum()
    assert (means[known] == exact[known]).float().mean() > 0.998
    assert (means[known].float() - exact[known].float()).norm() < 1e-3 * exact[known].float().norm()

    # One page at a time, as decode reaches them.
    stepwise = torch.full_like(means, float("nan"))
    for page in range(int(lengths.max()) // 64):
        seen = torch.minimum(lengths, torch.full_like(lengths, 64 * page + 64 + page % 64))
        update_last_page_means(batch.k_pages, batch.page_table, seen, stepwise, backend="gpu")
    assert torch.equal(stepwise.view(torch.int16), means.view(torch.int16))

    for pages in (1, 2, 3):
        blocks = max(LENGTHS) // (64 * pages) + 1
        by_keys, by_means = (torch.empty((len(lengths), blocks, 128), dtype=torch.bfloat16).cuda() for _ in range(2))
        page_means_kernel.block_means(batch.k_pages, batch.page_table, lengths, pages, None, by_keys)
        page_means_kernel.block_means(batch.k_pages, batch.page_table, lengths, pages, means, by_means)
        assert torch.equal(by_keys, by_means)
        for request, length in enumerate(LENGTHS):
            own = means[batch.page_table[request, : length // 64].long()]
            want = blocks_of_pages(own, 64 * pages).bfloat16()
            if pages < 3:  # a third is not a power of two
                assert torch.equal(by_keys[request, : len(want)], want)
            assert (by_keys[request, len(want) :] == 0).all()


def test_check_counts_what_differs():
    batch = make_batch(LENGTHS, 1, num_heads=1, device="cuda", seed=5)
    lengths, means = lengths_of(batch), means_of(batch)
    arguments = (batch.k_pages, batch.page_table, lengths, means)
    assert int(check_page_means(*arguments, backend="gpu")) == 0
    means[batch.page_table[0, [3, 4, 311]].long(), 7] = 3.0
    means[batch.page_table[0, 312].long()] = 3.0  # partly filled
    count = check_page_means(*arguments, backend="gpu")
    assert int(count) == 3 and count.dtype == torch.int32 and count.is_cuda
    update_page_means(*arguments, torch.full_like(lengths, 4), backend="gpu")
    assert int(check_page_means(*arguments, backend="gpu")) == 1, "page 3 lies before the first"


@pytest.mark.parametrize("name", SETTINGS)
def test_block_scores(batch, name):
    """Each score against its formula; nothing where a row keeps all its blocks."""
    params, means, lengths = SETTINGS[name], means_of(batch), lengths_of(batch)
    scores = decode_scores_kernel.decode_scores(
        batch.q, batch.weights, means, batch.page_table, lengths, params, programs=7
    )
    compared = 0
    for row, length in enumerate(LENGTHS):
        if length <= params.block_size * params.top_blocks:
            continue
        last = (length - params.local_tokens) // params.block_size
        own = means[batch.page_table[row, : length // 64].long()]
        blocks = blocks_of_pages(own, params.block_size)[:last]
        want = block_scores(batch.q[row : row + 1], batch.weights[row : row + 1], blocks)[0]
        assert (scores[row, :last] - want).abs().max() <= 2e-3 * want.abs().max()
        compared += last
    assert compared > 100


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_selects_what_the_reference_selects(batch, mode, name):
    params, means = SETTINGS[name], means_of(batch)
    lengths = lengths_of(batch)
    got = decode(batch, mode, lengths, params, means)
    assert_form(got, LENGTHS, params.top_k)
    want = decode(batch, mode, lengths, params, means, backend="reference")
    assert overlap(got, want) >= AGREEMENT[mode]
    slots = decode(batch, mode, lengths, params, means, output="slot")
    for row, length in enumerate(LENGTHS):
        count = min(length, params.top_k)
        assert sorted(slots[row, :count].tolist()) == sorted(slots_of(batch, row, got[row, :count].tolist()))
        assert (slots[row, count:] == -1).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_that_covers_the_row_is_native(batch, mode):
    params, lengths = IndexerParams(), lengths_of(batch).clamp_max(8192)
    got = decode(batch, mode, lengths, params, means_of(batch))
    plan = plan_decode(lengths, batch.page_table.shape[1])
    native = select_rows("native", *batch.paged[:4], plan, params, backend="gpu")
    assert torch.equal(got.sort(1).values, native.sort(1).values)


def test_stored_means_and_keys_choose_the_same_in_prefill():
    batch = make_batch([9000, 4001, 131], [300, 63, 7], device="cuda", seed=6)
    means = means_of(batch)
    by_keys, by_means = (
        select_rows("hisa", *batch.paged, HISA, backend="gpu", page_means=given) for given in (None, means)
    )
    assert torch.equal(by_keys.sort(1).values, by_means.sort(1).values)


def test_decode_and_prefill_choose_the_same():
    """The last row of a prompt, as a row of prefill and as one of decode."""
    batch = make_batch([20000, 9000, 4001], 1, device="cuda", seed=7)
    prefill = select_rows("hisa", *batch.paged, HISA, backend="gpu")
    assert overlap(decode(batch, "hisa", lengths_of(batch), HISA, means_of(batch)), prefill) > 0.99


@pytest.mark.parametrize("mode", MODES)
def test_verify_rows(mode):
    """Several rows of a request, table rows repeated, over the border of a page; each as it is alone."""
    batch = make_batch([9000, 4032], [1, 1], device="cuda", seed=8)
    last = torch.tensor([8958, 8959, 8960, 8961, 4029, 4030, 4031, 4032], dtype=torch.int32, device="cuda")
    request = torch.tensor([0] * 4 + [1] * 4, device="cuda")
    rows = make_batch([9000], 8, device="cuda", seed=9)  # other queries for each row
    tensors = (rows.q, rows.weights, batch.k_pages, batch.page_table[request].contiguous())
    means = page_mean_buffer(len(batch.k_pages), "cuda")
    update_page_means(batch.k_pages, batch.page_table, lengths_of(batch) - 64, means, backend="gpu")
    update_last_page_means(batch.k_pages, tensors[3], last, means, backend="gpu")
    assert int(check_page_means(batch.k_pages, tensors[3], last, means, backend="gpu")) == 0
    plan = plan_decode(last, tensors[3].shape[1]).for_one_forward()
    got = select_rows(mode, *tensors, plan, HISA, page_means=means, backend="gpu").sort(1).values
    for row in range(8):
        one = slice(row, row + 1)
        plan = plan_decode(last[one], tensors[3].shape[1])
        q = tensors[0].view(torch.uint8)[one].view(torch.float8_e4m3fn)
        alone = select_rows(
            mode, q, tensors[1][one], tensors[2], tensors[3][one], plan, HISA, page_means=means, backend="gpu"
        )
        assert torch.equal(alone.sort(1).values[0], got[row])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [512, 700])
def test_large_batches_are_their_rows(mode, rows):
    random = torch.Generator().manual_seed(10)
    lengths = torch.randint(1, 3000, (rows,), generator=random).tolist()
    lengths[:4] = [1, 5000, 64, 2999]
    batch = make_batch(lengths, 1, num_heads=32, device="cuda", seed=11)
    means = means_of(batch)
    got = decode(batch, mode, lengths_of(batch), HISA, means).sort(1).values
    assert_form(got.flip(1), lengths, HISA.top_k)
    for start in range(0, rows, 97):
        part = slice(start, min(rows, start + 3))
        plan = plan_decode(lengths_of(batch)[part].contiguous(), batch.page_table.shape[1])
        q = batch.q.view(torch.uint8)[part].view(torch.float8_e4m3fn)
        tensors = (q, batch.weights[part], batch.k_pages, batch.page_table[part])
        alone = select_rows(mode, *tensors, plan, HISA, page_means=means, backend="gpu")
        assert torch.equal(alone.sort(1).values, got[part])


@pytest.mark.parametrize("on_the_way", [False, True], ids=["updates apart", "updates on the way"])
@pytest.mark.parametrize(("num_heads", "layers"), [(64, 1), (64, 3), (32, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_follows_lengths_and_keys(mode, num_heads, layers, on_the_way):
    """A step as a server captures it: update and selection of every layer, what depends on lengths made by the first.

    Replayed at other lengths, with padded rows on page 0, and after pages were written anew.
    """
    params = dataclasses.replace(HISA, top_k=256)
    batches = [make_batch(LENGTHS, 1, num_heads=num_heads, device="cuda", seed=20 + n) for n in range(layers)]
    buffers = [means_of(batch) for batch in batches]
    tables = [batch.page_table.clone() for batch in batches]
    lengths, top_k = torch.ones(len(LENGTHS), dtype=torch.int32, device="cuda"), CountingTopK()
    outs = [torch.full((len(LENGTHS), params.top_k), -9, dtype=torch.int32, device="cuda") for _ in batches]

    def step() -> None:
        plan = plan_decode(lengths, tables[0].shape[1]).for_one_forward()
        for batch, means, table, out in zip(batches, buffers, tables, outs):
            if not on_the_way:
                update_last_page_means(batch.k_pages, table, lengths, means, backend="gpu")
            tensors = (batch.q, batch.weights, batch.k_pages, table)
            given = {"page_means": means, "update_means": on_the_way}
            select_rows(mode, *tensors, plan, params, "gpu", top_k_kernel=top_k, out=out, **given)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert top_k.plans == 2 and top_k.calls == 2 * layers, "one plan a forward"
    padded = [9000, 1, 1, 700, 64, 1, 1, 4001, 1024, 1025]
    for values in (LENGTHS, [n - 1 if n > 1 else 1 for n in LENGTHS], padded, LENGTHS):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        for batch, table in zip(batches, tables):
            table.copy_(batch.page_table)
            table[lengths == 1, 0] = 0
            # The last full page of the longest row was a draft's: other keys take its place.
            page = int(table[0, values[0] // 64 - 1])
            batch.k_pages[page, :8192] = batch.k_pages[page, :8192].roll(128 * 5 + 1)
        graph.replay()
        torch.cuda.synchronize()
        for batch, means, table, out in zip(batches, buffers, tables, outs):
            assert_form(out, values, params.top_k)
            full = torch.where(lengths == 1, 0, lengths)
            assert int(check_page_means(batch.k_pages, table, full, means, backend="gpu")) == 0
            plan = plan_decode(lengths, table.shape[1])
            tensors = (batch.q, batch.weights, batch.k_pages, table)
            eager = select_rows(mode, *tensors, plan, params, "gpu", page_means=means)
            assert torch.equal(out.sort(1).values, eager.sort(1).values)


def test_the_widest_page_table():
    """A table of the model's longest context: what lies past a row's length is garbage, and never read."""
    batch = make_batch([163840, 3000], 1, device="cuda", seed=30)
    means, params = means_of(batch), IndexerParams()
    got = decode(batch, "hisa", lengths_of(batch), params, means)
    want = decode(batch, "hisa", lengths_of(batch), params, means, backend="reference")
    assert_form(got, [163840, 3000], params.top_k)
    assert overlap(got, want) > 0.99


def test_no_second_variant_and_nothing_read_back(batch, monkeypatch):
    means, lengths = means_of(batch), lengths_of(batch)
    for mode in MODES:
        decode(batch, mode, lengths, HISA, means)
    kernels = (
        decode_scores_kernel.decode_scores_kernel,
        decode_scores_kernel.route_statistics_kernel,
        candidate_counts_kernel.candidate_counts_kernel,
        page_means_kernel.update_means_kernel,
    )
    update_last_page_means(batch.k_pages, batch.page_table, lengths, means, backend="gpu")
    for kernel in kernels:
        monkeypatch.setattr(kernel, "compile", lambda *_, **__: pytest.fail("a batch compiled a second variant"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in (1, 3, len(LENGTHS)):
            plan = plan_decode(lengths[:rows], batch.page_table.shape[1])
            q = batch.q.view(torch.uint8)[:rows].view(torch.float8_e4m3fn)
            tensors = (q, batch.weights[:rows], batch.k_pages, batch.page_table[:rows])
            update_page_means(batch.k_pages, tensors[3], lengths[:rows], means, backend="gpu")
            update_last_page_means(batch.k_pages, tensors[3], lengths[:rows], means, backend="gpu")
            for mode in MODES:
                select_rows(mode, *tensors, plan, HISA, "gpu", page_means=means)
    finally:
        torch.cuda.set_sync_debug_mode("default")
