"""Runs group_rerank of the gpu backend in Triton's interpreter, on a CPU, against the references.

A program of its own, like `interpreted_kernels`. The products of TileLang, the scan and the scores of a list, are
computed by the reference, and so are the proxies, for the interpreter does not round to fp8 as a GPU does.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_group_rerank

Prints how many rows were compared; an assertion ends it.
"""

from collections.abc import Callable
from unittest import mock

import torch

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.gpu import (
    bit_list_kernel,
    group_rerank,
    group_scan,
    keep_best_kernel,
    sample_kernel,
    sample_threshold_kernel,
    work,
)
from indexer_kernels.gpu.group_rerank_kernel import GroupList, group_pick
from indexer_kernels.gpu.lists import Lists
from indexer_kernels.gpu.routed import Keys
from indexer_kernels.gpu.work import Pool, Work
from indexer_kernels.page_layout import HEAD_DIM, PAGE_TOKENS, positions_to_slots
from indexer_kernels.reference.candidates import group_candidates
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.row_groups import group_proxies
from indexer_kernels.row_plan import TILE_ROWS, RowPlan, plan_decode, plan_rows
from indexer_kernels.top_k import torch_top_k
from tests.support.compare import assert_form, assert_nothing_lost
from tests.support.emulated_cuda import build_bit_list, build_sample_threshold
from tests.support.inputs import Batch, make_batch
from tests.support.interpreted_token_modes import mask_of
from tests.support.packed_proxies import packed, unpacked

PARAMS = IndexerParams(top_k=64, candidates=384, local_tokens=40)
# Lengths and rows: beyond the budget, at it, within it, of one token; whole groups, and groups cut at both ends; more
# groups than a tile has places.
SHAPES = (([705, 131, 1, 387, 384, 386], [9, 3, 1, 3, 2, 2]), ([1000], [70]))
BYTES = {"whole": work.SCRATCH_BYTES, "sliced": 3 << 12}
# Heads, group, scratch, and how far the sample is mistrusted: with 0 many lists are too short and scanned again.
CASES = (
    (64, 4, "whole", 5.0),
    (64, 2, "sliced", 0.0),
    (64, 4, "sliced", 5.0),
    (32, 2, "whole", 0.0),
)


def float_scan(job: Work, proxies, scanned: Keys, tile_pages, tiles, width, form, thresholds=None) -> torch.Tensor:
    """`group_scan.scan` by the reference; NaN past a tile's pages and at places without a group, and no bit there."""
    plan, of_place = job.plan, unpacked(proxies, job.q.shape[1])
    scores = torch.full(((tiles.stop - tiles.start) * TILE_ROWS, width * PAGE_TOKENS), float("nan"))
    for place, row in enumerate(plan.tile_rows[tiles].flatten().tolist()):
        tile = tiles.start + place // TILE_ROWS
        pages = int(tile_pages[tile]) if row >= 0 else 0
        if pages:
            page = scanned.page_table[int(plan.tile_request[tile]), :pages].long()
            keys = scanned.keys.view(torch.uint8).view(-1, 66, 128)[page, :64].reshape(-1, 128)
            scales = scanned.scales.view(-1, 33, 64)[page, 32].flatten()
            one = slice(tiles.start * TILE_ROWS + place, tiles.start * TILE_ROWS + place + 1)
            tensors = (of_place.q[one], of_place.weights[one], keys.view(torch.float8_e4m3fn), scales)
            scores[place, : pages * PAGE_TOKENS] = token_scores(*tensors)[0]
    if form == "scores":
        return scores
    return mask_of((scores >= thresholds[:, None]).view(-1, TILE_ROWS, width * PAGE_TOKENS))


