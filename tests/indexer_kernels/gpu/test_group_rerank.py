"""group_rerank on a GPU: each of its kernels against the references, the mode against the reference."""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_paged, select_ragged, select_rows
from indexer_kernels.gpu import group_proxy_kernel, group_scan, work
from indexer_kernels.gpu.group_rerank import group_scores
from indexer_kernels.gpu.group_rerank_kernel import GroupList, group_pick
from indexer_kernels.gpu.lists import Lists
from indexer_kernels.gpu.routed import cache_keys
from indexer_kernels.gpu.sample_threshold_kernel import Thresholds, sample_threshold
from indexer_kernels.gpu.work import pages_of, table_pages
from indexer_kernels.page_layout import positions_to_slots
from indexer_kernels.reference.candidates import group_candidates
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.row_groups import group_proxies
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.compare import assert_form, assert_nothing_lost, overlap
from tests.support.gpu_calls import DECODE_LENGTHS, assert_a_graph_follows_the_lengths, work_of
from tests.support.inputs import make_batch, slots_of
from tests.support.packed_proxies import unpacked

pytestmark = pytest.mark.gpu

MODE = "group_rerank"
SHAPES = {
    "one row, one key": ([1], [1]),
    "63 rows": ([63], [63]),
    "4001 rows": ([4001], [4001]),
    "last rows of several": ([131, 9000, 1, 20000], [131, 401, 1, 63]),
    "groups cut at both ends": ([9003, 2, 4098, 9001], [3, 1, 6, 9]),
}
SMALL = IndexerParams(top_k=256, candidates=1024)
DEFAULT = IndexerParams()


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return SHAPES[request.param]


def sorted_rows(selected):
    return selected.sort(dim=1).values


@pytest.mark.parametrize("group", [1, 2, 4])
def test_proxies_are_bitwise_those_of_the_cpu(group, shape):
    """The reference backend and this one rank by the same proxies, whatever device they run on."""
    batch = make_batch(*shape, num_heads=32, device="cuda", seed=41)
    rows, scans = batch.plan.groups(group).rows, batch.plan.scans(group)
    places = (scans.row_place, scans.num_tiles * TILE_ROWS)
    got = unpacked(group_proxy_kernel.group_proxies(batch.q, batch.weights, rows, *places), 32)
    want = group_proxies(batch.q.cpu(), batch.weights.cpu(), rows.cpu())
    for mine, theirs in zip(got, want):
        assert torch.equal(mine.view(torch.uint8)[scans.row_place.long()].cpu(), theirs.view(torch.uint8))


def scan_of(batch, group, form, thresholds=None):
    """Every token of every group, in one of the scan's forms."""
    scans = batch.plan.scans(group)
    job = work_of(batch, IndexerParams(group=group))._replace(plan=scans)
    rows, num_places = batch.plan.groups(group).rows, scans.num_tiles * TILE_ROWS
    proxies = group_proxy_kernel.group_proxies(batch.q, batch.weights, rows, scans.row_place, num_places)
    tiles, width = slice(0, scans.num_tiles), group_scan.whole_stages(table_pages(job))
    return group_scan.scan(job, proxies, cache_keys(job), pages_of(scans.tile_length), tiles, width, form, thresholds)


