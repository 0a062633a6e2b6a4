"""Runs the token kernels on a CPU, against the references: those of Triton in its interpreter, the lists of TileLang
by `emulated_cuda`.

A program of its own: the interpreter is chosen when triton is imported, and must not reach the tests that compile.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels

Prints how many rows were compared; an assertion ends it.
"""

import torch

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import (
    bit_list_kernel,
    keep_best_kernel,
    rescan_kernel,
    sample_kernel,
    sample_threshold_kernel,
)
from indexer_kernels.gpu.bit_list_kernel import list_bits
from indexer_kernels.gpu.lists import Lists, empty_lists
from indexer_kernels.gpu.routed_scores_kernel import mask_words, unit_rows
from indexer_kernels.gpu.sample_threshold_kernel import sample_threshold
from indexer_kernels.reference.candidates import token_candidates
from indexer_kernels.reference.routing import take_heads
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.emulated_cuda import build_bit_list, build_sample_threshold
from tests.support.exact_choice import exact_choice
from tests.support.inputs import Batch, make_batch, slots_of

PARAMS = IndexerParams(top_k=64, candidates=384, local_tokens=40, active_heads=2, route_block=64)
SHAPES = (([700, 131, 1, 385, 384], [6, 3, 1, 3, 2]), ([1500], [5]), ([5000], [3]))  # the last: several chunks