def float_scores(job: Work, groups: GroupList) -> torch.Tensor:
    """`group_scores` by the reference; NaN behind a list's end and for places without a row."""
    shape = (groups.rows.numel(), group_rerank.width_of(groups.chosen.slots.shape[1], job.params.group))
    scores = torch.full(shape, float("nan"))
    for g, rows in enumerate(groups.rows.tolist()):
        count, scanned = int(groups.chosen.counts[g]), int(groups.scanned[g])
        own = torch.arange(scanned, scanned + int(groups.columns[g]) - count)
        table = job.page_table[int(groups.request[g])]
        slots = torch.cat([groups.chosen.slots[g, :count].long(), table[own // 64].long() * 64 + own % 64])
        keys, scales = job.pool.keys[slots // 64 * 66 + slots % 64], job.pool.scales[slots // 64 * 33 + 32, slots % 64]
        for place, row in enumerate(rows):
            if row >= 0:
                one = slice(row, row + 1)
                found = token_scores(job.q[one], job.weights[one], keys, scales)[0]
                scores[g * len(rows) + place, : len(slots)] = found
    return scores


def list_of(plan: RowPlan, page_table: torch.Tensor, group: int, budget: int) -> tuple[GroupList, torch.Tensor]:
    """A list of random tokens for each group, some of `budget` tokens and some shorter, and each row's share of it."""
    rows, _ = plan.groups(group)
    first = rows[:, 0].long()
    scanned = ((plan.row_lengths[first] - 1) // group * group + 1).int()
    random = torch.Generator().manual_seed(3)
    positions = torch.full((len(rows), budget), -1, dtype=torch.int32)
    for line, reach in zip(positions, scanned.tolist()):
        some = torch.randperm(reach, generator=random)[:budget].sort().values
        line[: len(some)] = some
    slots = positions_to_slots(positions, page_table[plan.row_request[first].long()])
    counts = (positions >= 0).sum(1).int()
    shares = torch.where(rows >= 0, counts[:, None] + plan.row_lengths[rows.clamp_min(0).long()] - scanned[:, None], 0)
    chosen = Lists(positions, slots, counts, torch.zeros_like(counts))
    return GroupList(chosen, rows, plan.row_request[first], scanned, shares.amax(1).int()), shares


def check_pick(batch: Batch, group: int) -> None:
    """List indices as positions and as slots."""
    budget, (_, row_place) = PARAMS.candidates, batch.plan.groups(group)
    groups, shares = list_of(batch.plan, batch.page_table, group, budget)
    random = torch.Generator().manual_seed(4)
    picks = torch.full((groups.rows.numel(), 70), -1, dtype=torch.int32)
    want = torch.full((batch.plan.num_rows, 70), -1, dtype=torch.int32)
    for row, place in enumerate(row_place.tolist()):
        g, share = place // group, int(shares.flatten()[place])
        count, scanned = int(groups.chosen.counts[g]), int(groups.scanned[g])
        tokens = torch.cat([groups.chosen.positions[g, :count], torch.arange(scanned, batch.lengths[row])]).long()
        assert len(tokens) == share
        some = torch.randperm(share, generator=random)[:60]
        picks[place, : len(some)], want[row, : len(some)] = some.int(), tokens[some].int()
    for slots in (False, True):
        found = torch.full_like(want, -7)
        group_pick(picks, row_place, batch.page_table, groups, slots, found)
        table = batch.page_table[torch.tensor(batch.row_request)]
        assert torch.equal(found, positions_to_slots(want, table) if slots else want), (group, slots)


def run(batch: Batch, plan: RowPlan, params: IndexerParams, slots: bool = False) -> tuple[torch.Tensor, Lists]:
    """The whole mode, as `pipeline.select_rows` calls it, and the candidates of its groups."""
    pages = batch.k_pages
    pool = Pool(pages, pages.view(torch.float8_e4m3fn).view(-1, HEAD_DIM), pages.view(torch.float32).view(-1, 64))
    out = torch.full((plan.num_rows, params.top_k), -9, dtype=torch.int32)
    job = Work(batch.q, batch.weights, pool, batch.page_table, plan, params, slots, aligned(torch_top_k), out)
    kept: list[Lists] = []
    lists = group_rerank.group_lists
    with mock.patch.object(group_rerank, "group_lists", lambda *args: kept.append(lists(*args)) or kept[0]):
        group_rerank.group_rerank(job)
    return out, kept[0]


def aligned(top_k: Callable[..., None]) -> Callable[..., None]:
    """top_k, after a look at what SGLang's kernel wants of its input."""

    def checked(scores: torch.Tensor, lengths: torch.Tensor, *others: object) -> None:
        assert scores.stride(1) == 1 and scores.stride(0) % 4 == 0 and lengths.dtype == torch.int32
        assert lengths.is_contiguous() and int(lengths.min()) >= 0 and int(lengths.max()) <= scores.shape[1]
        top_k(scores, lengths, *others)

    return checked


def check_candidates(batch: Batch, plan: RowPlan, params: IndexerParams, chosen: Lists) -> None:
    """The scan kept the reference's tokens of each group, and beside them only such as score next best."""
    rows, _ = plan.groups(params.group)
    first = rows[:, 0].long()
    proxies = group_proxies(batch.q, batch.weights, rows)
    for g, (request, length) in enumerate(zip(plan.row_request[first].tolist(), plan.row_lengths[first].tolist())):
        start = (length - 1) // params.group * params.group
        one, reach = slice(g, g + 1), max(start + 1, 0)
        tensors = (proxies.q[one], proxies.weights[one], batch.k[request][:reach], batch.k_scale[request][:reach])
        at, scores = torch.tensor([start]), token_scores(*tensors)
        want = group_candidates(scores, at, at + 1, params)[0]
        listed = chosen.positions[g, : int(chosen.counts[g])].long()
        assert (listed.diff() > 0).all()
        more = torch.zeros_like(want)
        more[listed] = True
        assert (more | ~want).all(), (g, length)
        assert (
            len(listed) == reach or scores[0][more].min() >= scores[0][~more].max() or forced_only(more, want, params)
        )


def forced_only(more: torch.Tensor, want: torch.Tensor, params: IndexerParams) -> bool:
    """Whether what is listed beyond the best scores is what must be listed."""
    reach = len(more)
    searched = slice(PAGE_TOKENS, max(PAGE_TOKENS, reach - params.local_tokens))
    return bool(more[:PAGE_TOKENS].all() and more[searched.stop :].all() and (more[searched] | ~want[searched]).all())


def check_mode(batch: Batch, plan: RowPlan, params: IndexerParams) -> None:
    lengths = plan.row_lengths.tolist()
    got, chosen = run(batch, plan, params)
    check_candidates(batch, plan, params, chosen)
    assert_form(got, lengths, params.top_k)
    want = select_rows("group_rerank", *batch.paged[:4], plan, params, backend="reference")
    native = select_rows("native", *batch.paged[:4], plan, params, backend="reference")
    assert_nothing_lost(got, want, native, 0.002)
    table = batch.page_table[plan.row_request.long()]
    slots = run(batch, plan, params, slots=True)[0]
    assert torch.equal(slots.sort(1).values, positions_to_slots(got, table).sort(1).values)


def main() -> None:
    keep_best_kernel.BLOCK = 512  # several blocks a row on short rows
    bit_list_kernel.build, sample_threshold_kernel.build = build_bit_list, build_sample_threshold
    group_scan.scan, group_scan.num_sms, group_rerank.group_scores = float_scan, lambda _device: 2, float_scores
    group_scan.group_proxies = lambda q, weights, rows, *places: packed(group_proxies(q, weights, rows), *places)
    compared = 0
    for lengths, rows in SHAPES:
        for num_heads, group, scratch, sigmas in CASES:
            work.SCRATCH_BYTES, sample_kernel.SIGMAS = BYTES[scratch], sigmas
            params = IndexerParams(top_k=64, candidates=384, local_tokens=40, group=group)
            batch = make_batch(lengths, rows, num_heads=num_heads, seed=5)
            check_pick(batch, group)
            check_mode(batch, batch.plan, params)
            compared += batch.plan.num_rows
    # Decode: one row a request, some without a token; and rows in no order, some of them without a token or repeated.
    batch = make_batch([705, 131, 1, 387, 384], 1, num_heads=64, seed=6)
    for seen in ([705, 131, 1, 387, 384], [704, 0, 1, 64, 384]):
        seen = torch.tensor(seen, dtype=torch.int32)
        check_mode(batch, plan_decode(seen, batch.page_table.shape[1]), PARAMS)
        compared += len(seen)
    batch = make_batch([705, 450], [12, 6], num_heads=64, seed=7)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(8))
    seen = torch.tensor(batch.lengths)[order]
    seen[[1, 5, 6]] = torch.tensor([0, 0, 700])
    check_mode(batch, plan_rows(torch.tensor(batch.row_request)[order], seen, 2), PARAMS)
    print(f"{compared + 18} rows compared")


if __name__ == "__main__":
    main()
