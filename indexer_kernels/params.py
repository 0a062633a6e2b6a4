"""Settings of the selection modes."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

MODES = ("native", "misa", "misa_rerank", "hisa", "group_rerank")
CandidateUnit = Literal["token", "page"]
RouteStatistic = Literal["sum", "max"]
CHOICES: dict[str, Any] = {"candidate_unit": CandidateUnit, "route_statistic": RouteStatistic}


@dataclass(frozen=True, slots=True)
class IndexerParams:
    """Budgets of the selection. Sizes are in tokens unless they say otherwise. The defaults are measured
    (docs/quality.md); the papers route by sums over blocks of 1024.

    top_k           tokens selected per row
    active_heads    misa, misa_rerank: heads that score every token (MISA, arXiv 2605.07363)
    route_block     misa, misa_rerank: tokens per statistics block of the head routing
    route_statistic misa, misa_rerank: a head is routed by the "sum" of its block scores over the row's full blocks
    (MISA), or by their "max", which finds the heads that look for few tokens and wants small blocks (docs/quality.md)
    candidates      misa_rerank, group_rerank: tokens that all heads re-rank, forced ones included (group_rerank: one
    list for the whole group, and beside it the group's own positions up to the row)
    block_size      hisa: tokens per block (HISA, arXiv 2603.28458)
    top_blocks      hisa: blocks whose tokens all heads score, forced ones included
    group           group_rerank: consecutive rows that share one scan (PIVOT, arXiv 2607.24593)
    local_tokens    re-ranking modes: the last tokens that a row (group_rerank: its group's first row) sees are always
    candidates
    candidate_unit  misa_rerank: "token" keeps the best tokens (the gpu backend keeps 10 to 30 % more than `candidates`,
    see gpu/token_modes.py); "page" keeps whole 64-token pages, a page as good as its best token

    Raises ValueError naming the field, its value and what is allowed. A combination that could leave a row with fewer
    than min(its length, top_k) tokens is refused.
    """

    top_k: int = 2048
    active_heads: int = 8
    route_block: int = 128
    route_statistic: RouteStatistic = "max"
    candidates: int = 10240
    block_size: int = 128
    top_blocks: int = 64
    group: int = 4
    local_tokens: int = 128
    candidate_unit: CandidateUnit = "token"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES:
                if value not in get_args(CHOICES[field.name]):
                    raise ValueError(f"{field.name}={value!r} must be one of {get_args(CHOICES[field.name])}")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{field.name}={value!r} must be an int")
            elif value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
        if self.candidates < self.top_k:
            raise ValueError(f"candidates={self.candidates} must be at least top_k={self.top_k}")
        if self.candidate_unit == "page" and self.page_candidates_floor() < self.top_k:
            raise ValueError(
                f"candidates={self.candidates} must be a multiple of 64 and at least top_k + 63 = {self.top_k + 63} "
                f"with candidate_unit='page' (the last page of a row may hold one token)"
            )
        if (self.top_blocks - 1) * self.block_size + 1 < self.top_k:
            raise ValueError(
                f"top_blocks={self.top_blocks} of block_size={self.block_size} may hold as few as "
                f"{(self.top_blocks - 1) * self.block_size + 1} tokens; at least top_k={self.top_k} are needed"
            )

    def page_candidates_floor(self) -> int:
        """The fewest tokens that candidates // 64 whole pages can hold when the last one is partly filled; 0: not
        whole.
        """
        return 0 if self.candidates % 64 else self.candidates - 63
