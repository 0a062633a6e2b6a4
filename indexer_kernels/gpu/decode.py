"""Decode from stored page means, hisa's blocks and those of routed heads: which kernels run in which order.

One row per request, lengths on the device alone. Per layer four launches: block scores, and with them the update of the
rows' last means; the choice of blocks; DeepGEMM's logits; top-k. With routed heads six. What depends on the lengths
alone is made by the first layer of a forward (`RowPlan.for_one_forward`): a row's candidates are some of its blocks,
but how many tokens they are follows from its length.
"""

from typing import Any

import torch

from indexer_kernels.gpu.candidate_counts_kernel import candidate_counts
from indexer_kernels.gpu.decode_scores_kernel import decode_scores, route_statistics, update_is_apart
from indexer_kernels.gpu.deep_gemm_logits import MOST_ROWS, paged_logits, paged_schedule
from indexer_kernels.gpu.page_means_kernel import update_means
from indexer_kernels.gpu.page_select_kernel import Candidates, empty_candidates, page_select
from indexer_kernels.gpu.target import PAGE_TOKENS
from indexer_kernels.gpu.work import Work, num_sms, slices
from indexer_kernels.top_k import PlannedTopK

# Programs of block scores that each SM should find; a program holds 64 blocks of a row at a time.
PROGRAMS_PER_SM = 4


def select_blocks(work: Work, routed: bool, update: bool) -> None:
    """hisa; with routed, only the heads that the block statistics choose score blocks. With update, the means of the
    rows' last full pages are made anew.
    """
    plan, params = work.plan, work.params
    counts, contexts = plan.kept(
        ("candidates", params.block_size, params.top_blocks),
        lambda: candidate_counts(plan.row_lengths, params),
    )
    # Before anything else: top-k reads its plan while the kernel before it still runs.
    schedules = {
        rows: (_kept_schedule(work, rows, contexts), _kept_top_k_plan(work, rows, counts)) for rows in _slices(work)
    }
    chosen = _choose(work, _block_scores(work, routed, update))
    table = chosen.physical if work.slots else chosen.logical
    for (start, stop), (schedule, top_k_plan) in schedules.items():
        rows = slice(start, stop)
        scores = paged_logits(
            work.q[rows], work.weights[rows], work.pool.pages, chosen.physical[rows], contexts[rows], schedule
        )
        planned = {} if top_k_plan is None else {"plan": top_k_plan}
        work.top_k(scores, counts[rows], table[rows], work.out[rows], **planned)
        del scores  # before the next slice is allocated


def _slices(work: Work) -> list[tuple[int, int]]:
    """One slice, but for thousands of rows."""
    pages = work.params.top_blocks * (work.params.block_size // PAGE_TOKENS)
    return [(rows.start, rows.stop) for rows in slices(work.plan.num_rows, pages * PAGE_TOKENS * 4, most=MOST_ROWS)]


def _kept_schedule(work: Work, rows: tuple[int, int], contexts: torch.Tensor) -> torch.Tensor:
    key = ("schedule", work.params.block_size, work.params.top_blocks, rows)
    return work.plan.kept(key, lambda: paged_schedule(contexts[slice(*rows)]))


def _kept_top_k_plan(work: Work, rows: tuple[int, int], counts: torch.Tensor) -> Any:
    """What a top-k that prepares itself makes of the counts, or None."""
    top_k = work.top_k
    if not isinstance(top_k, PlannedTopK):
        return None
    key = ("top_k", top_k, work.params.block_size, work.params.top_blocks, rows)
    return work.plan.kept(key, lambda: top_k.plan(counts[slice(*rows)]))


def _block_scores(work: Work, routed: bool, update: bool) -> torch.Tensor:
    """f32 [M, blocks], of the blocks that a row may choose by their score."""
    assert work.page_means is not None
    together = update and not routed and update_is_apart(work.params)
    if update and not together:
        update_means(work.pool.pages, work.page_table, work.plan.row_lengths, work.page_means, None, last=True)
    read = (work.q, work.weights, work.page_means, work.page_table, work.plan.row_lengths, work.params)
    statistics = route_statistics(*read) if routed else None
    updated = work.pool.pages if together else None
    return decode_scores(*read, PROGRAMS_PER_SM * num_sms(work.q.device), statistics, updated)


def _choose(work: Work, scores: torch.Tensor) -> Candidates:
    plan, params = work.plan, work.params
    unit_pages = params.block_size // PAGE_TOKENS
    chosen = empty_candidates(plan.num_rows, params.top_blocks * unit_pages, work.q.device)
    page_select(
        scores,
        plan.row_request,
        plan.row_lengths,
        plan.row_request,
        work.page_table,
        chosen,
        plan.max_length,
        unit_pages,
        1,
        params.local_tokens,
    )
    return chosen
