"""Runs page means and decode from stored means in Triton's interpreter, on a CPU, against the references.

A program of its own, like `interpreted_kernels`. DeepGEMM's logits are computed by the reference.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_decode

Prints how many rows were compared; an assertion ends it.
"""

import dataclasses
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from indexer_kernels import IndexerParams, page_means, select_rows
from indexer_kernels.gpu import decode, decode_scores_kernel, page_means_kernel, pipeline
from indexer_kernels.page_layout import PAGE_TOKENS, positions_to_slots, unpack_pages
from indexer_kernels.reference import statistics
from indexer_kernels.reference.routing import route_heads, routing_scores, take_heads
from indexer_kernels.reference.scores import block_scores, token_scores
from indexer_kernels.row_plan import RowPlan, plan_decode
from tests.support.compare import assert_form, overlap
from tests.support.gpu_calls import CountingTopK
from tests.support.inputs import Batch, make_batch

HISA = IndexerParams(top_k=64, block_size=128, top_blocks=5, local_tokens=40, active_heads=4, route_block=128)
# Two pages a block and one, statistics of the same blocks and of others, both statistics, forced blocks of any number.
SETTINGS = (
    HISA,
    dataclasses.replace(HISA, block_size=64, top_blocks=7, route_statistic="sum"),
    dataclasses.replace(HISA, top_blocks=6, local_tokens=129, route_block=64, route_statistic="sum"),
    dataclasses.replace(HISA, top_blocks=4, local_tokens=1, route_block=256, active_heads=8),
)
LENGTHS = [5000, 1300, 1, 640, 641, 63, 64, 1299]
SEEN = (LENGTHS, [4223, 1280, 0, 639, 1, 1, 1, 640])  # the second: as a graph replays, with padding and idle rows


