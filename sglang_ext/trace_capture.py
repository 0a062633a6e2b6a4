"""Writes traces: what the indexers of a served model see of a prompt, for `indexer_kernels.traces`.

A diagnostic mode: it copies keys from the device in the middle of a forward, so every layer it looks at waits.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from indexer_kernels.page_layout import PAGE_TOKENS, unpack_pages
from indexer_kernels.traces import Trace, sample_rows, save_traces

logger = logging.getLogger("sglang_ext")

FILE_NAME = re.compile(r"trace_(\d+)_layer\d+_\d+\.npz")


class TracePlan(NamedTuple):
    """What is kept of one forward, in every layer. rows: of its one request, whose first `prefix` tokens are cached."""

    number: int
    context: int
    prefix: int
    rows: list[int]


class TraceWriter:
    """Plans a trace once per forward, writes one file per layer: trace_<number>_layer<layer>_<context>.npz.

    Numbers count prompts and go on after those already in the folder. Raises ValueError where the folder cannot be
    made.
    """

    def __init__(self, folder: str, rows: int, model_config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"trace_dir={folder!r} cannot be made: {error.strerror}") from None
        self._rows = rows
        self._model = model_name(model_config)
        found = (FILE_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        self._next = 1 + max((int(match[1]) for match in found if match), default=0)
        logger.warning("traces go to %s: prefill waits for them, this server is for diagnosis only", folder)

    def plan(
        self, seen: Sequence[int], extend: Sequence[int], whole: Sequence[int] | None, top_k: int
    ) -> TracePlan | str:
        """What to keep of a forward, or the reason why nothing is kept.

        seen, extend, whole: per request the tokens it sees, the rows it brings, the length of its prompt (None:
        unknown). Kept is the last chunk of a prompt served alone. Rows that are spread see more than top_k tokens where
        enough of them do: the others have nothing to choose.
        """
        if whole is None:
            return "prompt_unknown"
        if len(seen) != 1:
            return "several_requests"
        if seen[0] != whole[0]:
            return "not_last_chunk"
        if _rank() != 0:
            return "other_rank"
        prefix = seen[0] - extend[0]
        rows = sample_rows(extend[0], self._rows, first=max(0, top_k - prefix))
        self._next += 1
        return TracePlan(self._next - 1, seen[0], prefix, rows)

    def write(
        self,
        plan: TracePlan,
        layer: int,
        q: torch.Tensor,
        weights: torch.Tensor,
        k_pages: torch.Tensor,
        page_table: torch.Tensor,
    ) -> None:
        """One layer's file. q [>= M, H, 128] fp8, weights [>= M, H] f32, k_pages [P, 8448] uint8, page_table [1, W]
        int32. Raises OSError where it cannot be written.
        """
        picked = torch.tensor(plan.rows, dtype=torch.int64, device=q.device)
        pages = k_pages[page_table[0, : -(-plan.context // PAGE_TOKENS)].long()]
        k, k_scale = unpack_pages(pages, plan.context)
        trace = Trace(
            model=self._model,
            layer=layer,
            context=plan.context,
            q=q.view(torch.uint8)[picked].view(torch.float8_e4m3fn).cpu(),
            weights=weights[picked].float().cpu(),
            k=k.cpu(),
            k_scale=k_scale.cpu(),
            positions=picked.cpu() + plan.prefix,
            prompt={"number": plan.number, "cached_tokens": plan.prefix},
        )
        save_traces(self.folder / f"trace_{plan.number:05d}_layer{layer:02d}_{plan.context}.npz", [trace])


def model_name(model_config: Mapping[str, Any]) -> str:
    """The last part of the model's path or hub id; its type where the config names neither."""
    path = str(model_config.get("_name_or_path") or "")
    return Path(path).name or str(model_config.get("model_type") or "unknown")


def _rank() -> int:
    """Rank among all processes of the model; 0 where it runs in one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
