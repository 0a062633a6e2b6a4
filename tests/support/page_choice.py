"""What `page_select` chose against the reference, on any device."""

import torch

from indexer_kernels.gpu.page_select_kernel import ROW_ALIGNMENT, empty_candidates, page_select
from indexer_kernels.reference.candidates import forced_units, visible_units
from indexer_kernels.reference.choice import keep_within_budget
from tests.support.inputs import Batch

LOCAL = 100


def score_columns(batch: Batch, unit_pages: int, values: int) -> int:
    """Columns of unit scores that a batch needs, aligned as the choice wants its rows, and eight that no row has."""
    units = -(-batch.plan.max_length // (64 * unit_pages))
    return -(-units * values // ROW_ALIGNMENT) * ROW_ALIGNMENT + 8


def check_choice(batch: Batch, scores: torch.Tensor, budget: int, unit_pages: int, values: int) -> None:
    """Candidate pages of the rows of a batch from the unit scores of their places: exact, ascending, padded with real
    pages. scores [places, >= values * units] f32.
    """
    plan, unit = batch.plan, 64 * unit_pages
    max_units = -(-plan.max_length // unit)
    chosen = empty_candidates(plan.num_rows, budget * unit_pages, scores.device)
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
    for row in range(0, plan.num_rows, max(1, plan.num_rows // 97)):
        length = batch.lengths[row]
        units = kept[row].nonzero().flatten().tolist()
        pages = [u * unit_pages + p for u in units for p in range(unit_pages) if (u * unit_pages + p) * 64 < length]
        assert chosen.logical[row, : len(pages)].tolist() == pages, (row, "ascending, the partial last page last")
        table = batch.page_table[batch.row_request[row]]
        assert chosen.physical[row, : len(pages)].tolist() == table[pages].tolist()
        assert int(chosen.counts[row]) == sum(min(64, length - 64 * page) for page in pages)
        assert ((chosen.physical[row] >= 0) & (chosen.physical[row] < len(batch.k_pages))).all(), "unused: a real page"
