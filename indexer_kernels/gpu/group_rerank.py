"""group_rerank on the GPU: which kernels run in which order."""

import torch

from indexer_kernels.gpu import token_scores_kernel
from indexer_kernels.gpu.candidate_list_kernel import Lists, empty_lists, list_candidates
from indexer_kernels.gpu.deep_gemm_logits import paged_logits
from indexer_kernels.gpu.group_proxy_kernel import group_proxies
from indexer_kernels.gpu.group_rerank_kernel import GroupList, group_pick
from indexer_kernels.gpu.sample_kernel import list_width
from indexer_kernels.gpu.sample_threshold_kernel import sample_threshold
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.gpu.token_select_kernel import token_select
from indexer_kernels.gpu.work import Work, counting, row_tables, slices, table_pages
from indexer_kernels.row_plan import RowPlan

SCAN_GROUPS = 1024  # of one call to DeepGEMM, which gets a power of two: 0.6 GiB of scores at 128K tokens


def group_rerank(work: Work) -> None:
    """The mean query of a group scans all tokens; every row of the group re-ranks what that found, with all heads."""
    plan, params = work.plan, work.params
    rows, row_place = plan.groups(params.group)
    request, scanned, lengths = plan.kept(("groups", params.group), lambda: _facts(plan, params.group))
    chosen = _scan(work, rows, request, scanned)
    counts = torch.where(lengths > 0, chosen.counts[:, None] + lengths - scanned[:, None], 0)
    groups = GroupList(chosen, rows, request, scanned, counts.amax(dim=1))
    best = torch.empty((rows.numel(), params.top_k), dtype=torch.int32, device=rows.device)
    each = rows.shape[1]
    for part in slices(rows.shape[0], each * width_of(chosen.slots.shape[1], params.group) * 4):
        scores = group_scores(work, groups.part(part))
        places = slice(part.start * each, part.stop * each)
        work.top_k(scores, counts[part].flatten(), None, best[places], 1)
        del scores  # before the next slice is allocated
    group_pick(best, row_place, work.page_table, groups, work.slots, work.out)


def _facts(plan: RowPlan, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each group its page-table row [G] and what its first position sees, present or not [G] (0: rows without
    tokens); and the length of each of its rows [G, W], 0 for none. All int32.
    """
    rows = plan.groups(group).rows
    first = rows[:, 0].long()
    start = torch.div(plan.row_lengths[first] - 1, group, rounding_mode="floor") * group
    lengths = torch.where(rows >= 0, plan.row_lengths[rows.clamp_min(0).long()], 0)
    return plan.row_request[first], (start + 1).clamp_min(0), lengths


def _scan(work: Work, rows: torch.Tensor, request: torch.Tensor, scanned: torch.Tensor) -> Lists:
    """The candidates of each group among its scanned [G] tokens; rows [G, W] as in `RowGroups`, request [G]."""
    num_groups, width, params = rows.shape[0], table_pages(work), work.params
    budget, forced = params.candidates, (PAGE_TOKENS, params.local_tokens)
    columns = list_width(budget, work.plan.max_length, token_scores_kernel.TILE)
    chosen = empty_lists(num_groups, columns, not work.slots, rows.device)
    group = counting(work.plan, num_groups)
    each = width * PAGE_TOKENS * 4 + work.q.shape[1] * (HEAD_DIM + 4)
    for part in slices(num_groups, each, most=SCAN_GROUPS):
        proxies = group_proxies(work.q, work.weights, rows[part])
        # A group whose tokens fit the budget keeps them all: nothing to scan, but DeepGEMM wants a token.
        lengths = torch.where(scanned[part] > budget, scanned[part], 1)
        table = row_tables(work, request[part], lengths)
        scores = paged_logits(proxies.q, proxies.weights, work.pool.pages, table, lengths)
        found = sample_threshold(scores, group[part], scanned, budget, *forced, among_all=True)
        lists = chosen.part(part)
        list_candidates(scores, group[part], scanned, found, request, work.page_table, lists, budget, *forced)
        token_select(scores, group[part], scanned, request, work.page_table, lists, budget, *forced)
        del proxies, scores  # before the next slice is allocated
    return chosen


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
