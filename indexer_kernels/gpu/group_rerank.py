"""group_rerank on the GPU: which kernels run in which order."""

import torch

from indexer_kernels.gpu import token_scores_kernel
from indexer_kernels.gpu.group_rerank_kernel import GroupList, group_pick
from indexer_kernels.gpu.group_scan import group_lists
from indexer_kernels.gpu.target import HEAD_DIM
from indexer_kernels.gpu.work import Work, slices
from indexer_kernels.row_plan import RowPlan


def group_rerank(work: Work) -> None:
    """The mean query of a group scans all tokens; every row of the group re-ranks what that found, with all heads."""
    plan, params = work.plan, work.params
    rows, row_place = plan.groups(params.group)
    scans = plan.scans(params.group)
    lengths = plan.kept(("lengths of groups", params.group), lambda: _lengths(plan, rows))
    chosen = group_lists(work._replace(plan=scans), rows)
    counts = torch.where(lengths > 0, chosen.counts[:, None] + lengths - scans.row_lengths[:, None], 0)
    groups = GroupList(chosen, rows, scans.row_request, scans.row_lengths, counts.amax(dim=1))
    best = torch.empty((rows.numel(), params.top_k), dtype=torch.int32, device=rows.device)
    each = rows.shape[1]
    group_bytes = each * width_of(chosen.slots.shape[1], params.group) * 4
    for part in slices(rows.shape[0], group_bytes, most=token_scores_kernel.MOST_LISTS):
        scores = group_scores(work, groups.part(part))
        places = slice(part.start * each, part.stop * each)
        work.top_k(scores, counts[part].flatten(), None, best[places], 1)
        del scores  # before the next slice is allocated
    group_pick(best, row_place, work.page_table, groups, work.slots, work.out)


def _lengths(plan: RowPlan, rows: torch.Tensor) -> torch.Tensor:
    """Tokens that each row of a group sees, int32 [G, W], 0 for none."""
    return torch.where(rows >= 0, plan.row_lengths[rows.clamp_min(0).long()], 0)


def width_of(list_columns: int, group: int) -> int:
    """Columns of the scores: the list and the group's positions behind its first, in whole tiles."""
    return -(-(list_columns + group - 1) // token_scores_kernel.TILE) * token_scores_kernel.TILE


def group_scores(work: Work, groups: GroupList) -> torch.Tensor:
    """out[g * W + w, i] = scale[j] * sum_h weights[m, h] * relu(q[m, h] . key[j]), m the w-th row of group g, j the
    i-th token of the group's list: f32 [G * W, width_of(list columns, group)].

    Columns past columns[g], and rows of places without a row, hold anything.
    """
    (num_groups, num_rows), columns = groups.rows.shape, groups.chosen.slots.shape[1]
    shape = (num_groups * num_rows, width_of(columns, work.params.group))
    out = torch.empty(shape, dtype=torch.float32, device=work.q.device)
    token_scores_kernel.build(work.q.shape[1], num_rows)(
        work.q.view(-1, HEAD_DIM),
        work.weights.view(-1),
        work.pool.keys,
        work.pool.scales.view(-1),
        work.page_table,
        groups.rows,
        groups.request,
        groups.scanned - groups.chosen.counts,
        groups.chosen.slots,
        groups.chosen.counts,
        groups.columns,
        out,
    )
    return out
