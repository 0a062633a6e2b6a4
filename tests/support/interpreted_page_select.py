"""Runs the choice of pages in Triton's interpreter, on a CPU, against the reference.

A program of its own, like `interpreted_kernels`.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_page_select

Prints how many rows were compared; an assertion ends it.
"""

import torch

from indexer_kernels.gpu.page_select_kernel import ROW_ALIGNMENT, empty_candidates, page_select
from indexer_kernels.reference.candidates import forced_units, visible_units
from indexer_kernels.reference.choice import keep_within_budget
from tests.support.inputs import Batch, make_batch
from tests.support.interpreted_kernels import scores_of

LOCAL = 100
# Every capacity.
SHAPES = (([2100, 131, 1, 385, 384], [6, 3, 1, 3, 2]), ([40000], [3]), ([70000], [2]), ([140000], [1]), ([270000], [1]))


def check_choice(batch: Batch, budget: int, unit_pages: int, values: int, kind: str) -> None:
    plan, unit = batch.plan, 64 * unit_pages
    max_units = -(-plan.max_length // unit)
    columns = -(-max_units * values // ROW_ALIGNMENT) * ROW_ALIGNMENT
    scores = scores_of(kind, len(plan.tile_rows.flatten()), columns + 8)
    chosen = empty_candidates(plan.num_rows, budget * unit_pages, torch.device("cpu"))
    chosen.physical.fill_(-7)
    page_select(
        scores,
        plan.tile_rows.flatten(),
        plan.row_lengths,
        plan.row_request,
        batch.page_table,
        chosen,
        plan.max_length,
        unit_pages,
        values,
        LOCAL,
    )
    of_unit = scores[plan.row_place.long(), : max_units * values].view(plan.num_rows, max_units, values).amax(2)
    visible = visible_units(plan.row_lengths, max_units, unit)
    forced = forced_units(plan.row_lengths, max_units, unit, unit, LOCAL)
    kept = keep_within_budget(of_unit, visible, forced, budget)
    for row in range(plan.num_rows):
        length = batch.lengths[row]
        units = kept[row].nonzero().flatten().tolist()
        pages = [u * unit_pages + p for u in units for p in range(unit_pages) if (u * unit_pages + p) * 64 < length]
        assert chosen.logical[row, : len(pages)].tolist() == pages, (row, "ascending, the partial last page last")
        table = batch.page_table[batch.row_request[row]]
        assert chosen.physical[row, : len(pages)].tolist() == table[pages].tolist()
        assert int(chosen.counts[row]) == sum(min(64, length - 64 * page) for page in pages)
        assert ((chosen.physical[row] >= 0) & (chosen.physical[row] < len(batch.k_pages))).all(), "unused: a real page"


def main() -> None:
    compared = 0
    for lengths, rows in SHAPES:
        batch = make_batch(lengths, rows, num_heads=1, seed=5)
        for budget, unit_pages, values in ((8, 1, 4), (4, 2, 1), (30, 1, 1)):
            for kind in ("normal", "ties"):
                check_choice(batch, budget, unit_pages, values, kind)
                compared += batch.plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
