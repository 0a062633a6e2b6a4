"""From a decision and plain tensors to the indices SGLang's sparse attention reads. Knows nothing of SGLang."""

from typing import NamedTuple

import torch

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.row_plan import RowPlan, plan_rows
from indexer_kernels.top_k import TopK
from indexer_kernels.upload import upload


class OutputForm(NamedTuple):
    """What an entry must be: "slot", or "position" with `offsets` [M] added (None: as it is)."""

    kind: str
    offsets: torch.Tensor | None = None


class Rows(NamedTuple):
    """Rows of one forward that run the same mode; picked None: all of them, in order."""

    plan: RowPlan
    picked: torch.Tensor | None = None

    def for_one_forward(self) -> "Rows":
        """The same rows, with nothing kept yet of what layers derive from their lengths."""
        return self._replace(plan=self.plan.for_one_forward())


def run(
    mode: str,
    rows: Rows,
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    params: IndexerParams,
    form: OutputForm,
    backend: str,
    top_k_kernel: TopK | None,
    out: torch.Tensor,
    page_means: torch.Tensor | None = None,
    update_means: bool = False,
) -> None:
    """Fill out's rows [>= M, top_k] int32 of `rows` with the selection; other rows of out are left alone.

    q [>= M, H, 128] fp8, weights [>= M, H] f32, k_pages [P, 8448] uint8, page_table [R, W] int32, page_means [P, 128]
    bf16: stored block statistics of the layer, if there are any; update_means: those of each row's last full page are
    made anew on the way. Entries are packed first, then -1.
    """
    if rows.plan.num_rows == 0:
        return
    target = out
    if rows.picked is not None:
        # fp8 tensors cannot be indexed by rows on every device, their bytes can
        q = q.view(torch.uint8)[rows.picked].view(torch.float8_e4m3fn)
        weights = weights[rows.picked]
        target = out.new_empty((rows.plan.num_rows, params.top_k))
    select_rows(
        mode,
        q,
        weights,
        k_pages,
        page_table,
        rows.plan,
        params,
        backend=backend,
        output=form.kind,
        top_k_kernel=top_k_kernel,
        out=target,
        page_means=page_means,
        update_means=update_means,
    )
    if form.offsets is not None:
        chosen = target[: rows.plan.num_rows]
        offsets = form.offsets[: out.shape[0]] if rows.picked is None else form.offsets[rows.picked]
        chosen.copy_(torch.where(chosen >= 0, chosen + offsets[: rows.plan.num_rows, None], chosen))
    if rows.picked is not None:
        out[rows.picked] = target


def split_tail(
    prefix_lengths: list[int],
    extend_lengths: list[int],
    prompt_lengths: list[int],
    tail_rows: int,
    device: torch.device,
) -> tuple[Rows, Rows]:
    """(rows that run the mode, rows among the last tail_rows of their prompt): both with plans over the same page
    table.

    Request r brings extend_lengths[r] rows after prefix_lengths[r] tokens of a prompt of prompt_lengths[r] tokens; a
    row at position p is in the tail when p >= prompt_lengths[r] - tail_rows.
    """
    counts = torch.tensor(extend_lengths, dtype=torch.int64)
    request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]
    position = torch.tensor(prefix_lengths, dtype=torch.int64)[request] + within
    in_tail = position >= torch.tensor(prompt_lengths, dtype=torch.int64)[request] - tail_rows
    parts = []
    for mask in (~in_tail, in_tail):
        plan = plan_rows(request[mask], position[mask] + 1, len(counts), device)
        parts.append(Rows(plan, upload(mask.nonzero().squeeze(1), device)))
    return parts[0], parts[1]