def float_logits(
    q: torch.Tensor, weights: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`paged_logits` by the reference; NaN behind a row's end. Every page id of the table has to exist."""
    assert int(page_table.min()) >= 0 and int(page_table.max()) < k_pages.shape[0] and int(lengths.min()) >= 1
    scores = torch.full((q.shape[0], page_table.shape[1] * PAGE_TOKENS + 8), float("nan"))
    for row, length in enumerate(lengths.tolist()):
        k, k_scale = unpack_pages(k_pages[page_table[row].long()], length)
        scores[row, :length] = token_scores(q[row : row + 1], weights[row : row + 1], k, k_scale)[0]
    return scores[:, : page_table.shape[1] * PAGE_TOKENS]


def round_and_multiply_bfloat16() -> None:
    """Triton's interpreter cuts float32 to bfloat16, and takes the bits of bfloat16 for numbers; a GPU does neither."""
    builder = interpreter.InterpreterBuilder
    cast, dot, add = builder.cast_impl, builder.create_dot, builder.create_fadd

    def rounded(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, kind.scalar)
        return cast(self, source, kind)

    def of_floats(self, a, b, *others):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def of_floats_rounded(self, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return add(self, a, b)
        return self.cast_impl(add(self, *(self.cast_impl(x, tl.float32) for x in (a, b))), tl.bfloat16)

    builder.cast_impl, builder.create_dot, builder.create_fadd = rounded, of_floats, of_floats_rounded


def poisoned(batch: Batch) -> torch.Tensor:
    """Means of a pool of which nothing is known yet."""
    return torch.full((len(batch.k_pages), 128), float("nan"), dtype=torch.bfloat16)


def whole_means(batch: Batch, lengths: torch.Tensor) -> torch.Tensor:
    """Poison but for the full pages of the requests."""
    means = poisoned(batch)
    page_means.update_page_means(batch.k_pages, batch.page_table, lengths, means)
    return means


def kernel(function, *arguments):
    """A function of `page_means` by its Triton kernel."""
    with mock.patch.object(page_means, "use_gpu_on", lambda *_: True):
        return function(*arguments)


def check_updates(batch: Batch) -> None:
    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    cache = (batch.k_pages, batch.page_table, lengths)
    want = whole_means(batch, lengths)
    written = want.isfinite().all(1)
    assert int(written.sum()) == int((lengths // PAGE_TOKENS).sum()) and not written.all()
    got = poisoned(batch)
    kernel(page_means.update_page_means, *cache, got)
    assert torch.equal(got.isfinite().all(1), written) and got[~written].isnan().all()
    # Float32 sums in order against float64 sums: bfloat16 of nearly all is the same.
    assert (got[written] == want[written]).float().mean() > 0.999
    torch.testing.assert_close(got[written], want[written], rtol=2**-7, atol=1e-6)

    part, first = poisoned(batch), (lengths // PAGE_TOKENS - 2).clamp_min(-1)
    kernel(page_means.update_page_means, *cache, part, first)
    last = poisoned(batch)
    kernel(page_means.update_last_page_means, *cache, last)
    for request, full in enumerate((lengths // PAGE_TOKENS).tolist()):
        pages = batch.page_table[request, :full].long()
        assert torch.equal(part[pages[-2:]], got[pages[-2:]]) and part[pages[:-2]].isnan().all()
        assert torch.equal(last[pages[-1:]], got[pages[-1:]]) and last[pages[:-1]].isnan().all()

    assert int(kernel(page_means.check_page_means, *cache, got)) == 0
    assert int(kernel(page_means.check_page_means, *cache, last)) == int(
        (lengths // PAGE_TOKENS - 1).clamp_min(0).sum()
    )
    got[batch.page_table[1, 3], 77] *= 1.01
    assert int(kernel(page_means.check_page_means, *cache, got)) == 1


def check_blocks(batch: Batch) -> None:
    """Block means by the stored means are those by the keys, and the reference's."""
    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    stored = poisoned(batch)
    kernel(page_means.update_page_means, batch.k_pages, batch.page_table, lengths, stored)
    for pages in (1, 2, 3):
        most = max(batch.lengths) // (64 * pages) + 3
        by_keys, by_means = (torch.full((len(lengths), most, 128), float("nan")).bfloat16() for _ in range(2))
        cache = (batch.k_pages, batch.page_table, lengths, pages)
        page_means_kernel.block_means(*cache, None, by_keys)
        page_means_kernel.block_means(*cache, stored, by_means)
        assert torch.equal(by_keys, by_means)
        for request, length in enumerate(batch.lengths):
            full = length // (64 * pages)
            want = statistics.blocks_of_pages(stored[batch.page_table[request, : length // 64].long()], 64 * pages)
            torch.testing.assert_close(by_keys[request, :full].float(), want, rtol=2**-7, atol=1e-6)
            assert (by_keys[request, full:] == 0).all()


def check_scores(batch: Batch, lengths: torch.Tensor, means: torch.Tensor, params: IndexerParams) -> None:
    """Statistics and scores are the formulas' numbers, by all heads and by the routed ones."""
    read = (batch.q, batch.weights, means, batch.page_table, lengths, params)
    found = decode_scores_kernel.route_statistics(*read)
    scores = [decode_scores_kernel.decode_scores(*read, 12, given) for given in (None, found)]
    for row, length in enumerate(lengths.tolist()):
        if length <= params.block_size * params.top_blocks:
            continue
        pages = means[batch.page_table[row, : length // PAGE_TOKENS].long()]
        q, weights = batch.q[row : row + 1], batch.weights[row : row + 1]
        full = torch.tensor([length // params.route_block])
        routes = statistics.blocks_of_pages(pages, params.route_block)
        routing = routing_scores(q, weights, routes, full, params.route_statistic)
        chunks = found[row, : -(-int(full) // decode_scores_kernel.UNITS)]
        joined = chunks.sum(0) if params.route_statistic == "sum" else chunks.amax(0)
        torch.testing.assert_close(joined * weights[0].abs(), routing[0], rtol=1e-4, atol=1e-4)
        blocks = statistics.blocks_of_pages(pages, params.block_size)
        last = max(length - params.local_tokens, 0) // params.block_size
        heads = route_heads(routing, params.active_heads)
        for got, of in zip(scores, ((q, weights), take_heads(q, weights, heads))):
            want = block_scores(*of, blocks[:last])[0]
            torch.testing.assert_close(got[row, :last], want, rtol=1e-4, atol=1e-4)


def check_decode(batch: Batch, plan: RowPlan, means: torch.Tensor, mode: str, params: IndexerParams) -> None:
    """means: the kernel's."""
    lengths, top_k = plan.row_lengths.tolist(), CountingTopK()
    tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table)
    once = plan.for_one_forward()
    arguments = {"top_k_kernel": top_k, "page_means": means}
    got = pipeline.select_rows(mode, *tensors, once, params, **arguments)
    assert_form(got, lengths, params.top_k)
    want = select_rows(mode, *tensors, plan, params, backend="reference", page_means=means)
    # Scores are float32 sums in another order; a tie of two blocks by chance may be cut elsewhere.
    assert overlap(got, want) > 0.999, (mode, params, overlap(got, want))
    slots = pipeline.select_rows(mode, *tensors, once, params, output="slot", **arguments)
    assert top_k.plans == 1 and top_k.calls == 2, "one plan for two layers"
    assert torch.equal(slots.sort(1).values, positions_to_slots(got, batch.page_table).sort(1).values)
    # The last means made on the way are those made before, where local tokens are enough to do it on the side or not.
    last = (plan.row_lengths // PAGE_TOKENS - 1).clamp_min(0).long()
    last = batch.page_table.gather(1, last[:, None])[plan.row_lengths >= PAGE_TOKENS, 0].long()
    stale = means.clone()
    stale[last] = 5.0
    again = pipeline.select_rows(mode, *tensors, plan, params, **(arguments | {"page_means": stale}), update_means=True)
    assert torch.equal(again, got) and top_k.plans == 2, "without a plan for one forward, each layer makes its own"
    assert torch.equal(stale[last], means[last]) and torch.equal(stale.isnan(), means.isnan())


def main() -> None:
    compared = 0
    round_and_multiply_bfloat16()
    decode.paged_logits = lambda *tensors: float_logits(*tensors[:5])
    decode.paged_schedule = lambda lengths: int(lengths.min()) >= 1
    decode.num_sms = lambda _device: 3  # some programs of scores take several turns
    pages = make_batch([450, 320, 64, 63, 1, 383], 1, num_heads=1, seed=6)
    check_updates(pages)
    check_blocks(pages)
    for num_heads in (64, 32):
        batch = make_batch(LENGTHS, 1, num_heads=num_heads, seed=5)
        means = poisoned(batch)
        kernel(page_means.update_page_means, batch.k_pages, batch.page_table, batch.plan.request_lengths, means)
        for seen in SEEN:
            plan = plan_decode(torch.tensor(seen, dtype=torch.int32), batch.page_table.shape[1])
            for params in SETTINGS if num_heads == 64 else SETTINGS[:1]:
                check_scores(batch, plan.row_lengths, means, params)
                for mode in ("hisa", "misa_rerank"):
                    check_decode(batch, plan, means, mode, params)
                    compared += plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
