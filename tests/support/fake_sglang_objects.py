"""What SGLang hands the stage in a forward, the stage called with it, and SGLang's objects around a batch."""

import dataclasses
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ext.settings import Settings
from sglang_ext.stage import Forward, Stage
from tests.support.inputs import Batch, make_batch

# Prunes contexts of a few hundred tokens: misa differs from native from the first full block on.
MISA = Settings(mode="misa", backend="reference", route_block=64, active_heads=2)


def stage_batch() -> Batch:
    """The batch that `prefill` is called for."""
    return make_batch([300, 40, 70], [9, 3, 1], num_heads=8, seed=5)


@dataclass(frozen=True)
class Attention:
    """Frozen like SGLang's metadata."""

    page_size: int = 64


class Asked:
    """An `unsupported` that counts how often it is asked."""

    def __init__(self, answer: str | None = None) -> None:
        self.answer, self.times = answer, 0

    def __call__(self) -> str | None:
        self.times += 1
        return self.answer


def prefill(stage: Stage, batch: Batch, attention: object = None, **changes: Any) -> Forward:
    """stage.prefill of stage_batch()."""
    arguments: dict[str, Any] = {
        "attention": Attention() if attention is None else attention,
        "extend_lengths": [9, 3, 1],
        "lengths": lambda: torch.tensor([300, 40, 70]),
        "page_table": batch.page_table,
        "q": batch.q,
        "unsupported": Asked(),
    }
    return stage.prefill(**arguments | changes)


def decode(stage: Stage, **changes: Any) -> Forward:
    """stage.decode of two requests in a batch padded to four rows."""
    arguments: dict[str, Any] = {
        "attention": Attention(),
        "lengths": torch.tensor([130, 7], dtype=torch.int32),
        "page_table": torch.zeros((2, 3), dtype=torch.int32),
        "num_rows": 2,
        "q": torch.zeros((4, 8, 128)).to(torch.float8_e4m3fn),
        "unsupported": Asked(),
    }
    return stage.decode(**arguments | changes)


def calls(stage: Stage) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(phase, mode, reason) -> (calls, rows)."""
    listed = stage.counters.snapshot()["calls"]
    return {(one["phase"], one["mode"], one["reason"]): (one["calls"], one["rows"]) for one in listed}


def log_lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# SGLang's own classes around a test batch. SGLang is imported inside: not every machine has it.

TARGETS = (
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.__init__",
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_ragged",
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
    "sglang.srt.layers.attention.dsa.dsa_indexer_kpool.IndexerKPool.__init__",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
)
SWITCH_TARGET = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._update_handlers"
)


@contextmanager
def unpatched_sglang() -> Iterator[None]:
    """An empty hook registry inside; afterwards SGLang's methods and registry are as they were.

    HookRegistry.reset() forgets what it patched, and undoes nothing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    owners = [(pkgutil.resolve_name(target.rpartition(".")[0]), target.rpartition(".")[2]) for target in TARGETS]
    owners.append((pkgutil.resolve_name(SWITCH_TARGET.rpartition(".")[0]), SWITCH_TARGET.rpartition(".")[2]))
    methods = [(owner, name, vars(owner)[name]) for owner, name in owners]
    hooks, patched = {target: list(found) for target, found in HookRegistry._hooks.items()}, set(HookRegistry._patched)
    HookRegistry.reset()
    try:
        yield
    finally:
        for owner, name, method in methods:
            setattr(owner, name, method)
        HookRegistry.reset()
        HookRegistry._hooks.update(hooks)
        HookRegistry._patched.update(patched)


def indexer_of(batch: Batch, top_k: int, **changes: Any) -> Any:
    """An Indexer that was never built: only what the plugin looks at."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    indexer = object.__new__(Indexer)
    indexer.__dict__.update(
        layer_id=0,
        n_heads=batch.q.shape[1],
        head_dim=128,
        index_topk=top_k,
        num_init_tokens=0,
        num_local_tokens=0,
        dsa_enable_prefill_cp=False,
    )
    indexer.__dict__.update(changes)
    return indexer


def pool_of(batch: Batch, **changes: Any) -> SimpleNamespace:
    """The key cache; every layer has the same keys, and another layer's are not given out."""

    def keys(layer_id: int) -> torch.Tensor:
        assert isinstance(layer_id, int)
        return batch.k_pages

    return SimpleNamespace(**{"page_size": 64, "index_page_size": 64, "get_index_k_with_scale_buffer": keys} | changes)


def metadata_of(batch: Batch, form: str = "PAGED", unfused: bool = False, expand: bool = False, **changes: Any) -> Any:
    """DSAIndexerMetadata of a batch. expand: one table row per query row, as for target-verify."""
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
    from sglang.srt.layers.attention.dsa_backend import DSAMetadata

    seen = [len(keys) for keys in batch.k]
    extend = [batch.row_request.count(request) for request in range(len(seen))]
    row_request = torch.tensor(batch.row_request, dtype=torch.int64)
    fields = {field.name: None for field in dataclasses.fields(DSAMetadata) if field.default is dataclasses.MISSING}
    fields |= {
        "page_size": 64,
        "cache_seqlens_int32": torch.tensor(seen, dtype=torch.int32),
        "real_page_table": batch.page_table[row_request].contiguous() if expand else batch.page_table,
        "dsa_extend_seq_lens_list": extend,
        "dsa_seqlens_expanded": torch.tensor(batch.lengths, dtype=torch.int32),
        "indexer_seq_lens_cpu": torch.tensor(seen),
        "indexer_seq_lens": torch.tensor(seen),
        "token_to_batch_idx": row_request.int(),
        "topk_indices_offset": batch.ks if form == "RAGGED" else None,
    }
    return DSAIndexerMetadata(DSAMetadata(**fields | changes), TopkTransformMethod[form], force_unfused_topk=unfused)


def sglang_forward(mode: str, **fields: Any) -> SimpleNamespace:
    """What the plugin looks at in a ForwardBatch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(forward_mode=ForwardMode[mode], **fields)


def padded(batch: Batch, q_rows: int = 0, weight_rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_fp8, weights [.., H, 1]) with rows after the batch's; the weights of those are NaN."""
    more = q_rows if weight_rows is None else weight_rows
    q = torch.cat([batch.q.view(torch.uint8), torch.full((q_rows, *batch.q.shape[1:]), 0x7F, dtype=torch.uint8)])
    weights = torch.cat([batch.weights, torch.full((more, batch.weights.shape[1]), float("nan"))])
    return q.view(torch.float8_e4m3fn), weights.unsqueeze(-1)