def reference_scores(batch, group, g):
    """The scores of group g's proxy for the tokens that its first position sees."""
    rows, scans = batch.plan.groups(group).rows[g : g + 1], batch.plan.scans(group)
    request, seen = int(scans.row_request[g]), int(scans.row_lengths[g])
    proxy = group_proxies(batch.q, batch.weights, rows)
    return token_scores(proxy.q, proxy.weights, batch.k[request][:seen], batch.k_scale[request][:seen])


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_the_scan_scores_as_the_reference_does(num_heads, group, shape):
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=43)
    scans, scores = batch.plan.scans(group), scan_of(batch, group, "scores")
    for g in range(0, scans.num_rows, max(1, scans.num_rows // 100)):
        want = reference_scores(batch, group, g)[0]
        got = scores[int(scans.row_place[g]), : len(want)]
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_bits_are_the_scores_that_reach_the_threshold(num_heads, group, shape):
    """Both forms of the scan round alike: a bit is set exactly where the other form's score reaches the threshold."""
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=44)
    scans, scores = batch.plan.scans(group), scan_of(batch, group, "scores")
    thresholds = torch.randn(len(scores), device="cuda") * 3
    mask = scan_of(batch, group, "mask", thresholds)
    key = torch.arange(int(scans.row_lengths.max()), device="cuda")
    for g, seen in enumerate(scans.row_lengths.tolist()):
        place = int(scans.row_place[g])
        tile, inside = divmod(place, TILE_ROWS)
        at = key[:seen]
        word = mask[tile, at // 16, at % 16 // 8 * 8 + inside // 8 * 2 + inside % 2]
        assert torch.equal((word >> (at % 8 * 4 + inside % 8 // 2)) & 1 == 1, scores[place, :seen] >= thresholds[place])


@pytest.mark.parametrize("sure", [True, False], ids=["lists", "rescans"])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_lists_hold_the_best_of_each_group(num_heads, sure, shape, monkeypatch):
    """The reference's candidates are all in a group's list; where thresholds let nothing through, a rescan's are."""
    if not sure:

        def misled(scores, rows, *args):
            found = sample_threshold(scores, rows, *args)
            return Thresholds(torch.full_like(found.scores, float("inf")), found.limits)

        monkeypatch.setattr(group_scan, "sample_threshold", misled)
    batch, group = make_batch(*shape, num_heads=num_heads, device="cuda", seed=45), SMALL.group
    scans = batch.plan.scans(group)
    lists = group_scan.group_lists(work_of(batch, SMALL)._replace(plan=scans), batch.plan.groups(group).rows)
    pruned = scans.row_lengths > SMALL.candidates
    assert torch.equal(lists.unsure == 1, pruned & (not sure)), "noise misleads no sample"
    for g in range(0, scans.num_rows, max(1, scans.num_rows // 100)):
        scores, seen = reference_scores(batch, group, g), int(scans.row_lengths[g])
        at = torch.tensor([seen - 1], device="cuda")
        want = group_candidates(scores, at, at + 1, SMALL)[0]
        count = int(lists.counts[g])
        listed = lists.positions[g, :count].long()
        assert (listed.diff() > 0).all() and min(seen, SMALL.candidates) <= count <= lists.slots.shape[1]
        assert sure or count == min(seen, SMALL.candidates)
        missed = want.clone()
        missed[listed] = False
        # Sums of another order move near-equal scores across the end of the budget.
        assert int(missed.sum()) <= 1, (g, missed.nonzero()[:, 0].tolist())
        row = int(batch.plan.groups(group).rows[g, 0])
        assert lists.slots[g, :count].tolist() == slots_of(batch, row, listed.tolist())


def random_list(batch, group, budget):
    """A list of random tokens of each group, in ascending order, and how much of it each place may see."""
    rows, _ = batch.plan.groups(group)
    first = rows[:, 0].long()
    scanned = (batch.plan.row_lengths[first] - 1) // group * group + 1
    width = max(budget, int(scanned.max()))
    noise = torch.rand(len(rows), width, device="cuda")
    seen = torch.arange(width, device="cuda") < scanned[:, None]
    found = noise.masked_fill(~seen, 2.0).topk(budget, dim=1, largest=False).indices
    counts = scanned.clamp_max(budget)
    positions = found.masked_fill(torch.arange(budget, device="cuda") >= counts[:, None], width).sort(dim=1).values
    positions = positions.masked_fill(positions == width, -1).int()
    request = batch.plan.row_request[first]
    slots = positions_to_slots(positions, batch.page_table[request.long()])
    shares = torch.where(
        rows >= 0, counts[:, None] + batch.plan.row_lengths[rows.clamp_min(0).long()] - scanned[:, None], 0
    )
    chosen = Lists(positions, slots, counts, torch.zeros_like(counts))
    return GroupList(chosen, rows, request, scanned, shares.amax(1)), shares


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_kernels(num_heads, group, shape):
    """Scores of every row over its share of the list, and list indices as positions and as slots."""
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=42)
    groups, shares = random_list(batch, group, 1024)
    row_place = batch.plan.groups(group).row_place
    scores = group_scores(work_of(batch, IndexerParams(group=max(2, group))), groups)
    picks = torch.arange(int(shares.amax()), dtype=torch.int32, device="cuda").repeat(shares.numel(), 1)
    picks = picks.masked_fill(picks >= shares.flatten()[:, None], -1)
    out = {slots: picks.new_empty(len(row_place), picks.shape[1]) for slots in (False, True)}
    for slots, filled in out.items():
        group_pick(picks, row_place, batch.page_table, groups, slots, filled)
    for row in range(0, len(row_place), max(1, len(row_place) // 100)):
        place, request = int(row_place[row]), batch.row_request[row]
        g, share = place // groups.rows.shape[1], int(shares.flatten()[place])
        count, begin = int(groups.chosen.counts[g]), int(groups.scanned[g])
        own = torch.arange(begin, batch.lengths[row], device="cuda", dtype=torch.int32)
        tokens = torch.cat([groups.chosen.positions[g, :count], own])
        assert len(tokens) == share
        one = slice(row, row + 1)
        every = token_scores(batch.q[one], batch.weights[one], batch.k[request], batch.k_scale[request])
        want = every[0, tokens.long()]
        error = (scores[place, :share] - want).norm() / want.norm()
        assert error < 1e-3, f"row {row}: relative error {float(error):.2e}"
        assert torch.equal(out[False][row, :share], tokens) and (out[False][row, share:] == -1).all()
        assert out[True][row, :share].tolist() == slots_of(batch, row, tokens.tolist())
        assert (out[True][row, share:] == -1).all()


@pytest.mark.parametrize("params", [SMALL, DEFAULT], ids=["small", "default"])
@pytest.mark.parametrize("num_heads", [64, 32])
@pytest.mark.parametrize("group", [2, 4])
def test_selects_what_the_reference_selects(group, num_heads, params, shape):
    params = dataclasses.replace(params, group=group)
    batch = make_batch(*shape, num_heads=num_heads, device="cuda", seed=44)
    got = select_rows(MODE, *batch.paged, params, backend="gpu")
    assert_form(got, batch.lengths, params.top_k)
    want = select_rows(MODE, *batch.paged, params, backend="reference")
    native = select_rows("native", *batch.paged, params, backend="reference")
    # Float32 sums of the two backends order near-equal scores differently, at the end of the top_k.
    assert_nothing_lost(got, want, native, 0.003)


def test_prunes():
    """The comparison above means nothing if the mode selected what native selects."""
    batch = make_batch([9000], [64], device="cuda", seed=45)
    got = select_rows(MODE, *batch.paged, SMALL, backend="gpu")
    native = select_rows("native", *batch.paged, SMALL, backend="gpu")
    assert 0.1 < overlap(got.cpu(), native.cpu()) < 0.97


@pytest.mark.parametrize("length", [10240, 10241, 10242, 10245, 5000])
def test_budget_that_covers_the_row_is_native(length):
    batch = make_batch([length, 700], [7, 5], device="cuda", seed=46)
    got = select_rows(MODE, *batch.paged, DEFAULT, backend="gpu")
    native = select_rows("native", *batch.paged, DEFAULT, backend="gpu")
    covered = [row for row, seen in enumerate(batch.lengths) if seen <= DEFAULT.candidates]
    assert overlap(got[covered].cpu(), native[covered].cpu()) > 0.999


def test_the_same_set_every_time():
    batch = make_batch([9000, 4001], [500, 63], device="cuda", seed=47)
    first = sorted_rows(select_rows(MODE, *batch.paged, SMALL, backend="gpu"))
    for _ in range(3):
        assert torch.equal(sorted_rows(select_rows(MODE, *batch.paged, SMALL, backend="gpu")), first)


def test_batch_and_chunks_do_not_matter():
    """A request's rows select the same alone as in a batch, and in one chunk as in two that meet between groups."""
    both = make_batch([5000, 9000], [96, 128], device="cuda", seed=48)
    together = sorted_rows(select_rows(MODE, *both.paged, SMALL, backend="gpu"))
    ragged = (both.k_all, both.k_scale_all)
    for rows in (slice(0, 96), slice(96, 160), slice(160, 224)):
        alone = select_ragged(
            MODE, both.q[rows], both.weights[rows], *ragged, both.ks[rows], both.ke[rows], SMALL, backend="gpu"
        )
        assert torch.equal(sorted_rows(alone), together[rows])


def test_order_of_the_rows_does_not_matter():
    """Rows of two requests mixed up: the ragged layout allows it."""
    batch = make_batch([5000, 9000], [96, 128], device="cuda", seed=49)
    together = sorted_rows(select_ragged(MODE, *batch.ragged, SMALL, backend="gpu"))
    order = torch.randperm(224, generator=torch.Generator().manual_seed(1)).cuda()
    q = batch.q.view(torch.uint8)[order].view(torch.float8_e4m3fn)
    keys = (batch.k_all, batch.k_scale_all)
    mixed = select_ragged(MODE, q, batch.weights[order], *keys, batch.ks[order], batch.ke[order], SMALL, backend="gpu")
    assert torch.equal(sorted_rows(mixed), together[order])


def test_slots_are_the_positions_through_the_page_table():
    batch = make_batch([131, 9000, 64], [7, 33, 1], device="cuda", seed=50)
    positions = select_rows(MODE, *batch.paged, SMALL, backend="gpu")
    out = torch.full((50, SMALL.top_k), -9, dtype=torch.int32, device="cuda")
    slots = select_rows(MODE, *batch.paged, SMALL, backend="gpu", output="slot", out=out)
    assert slots is out and (out[41:] == -9).all()
    for row, length in enumerate(batch.lengths):
        count = min(length, SMALL.top_k)
        assert sorted(slots[row, :count].tolist()) == sorted(slots_of(batch, row, positions[row, :count].tolist()))
        assert (slots[row, count:] == -1).all()


def test_slices_of_the_score_matrix_do_not_matter(monkeypatch):
    batch = make_batch([9000, 4001], [500, 63], device="cuda", seed=51)
    whole = sorted_rows(select_rows(MODE, *batch.paged, SMALL, backend="gpu"))
    monkeypatch.setattr(work, "SCRATCH_BYTES", 1 << 20)
    assert torch.equal(sorted_rows(select_rows(MODE, *batch.paged, SMALL, backend="gpu")), whole)


def test_scratch_is_bounded():
    batch = make_batch([30000], [2048], device="cuda", seed=52)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select_rows(MODE, *batch.paged, DEFAULT, backend="gpu")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * work.SCRATCH_BYTES


@pytest.mark.parametrize("group", [2, 4])
def test_decode_in_a_graph_follows_the_lengths(group):
    params = dataclasses.replace(SMALL, group=group)
    batch = make_batch(DECODE_LENGTHS, 1, device="cuda", seed=53)
    lengths = batch.plan.row_lengths.clone()

    def select() -> torch.Tensor:
        return select_paged(MODE, batch.q, batch.weights, batch.k_pages, batch.page_table, lengths, params, "gpu")

    assert_a_graph_follows_the_lengths(select, lengths, params.top_k)


def test_decode_finds_what_native_finds():
    """The proxy of a single row is its own query: what the scan keeps holds native's choice."""
    batch = make_batch([9000, 4001, 20000], 1, device="cuda", seed=54)
    tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table, batch.plan.row_lengths, SMALL, "gpu")
    assert overlap(select_paged(MODE, *tensors).cpu(), select_paged("native", *tensors).cpu()) > 0.99


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (IndexerParams(group=3), "group=3"),
        (IndexerParams(local_tokens=10240), "leaves no token"),
    ],
    ids=str,
)
def test_refusals_name_the_reason(params, reason):
    batch = make_batch([300], [4], device="cuda")
    with pytest.raises(NotImplementedError, match=reason):
        select_rows(MODE, *batch.paged, params, backend="gpu")
