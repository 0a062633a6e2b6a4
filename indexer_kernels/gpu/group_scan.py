"""The scan that a group of rows shares in group_rerank: its proxy, with all heads, over every token.

As in `token_modes`, a sample of the keys gives each group a threshold, the scan writes one bit a token, and the tokens
whose bit is set are listed: the budget's best and 10 to 30 % more. A group whose list has too few or too many tokens is
scanned again, exactly.
"""

import torch

from indexer_kernels.gpu import group_scan_kernel, token_scores_kernel
from indexer_kernels.gpu.bit_list_kernel import list_bits
from indexer_kernels.gpu.group_proxy_kernel import PackedProxies, group_proxies
from indexer_kernels.gpu.lists import Lists, empty_lists
from indexer_kernels.gpu.rescan_kernel import rescan
from indexer_kernels.gpu.routed import Keys, cache_keys, scan_shares
from indexer_kernels.gpu.sample_kernel import list_width, sample_keys
from indexer_kernels.gpu.sample_threshold_kernel import sample_threshold
from indexer_kernels.gpu.target import PAGE_TOKENS, WARP_KEYS
from indexer_kernels.gpu.token_modes import scanned_pages
from indexer_kernels.gpu.work import Work, counting, num_sms, slices, table_pages
from indexer_kernels.row_plan import TILE_ROWS


def group_lists(work: Work, rows: torch.Tensor) -> Lists:
    """The candidates of each group g among the tokens that row g of work.plan, a plan of scans, sees.

    rows [G, W] int32: the group's rows in work.q and work.weights, then -1.
    """
    plan, params = work.plan, work.params
    budget, forced = params.candidates, (PAGE_TOKENS, params.local_tokens)
    width = list_width(budget, plan.max_length, token_scores_kernel.TILE)
    lists = empty_lists(plan.num_rows, width, not work.slots, work.q.device)
    proxies = group_proxies(work.q, work.weights, rows, plan.row_place, plan.num_tiles * TILE_ROWS)
    sample = sample_keys(work.pool.pages, work.page_table, plan.request_lengths, plan.max_length)
    sample_pages, pages = plan.kept(("scanned pages", budget), lambda: scanned_pages(plan, budget))
    sample_width, mask_width = whole_stages(sample.page_table.shape[1]), whole_stages(table_pages(work))
    score_bytes = TILE_ROWS * sample_width * PAGE_TOKENS * 4
    mask_bytes = mask_width * PAGE_TOKENS // WARP_KEYS * group_scan_kernel.WORDS * 4
    for tiles in slices(plan.num_tiles, max(score_bytes, mask_bytes), num_sms(work.q.device)):
        places = plan.tile_rows[tiles].flatten()
        sampled = Keys(sample.keys, sample.scales, sample.page_table)
        scores = scan(work, proxies, sampled, sample_pages, tiles, sample_width, "scores")
        thresholds = sample_threshold(scores, places, plan.row_lengths, budget, *forced)
        del scores  # before the mask is allocated
        mask = scan(work, proxies, cache_keys(work), pages, tiles, mask_width, "mask", thresholds.scores)
        row_of = (plan.row_lengths, thresholds.limits, plan.row_request, work.page_table)
        list_bits(mask, places, *row_of, lists, budget, *forced, by_row=True)
        del mask  # before the next slice is allocated
    rescan(
        *proxies,
        work.q.shape[1],
        True,
        plan.row_place,
        work.pool.pages,
        counting(plan, plan.num_rows),
        plan.row_lengths,
        plan.row_request,
        work.page_table,
        plan.max_length,
        lists,
        budget,
        *forced,
        num_sms(work.q.device),
    )
    return lists


def scan(
    work: Work,
    proxies: PackedProxies,
    scanned: Keys,
    tile_pages: torch.Tensor,
    tiles: slice,
    width: int,
    form: group_scan_kernel.Form,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scan of the tiles in `tiles` over `width` pages of `scanned`, in one of `group_scan_kernel`'s forms.

    tile_pages [T] int32: pages of each tile. f32 [places, width * 64] ("scores") or int32 [tiles, width * 4, WORDS]
    ("mask", with thresholds [places] f32); places = tiles * TILE_ROWS.
    """
    plan, num_heads, num_tiles = work.plan, work.q.shape[1], tiles.stop - tiles.start
    packed = proxies.of_tiles(tiles, num_heads)
    places = num_tiles * TILE_ROWS
    if form == "mask":
        shape = (num_tiles, width * PAGE_TOKENS // WARP_KEYS, group_scan_kernel.WORDS)
        out = torch.empty(shape, dtype=torch.int32, device=work.q.device)
    else:
        out = torch.empty((places, width * PAGE_TOKENS), dtype=torch.float32, device=work.q.device)
    if thresholds is None:
        thresholds = packed.gates[:places]  # not read
    shares = scan_shares(places // group_scan_kernel.unit_rows(num_heads), work.q.device)
    group_scan_kernel.build(num_heads, form, num_sms(work.q.device))(
        packed.q,
        packed.gates.view(-1, num_heads // 2, group_scan_kernel.QUAD, 2),
        scanned.keys,
        scanned.scales,
        scanned.page_table,
        plan.tile_rows[tiles].flatten(),
        plan.tile_request[tiles],
        tile_pages[tiles],
        thresholds,
        counting(plan, shares),
        out,
    )
    return out


def whole_stages(pages: int) -> int:
    return -(-pages // group_scan_kernel.STAGE_PAGES) * group_scan_kernel.STAGE_PAGES
