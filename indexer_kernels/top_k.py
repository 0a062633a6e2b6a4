"""The last step of every mode: the K best columns of each row, written as positions or as cache slots."""

from typing import Any, Protocol, runtime_checkable

import torch

from indexer_kernels.page_layout import PAGE_TOKENS

LOWEST = torch.finfo(torch.float32).min


class TopK(Protocol):
    """A top-k kernel. The plugin hands in SGLang's; alone, `torch_top_k` serves.

    scores [M, C] f32 (unit column stride, row stride a multiple of 4), lengths [M] int32: row m owns columns [0,
    lengths[m]). out [M, K] int32 receives min(lengths[m], K) distinct entries, then -1. Column i is written as
    page_table[m, i // page] * page + i % page, page = page_tokens (a power of two), or as i when page_table
    [M, >= C / page] int32 is None.
    """

    def __call__(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        page_table: torch.Tensor | None,
        out: torch.Tensor,
        page_tokens: int = PAGE_TOKENS,
    ) -> None: ...


@runtime_checkable
class PlannedTopK(Protocol):
    """A `TopK` that prepares itself from the lengths alone: plan(lengths) once per forward, handed to every call over
    the same lengths. Called without a plan, it makes one.
    """

    def plan(self, lengths: torch.Tensor) -> Any: ...

    def __call__(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        page_table: torch.Tensor | None,
        out: torch.Tensor,
        page_tokens: int = PAGE_TOKENS,
        plan: Any = None,
    ) -> None: ...


def torch_top_k(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor | None,
    out: torch.Tensor,
    page_tokens: int = PAGE_TOKENS,
) -> None:
    """`TopK` with torch.topk: any device, any K; ties are cut wherever torch cuts them, NaN counts as lowest."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    visible = columns < lengths[:, None]
    num = min(out.shape[1], scores.shape[1])
    # A row's own columns stay above those that are not its own, whatever they scored.
    owned = torch.nan_to_num(scores, nan=LOWEST, neginf=LOWEST)
    chosen = owned.masked_fill(~visible, float("-inf")).topk(num, dim=1, sorted=True).indices
    found = torch.arange(num, device=scores.device) < lengths[:, None]
    if page_table is not None:
        pages = page_table.gather(1, (chosen // page_tokens).clamp_max(page_table.shape[1] - 1))
        chosen = pages.long() * page_tokens + chosen % page_tokens
    out.fill_(-1)
    out[:, :num] = torch.where(found, chosen, -1).to(torch.int32)