def scores_of(values: str, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] f32: all different, or few values with many ties at the boundary, zeros of both signs."""
    generator = torch.Generator().manual_seed(1)
    if values == "normal":
        return torch.randn((rows, columns), generator=generator)
    scores = torch.randint(-3, 4, (rows, columns), generator=generator).float()
    return torch.where((scores == 0) & (torch.rand((rows, columns), generator=generator) < 0.5), -0.0, scores)


def check_select(batch: Batch, values: str) -> None:
    """Candidates of every row are the reference's, ascending, as positions and as slots; scores of rows within the
    budget are not read (they are NaN).
    """
    rows, lengths = batch.plan.num_rows, batch.plan.row_lengths
    scores = scores_of(values, rows, -(-batch.plan.max_length // 64) * 64 + 8)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    places = torch.cat([order, torch.tensor([-1, -1])]).int()
    placed = torch.full((rows + 2, scores.shape[1]), float("nan"))
    placed[:rows] = torch.where((lengths > PARAMS.candidates)[order][:, None], scores[order], float("nan"))
    lists = empty_lists(rows + 2, PARAMS.candidates + 8, True, torch.device("cpu"))
    lists.counts.fill_(-7)
    plan, table = batch.plan, batch.page_table
    forced = (64, PARAMS.local_tokens)
    exact_choice(placed, places, lengths, plan.row_request, table, lists, PARAMS.candidates, *forced)
    assert (lists.counts[rows:] == -7).all()
    for place, row in enumerate(order.tolist()):
        length = int(lengths[row])
        want = token_candidates(scores[row : row + 1, :length], lengths[row : row + 1], PARAMS)[0].nonzero()[:, 0]
        check_list(batch, row, lists, place, want)


def routed_heads(batch: Batch) -> torch.Tensor:
    """Some heads of each row, ascending: [M, active_heads] int32."""
    order = torch.rand(batch.weights.shape, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    return order[:, : PARAMS.active_heads].sort(dim=1).values.int()


def packed_heads(batch: Batch, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and gates of routed heads in the scan's order: tile, group of 8 rows, head, row."""
    rows = batch.plan.tile_rows.view(-1, TILE_ROWS // 8, 1, 8).expand(-1, -1, heads.shape[1], -1)
    head = heads[rows.clamp_min(0).long(), torch.arange(heads.shape[1])[None, None, :, None]].long()
    q = batch.q.view(torch.uint8)[rows.clamp_min(0).long(), head].view(torch.float8_e4m3fn)
    gate = torch.where(rows >= 0, batch.weights[rows.clamp_min(0).long(), head], 0.0)
    return q.reshape(-1, 128), gate.flatten()


def scores_of_row(batch: Batch, row: int, heads: torch.Tensor | None = None) -> torch.Tensor:
    """Reference scores of every token of the row's request, by all heads or by its own routed ones."""
    request = int(batch.plan.row_request[row])
    q, weights = batch.q[row : row + 1], batch.weights[row : row + 1]
    if heads is not None:
        q, weights = take_heads(q, weights, heads[row : row + 1].long())
    return token_scores(q, weights, batch.k[request], batch.k_scale[request])[0]


def scan_bits(batch: Batch, scores: torch.Tensor, thresholds: torch.Tensor, active_heads: int) -> torch.Tensor:
    """The scan's bits for scores [M, N]: [units, cells, words] int32, written down from their description."""
    places, rows, words = batch.plan.tile_rows.flatten(), unit_rows(active_heads), mask_words(active_heads)
    mask = torch.zeros((len(places) // rows, -(-scores.shape[1] // 16), words), dtype=torch.int64)
    for place, row in enumerate(places.tolist()):
        for key in (scores[row] >= thresholds[place]).nonzero()[:, 0].tolist() if row >= 0 else ():
            unit, inside = divmod(place, rows)
            word = key % 16 // 8 * (words // 2) + inside // 8 * 2 + inside % 2
            mask[unit, key // 16, word] |= 1 << (key % 8 * 4 + inside % 8 // 2)
    return torch.where(mask >= 1 << 31, mask - (1 << 32), mask).int()


def check_lists(batch: Batch, values: str) -> None:
    """Lists hold what the thresholds let through, and the forced tokens; a list is unsure exactly when it is too short
    or above its limit; a rescan makes every unsure list the reference's candidates.
    """
    plan, heads = batch.plan, routed_heads(batch)
    scores = torch.zeros((plan.num_rows, plan.max_length))
    for row in range(plan.num_rows):
        of_row = scores_of_row(batch, row, heads)
        scores[row, : len(of_row)] = of_row if values == "normal" else of_row.sign()
    places, budget, width = plan.tile_rows.flatten(), PARAMS.candidates, 512
    forced = (64, PARAMS.local_tokens)
    # In turn: just right, too high, too low.
    best = [int(n) + 20 if n > budget else 1 for n in plan.row_lengths.clamp_max(budget)]
    thresholds = torch.zeros(len(places))
    for place, row in enumerate(places.tolist()):
        if row >= 0:
            seen = scores[row, : int(plan.row_lengths[row])].sort(descending=True).values
            thresholds[place] = seen[min(len(seen) - 1, (best[row], 100, len(seen))[row % 3])]
    mask = scan_bits(batch, scores, thresholds, PARAMS.active_heads)
    limits = torch.full((len(places),), width - 20, dtype=torch.int32)
    row_of = (places, plan.row_lengths, plan.row_request, batch.page_table)
    lists = empty_lists(len(places), width, True, torch.device("cpu"))
    list_bits(mask, *row_of[:2], limits, *row_of[2:], lists, budget, *forced)
    unsure = lists.unsure.tolist()
    for place, row in enumerate(places.tolist()):
        if row < 0:
            assert lists.counts[place] == unsure[place] == 0
            continue
        length = int(plan.row_lengths[row])
        token = torch.arange(length)
        kept = (scores[row, :length] >= thresholds[place]) | (token < 64) | (token >= length - PARAMS.local_tokens)
        want = token[kept] if length > budget else token
        assert int(lists.counts[place]) == min(len(want), width)
        assert unsure[place] == (not min(length, budget) <= len(want) <= width - 20), (row, len(want))
        if not unsure[place]:
            check_list(batch, row, lists, place, want)
    # Numbered by row instead of by place, and slots alone: the same.
    others = empty_lists(plan.num_rows, width, False, torch.device("cpu"))
    list_bits(mask, *row_of[:2], limits, *row_of[2:], others, budget, *forced, by_row=True)
    at = plan.row_place.long()
    assert torch.equal(others.counts, lists.counts[at]) and torch.equal(others.unsure, lists.unsure[at])
    for row, (place, count) in enumerate(zip(at.tolist(), others.counts.tolist())):
        assert torch.equal(others.slots[row, :count], lists.slots[place, :count])
    if values == "normal":  # a rescan scores again: no room for ties of another making
        packed = (*packed_heads(batch, heads), PARAMS.active_heads, False, torch.arange(len(places)).int())
        rescan_kernel.rescan(*packed, batch.k_pages, *row_of, plan.max_length, lists, budget, *forced, 3)
        for place, row in enumerate(places.tolist()):
            if unsure[place]:
                length = int(plan.row_lengths[row])
                want = token_candidates(scores[row : row + 1, :length], plan.row_lengths[row : row + 1], PARAMS)[0]
                check_list(batch, row, lists, place, want.nonzero()[:, 0])


def check_list(batch: Batch, row: int, lists: Lists, place: int, want: torch.Tensor) -> None:
    count = int(lists.counts[place])
    assert torch.equal(lists.positions[place, :count].long(), want)
    assert lists.slots[place, :count].tolist() == slots_of(batch, row, want.tolist())


def check_sample(batch: Batch) -> None:
    """One key of each cell, from somewhere in the cell."""
    plan, cell = batch.plan, sample_kernel.CELL
    sample = sample_kernel.sample_keys(batch.k_pages, batch.page_table, plan.request_lengths, plan.max_length)
    for request, length in enumerate(plan.request_lengths.tolist()):
        every = batch.k[request].view(torch.uint8)
        offsets = set()
        for index in range(length // cell):
            page = int(sample.page_table[request, index // 64])
            key = sample.keys[page * 66 + index % 64].view(torch.uint8)
            match = (every[index * cell : (index + 1) * cell] == key).all(dim=1).nonzero()
            assert len(match) == 1
            offsets.add(int(match))
            token = index * cell + int(match)
            assert sample.scales[page * 33 + 32, index % 64] == batch.k_scale[request][token]
        assert length < 700 or len(offsets) > cell // 2, "samples must not sit at one offset"


def rounded_down(score: torch.Tensor) -> torch.Tensor:
    """A float32 score without the last 14 bits of its place in the order of all scores."""
    bits = (score + 0.0).view(torch.int32)  # one zero
    return torch.where(bits < 0, bits | 0x3FFF, bits & ~0x3FFF).view(torch.float32)


def check_threshold(batch: Batch, values: str) -> None:
    """The threshold is the wanted rank of the row's own samples, and the limit follows from it; so with every second
    sample too.
    """
    plan, cell, forced = batch.plan, sample_kernel.CELL, (64, PARAMS.local_tokens)
    rows = torch.cat([torch.arange(plan.num_rows), torch.tensor([-1])]).int()
    scores = scores_of(values, len(rows), -(-plan.max_length // cell))
    found = sample_threshold(scores, rows, plan.row_lengths, PARAMS.candidates, *forced)
    assert found.scores[-1] == -torch.inf
    for row, length in enumerate(plan.row_lengths.tolist()):
        if length <= PARAMS.candidates:
            assert found.scores[row] == -torch.inf
            continue
        local = max(length - PARAMS.local_tokens, 64)
        seen = scores[row, 64 // cell : local // cell]
        step = 1
        while len(seen) > sample_kernel.MOST * step:
            step *= 2
        seen = seen[: len(seen) // step * step : step]
        expected = (PARAMS.candidates - 64 - (length - local)) / (local - 64) * len(seen)
        deviations = 5 * expected**0.5 + 4
        limit = PARAMS.candidates + int(2.5 * deviations) * cell * step
        assert abs(int(found.limits[row]) - limit) <= cell * step  # a float32 root may truncate to the next integer
        assert limit <= sample_kernel.list_width(PARAMS.candidates, plan.max_length, 128) or limit > length
        wanted = int(expected + deviations)
        if wanted >= len(seen):
            assert found.scores[row] == -torch.inf
        else:
            exact = seen.sort(descending=True).values[wanted - 1]
            assert found.scores[row] == rounded_down(exact)


def main() -> None:
    keep_best_kernel.BLOCK = 512  # several blocks a row on short rows
    bit_list_kernel.build, sample_threshold_kernel.build = build_bit_list, build_sample_threshold
    compared = 0
    for lengths, rows in SHAPES:
        for num_heads, values in ((64, "normal"), (32, "ties")):
            batch = make_batch(lengths, rows, num_heads=num_heads, seed=5)
            check_select(batch, values)
            check_lists(batch, values)
            check_sample(batch)
            for most in (8192, 64):
                sample_kernel.MOST = most
                check_threshold(batch, values)
            compared += batch.plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
