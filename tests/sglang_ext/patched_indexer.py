"""SGLang's real Indexer class under the plugin's hooks, over stand-ins of what needs a GPU or a server."""

import contextlib
import dataclasses
import inspect
import pkgutil
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DSAMetadata
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_ext import sglang_hooks
from sglang_ext.counters import Counters
from sglang_ext.settings import Settings
from sglang_ext.shadow import Shadow
from sglang_ext.stage import Stage
from sglang_ext.trace_capture import TraceWriter
from tests.support.inputs import Batch

TOP_K = 64
LAYER = 3
TARGETS = (
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.__init__",
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_ragged",
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
    "sglang.srt.layers.attention.dsa.dsa_indexer_kpool.IndexerKPool.__init__",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
    "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.__init__",
    "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
    "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._forward_cuda_k_only",
    "sglang.srt.mem_cache.index_key_cache.IndexKeyCache.__init__",
    "sglang.srt.mem_cache.index_key_cache.IndexKeyCache.load_cpu_copy",
    "sglang.srt.mem_cache.index_key_cache.IndexKeyCache.move",
    "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_dsa_indexer_cell_size",
    "sglang.srt.disaggregation.decode_schedule_batch_mixin.ScheduleBatchDisaggregationDecodeMixin.process_prebuilt",
)
SWITCH_TARGET = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._update_handlers"
)


class Recorder:
    """Stands for SGLang's own method: notes its arguments and returns something recognisable."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def method(self, original: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return self

        recorded.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return recorded


@contextlib.contextmanager
def unpatched_sglang() -> Iterator[None]:
    """An empty hook registry inside; afterwards SGLang's methods and registry are as they were.

    HookRegistry.reset() forgets what it patched, and undoes nothing.
    """
    owners = [target.rpartition(".") for target in (*TARGETS, SWITCH_TARGET)]
    found = [(pkgutil.resolve_name(owner), name) for owner, _, name in owners]
    methods = [(owner, name, vars(owner)[name]) for owner, name in found]
    hooks, patched = {target: list(own) for target, own in HookRegistry._hooks.items()}, set(HookRegistry._patched)
    HookRegistry.reset()
    try:
        yield
    finally:
        for owner, name, method in methods:
            setattr(owner, name, method)
        HookRegistry.reset()
        HookRegistry._hooks.update(hooks)
        HookRegistry._patched.update(patched)


@contextlib.contextmanager
def hooked(stage: Stage) -> Iterator[Recorder]:
    """The hooks of `stage` on the real classes, around recorded originals of the Indexer's methods."""
    native = Recorder()
    with unpatched_sglang():
        for name in ("__init__", "_get_topk_ragged", "_get_topk_paged", "_forward_cuda_k_only"):
            setattr(Indexer, name, native.method(getattr(Indexer, name)))
        assert sglang_hooks.verify(stage.settings.runtime_switch) == []
        sglang_hooks.install(stage)
        HookRegistry.apply_hooks()
        assert sglang_hooks.unapplied(stage) == []
        stage._layers.add(LAYER)  # as if the indexer had been built
        yield native


def use(stage: Stage, **settings: Any) -> None:
    """Fresh settings and counters for a stage that is already installed. Decode has prefill's `mode`, unless named."""
    asked = {"mode": "misa", "backend": "reference", "route_block": 64, "active_heads": 2} | settings
    stage.settings = Settings(**{"decode_mode": asked["mode"]} | asked)
    stage.counters = Counters()
    stage.shadow = Shadow.of(stage.settings)
    stage._prompts = None
    folder, rows = stage.settings.trace_dir, stage.settings.trace_rows
    stage._traces = None if folder is None else TraceWriter(folder, rows, {"_name_or_path": "models/tiny"})
    stage.support.rejected.clear()
    stage._no_statistics = None


def indexer(**changes: Any) -> Any:
    """An Indexer that was never built: only what the hooks read of it."""
    values = {"index_topk": TOP_K, "head_dim": 128, "n_heads": 8, "num_init_tokens": 0, "num_local_tokens": 0}
    unbuilt = object.__new__(Indexer)
    unbuilt.__dict__.update(values | {"layer_id": LAYER, "dsa_enable_prefill_cp": False} | changes)
    return unbuilt


