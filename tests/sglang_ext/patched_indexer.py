"""SGLang's real Indexer class under the plugin's hooks, over stand-ins of what needs a GPU or a server."""

import contextlib
import inspect
import pkgutil
from collections.abc import Iterator
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
from sglang_ext.stage import Stage
from tests.support.inputs import Batch

TOP_K = 64
LAYER = 3


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
def saved_targets(stage: Stage) -> Iterator[None]:
    """Undoes every patch on the hooks' targets, and what the registry holds, when it ends."""
    saved = []
    for hook in sglang_hooks.wanted_hooks(stage.settings.runtime_switch):
        owner, _, name = hook.target.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        saved.append((owner, name, vars(owner)[name]))
    HookRegistry.reset()
    try:
        yield
    finally:
        HookRegistry.reset()
        for owner, name, original in saved:
            setattr(owner, name, original)


@contextlib.contextmanager
def hooked(stage: Stage) -> Iterator[Recorder]:
    """The hooks of `stage` on the real classes, around recorded originals of the Indexer's methods."""
    native = Recorder()
    with saved_targets(stage):
        for name in ("__init__", "_get_topk_ragged", "_get_topk_paged"):
            setattr(Indexer, name, native.method(getattr(Indexer, name)))
        assert sglang_hooks.verify(stage.settings.runtime_switch) == []
        sglang_hooks.install(stage)
        HookRegistry.apply_hooks()
        assert sglang_hooks.unapplied(stage) == []
        yield native


def use(stage: Stage, **settings: Any) -> None:
    """Fresh settings and counters for a stage that is already installed."""
    defaults = {"mode": "misa", "backend": "reference", "route_block": 64, "active_heads": 2}
    stage.settings = Settings(**defaults | settings)
    stage.counters = Counters()
    stage._prompts = None
    stage._unsupported_logged.clear()


def indexer(**changes: Any) -> Any:
    """What the hooks read of an Indexer."""
    values = {"index_topk": TOP_K, "head_dim": 128, "n_heads": 8, "num_init_tokens": 0, "num_local_tokens": 0}
    return SimpleNamespace(**values | {"layer_id": LAYER, "dsa_enable_prefill_cp": False} | changes)


class Pool:
    """An index-key pool with the pages of one layer."""

    index_page_size = page_size = 64

    def __init__(self, pages: torch.Tensor) -> None:
        self.pages = pages

    def get_index_k_with_scale_buffer(self, layer_id: int) -> torch.Tensor:
        assert layer_id == LAYER
        return self.pages


def metadata(batch: Batch, counts: list[int], expand: bool = False, **changes: Any) -> DSAIndexerMetadata:
    """SGLang's real metadata of a forward whose last counts[r] rows per request are the batch's.

    expand: the layout of target-verify, one page-table row per query row.
    """
    per_request = [length for length, last in zip(batch.lengths, _last_rows(counts)) if last]
    seen = torch.tensor(batch.lengths, dtype=torch.int32)
    table = batch.page_table[batch.row_request] if expand else batch.page_table
    form = {name: changes.pop(name) for name in ("topk_transform_method", "force_unfused_topk") if name in changes}
    unused = torch.empty(0, dtype=torch.int32)
    fields = {
        "page_size": 64,
        "cache_seqlens_int32": torch.tensor(per_request, dtype=torch.int32),
        "max_seq_len_q": 1,
        "max_seq_len_k": max(per_request),
        "cu_seqlens_q": unused,
        "cu_seqlens_k": unused,
        "page_table_1": None,
        "real_page_table": table,
        "dsa_cache_seqlens_int32": seen.clamp_max(TOP_K),
        "dsa_cu_seqlens_q": unused,
        "dsa_cu_seqlens_k": unused,
        "dsa_extend_seq_lens_list": counts,
        "dsa_seqlens_expanded": seen,
        "indexer_k_start_end": (batch.ks, batch.ke),
        "indexer_seq_lens_cpu": torch.tensor(per_request),
        "topk_indices_offset": batch.ks,
    }
    form = {"topk_transform_method": TopkTransformMethod.PAGED, "force_unfused_topk": False} | form
    return DSAIndexerMetadata(attn_metadata=DSAMetadata(**fields | changes), **form)


def _last_rows(counts: list[int]) -> list[bool]:
    return [row == count - 1 for count in counts for row in range(count)]


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