class Pool:
    """An index-key pool; `layers` have the same pages, another layer's are not given out."""

    index_page_size = page_size = 64

    def __init__(self, pages: torch.Tensor, layers: Collection[int] = (LAYER,), **changes: Any) -> None:
        self.pages, self.layers = pages, layers
        self.__dict__.update(changes)

    def get_index_k_with_scale_buffer(self, layer_id: int) -> torch.Tensor:
        assert layer_id in self.layers
        return self.pages


def metadata(batch: Batch, counts: list[int] | None = None, expand: bool = False, **changes: Any) -> DSAIndexerMetadata:
    """SGLang's real metadata of a batch that brings counts[r] rows per request (None: those it has).

    expand: the layout of target-verify, one page-table row per query row.
    """
    per_request = [len(keys) for keys in batch.k]
    counts = [batch.row_request.count(request) for request in range(len(batch.k))] if counts is None else counts
    seen, row_request = torch.tensor(batch.lengths, dtype=torch.int32), torch.tensor(batch.row_request)
    form = {"topk_transform_method": TopkTransformMethod.PAGED, "force_unfused_topk": False}
    form |= {name: changes.pop(name) for name in form if name in changes}
    ragged = form["topk_transform_method"] is TopkTransformMethod.RAGGED
    fields = {field.name: None for field in dataclasses.fields(DSAMetadata) if field.default is dataclasses.MISSING}
    fields |= {
        "page_size": 64,
        "cache_seqlens_int32": torch.tensor(per_request, dtype=torch.int32),
        "real_page_table": batch.page_table[row_request].contiguous() if expand else batch.page_table,
        "dsa_extend_seq_lens_list": counts,
        "dsa_seqlens_expanded": seen,
        "indexer_k_start_end": (batch.ks, batch.ke),
        "indexer_seq_lens_cpu": torch.tensor(per_request),
        "indexer_seq_lens": torch.tensor(per_request),
        "token_to_batch_idx": row_request.int(),
        "topk_indices_offset": batch.ks if ragged else None,
    }
    return DSAIndexerMetadata(attn_metadata=DSAMetadata(**fields | changes), **form)


@contextlib.contextmanager
def serving(pool: Any, **backend: Any) -> Iterator[None]:
    """SGLang's real forward context, over a stand-in of the attention backend."""
    with forward_context(ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=pool, **backend))):
        yield


def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with NaN rows after it."""
    extra = torch.full((rows, *tensor.shape[1:]), float("nan"), dtype=torch.float32)
    return torch.cat([tensor.float(), extra]).to(tensor.dtype)


def ragged(
    batch: Batch,
    found: DSAIndexerMetadata,
    mode: ForwardMode = ForwardMode.EXTEND,
    pad: int = 0,
    out: torch.Tensor | None = None,
    pool: Any = None,
    of: Any = None,
    **forward_batch: Any,
) -> torch.Tensor:
    """Calls the hooked `_get_topk_ragged` as SGLang does; weights may have more rows than q."""
    fields = SimpleNamespace(forward_mode=mode, **forward_batch)
    weights = padded(batch.weights, pad + 2).unsqueeze(-1)
    with serving(pool or Pool(batch.k_pages)):
        return Indexer._get_topk_ragged(
            of or indexer(), False, fields, LAYER, padded(batch.q, pad), weights, found, out
        )


def paged(
    batch: Batch,
    found: DSAIndexerMetadata,
    mode: ForwardMode = ForwardMode.DECODE,
    pad: int = 0,
    pool: Any = None,
    of: Any = None,
    **backend: Any,
) -> torch.Tensor:
    """Calls the hooked `_get_topk_paged` as SGLang does."""
    fields, weights = SimpleNamespace(forward_mode=mode), padded(batch.weights, pad).unsqueeze(-1)
    with serving(pool or Pool(batch.k_pages), **backend):
        return Indexer._get_topk_paged(of or indexer(), fields, LAYER, padded(batch.q, pad), weights, found)
