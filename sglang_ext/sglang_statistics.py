"""Stored block statistics in SGLang: where their memory is, and everything that writes index keys.

Hooked here: allocation, memory sizing, extends that skip the indexer, and the writes that no extend follows. Other
extends and decode steps call `refresh_extend` and `refresh_step` from the indexer's own hooks.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_ext.sglang_hook import Hook
from sglang_ext.sglang_objects import current_pool
from sglang_ext.sglang_ranks import on_any_rank
from sglang_ext.stage import Stage
from sglang_ext.statistics import BYTES_PER_TOKEN, PoolStatistics

INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer"
INDEX_KEY_CACHE = "sglang.srt.mem_cache.index_key_cache.IndexKeyCache"
POOL_SIZES = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
PREBUILT = "sglang.srt.disaggregation.decode_schedule_batch_mixin.ScheduleBatchDisaggregationDecodeMixin"

KEPT = "sglang_ext_statistics"  # attribute of a pool's IndexKeyCache: its PoolStatistics, or why it has none
KEY_BYTES_PER_TOKEN = 132  # per layer, as SGLang sizes them: 128 fp8 and a float32 scale
OTHER_CACHES = {"_PageInterleaveIndexKeyCache": "kv_shard", "LayerSplitIndexKeyCache": "layer_split_pool"}


def statistics_hooks() -> tuple[Hook, ...]:
    """What keeps stored block statistics right; each does nothing while decode asks for none."""
    return (
        Hook(
            f"{INDEX_KEY_CACHE}.__init__",
            HookType.AFTER,
            ("self", "pool"),
            "allocate block statistics beside the index keys, before any graph is captured",
            _after_cache_init,
        ),
        Hook(
            f"{POOL_SIZES}._compute_dsa_indexer_cell_size",
            HookType.AFTER,
            ("self", "kvc", "num_layers"),
            "count the memory of block statistics where SGLang sizes its pools",
            _after_cell_size,
        ),
        Hook(
            f"{INDEXER}._forward_cuda_k_only",
            HookType.AFTER,
            ("self", "x", "positions", "forward_batch", "layer_id", "act_quant", "metadata"),
            "short extends store keys without asking which tokens to select",
            _after_k_only,
        ),
        Hook(
            f"{PREBUILT}.process_prebuilt",
            HookType.AFTER,
            ("self",),
            "requests whose keys came from a prefill server have seen no extend here",
            _after_process_prebuilt,
        ),
        Hook(
            f"{INDEX_KEY_CACHE}.load_cpu_copy",
            HookType.AFTER,
            ("self", "index_k_cpu", "indices"),
            "a retracted request's keys come back from the host into other pages",
            _after_load_cpu_copy,
        ),
        Hook(
            f"{INDEX_KEY_CACHE}.move",
            HookType.AFTER,
            ("self", "tgt_loc", "src_loc"),
            "keys are copied between pages",
            _after_move,
        ),
    )


def statistics_of(pool: Any) -> PoolStatistics | str | None:
    """The block statistics of a pool; a reason of the policy where they were refused, None where nobody asked."""
    return getattr(getattr(pool, "index_key_cache", None), KEPT, None)


def refresh_extend(stage: Stage, pool: Any, layer_id: int, metadata: Any) -> None:
    """The means of all full pages of an extend's requests, whose new keys are stored."""
    kept = statistics_of(pool)
    if not isinstance(kept, PoolStatistics):
        return
    # What lies before an extend's own rows was filled before: other than by a host's cache, and by a draft model's
    # last step, of which SGLang does not store every key.
    known = pool.layer_transfer_counter is None and stage.statistics.is_served_models(kept)
    trusted = None
    if stage.settings.check_integrity and known:
        prefixes = metadata.get_indexer_seq_len_cpu() - torch.tensor(metadata.get_dsa_extend_len_cpu())
        trusted = prefixes.to(device=metadata.get_page_table_64().device, dtype=torch.int32)
    stage.fill_means(
        kept,
        layer_id,
        pool.get_index_k_with_scale_buffer(layer_id=layer_id),
        metadata.get_page_table_64(),
        metadata.get_seqlens_int32(),
        trusted,
    )


def refresh_step(stage: Stage, pool: Any, layer_id: int, metadata: Any, row_lengths: torch.Tensor) -> None:
    """The means that a decode step's keys, which are stored, have changed."""
    kept = statistics_of(pool)
    if isinstance(kept, PoolStatistics):
        k_pages = pool.get_index_k_with_scale_buffer(layer_id=layer_id)
        stage.step_means(kept, layer_id, k_pages, metadata.get_page_table_64(), row_lengths)


def _after_cache_init(stage: Stage) -> Callable[..., None]:
    def hook(_result: None, cache: Any, *_args: Any, **_kwargs: Any) -> None:
        if not stage.wants_statistics():
            return
        kept: PoolStatistics | str | None = _refusal(cache)
        if kept is None:
            try:
                # Released with the keys, and like them empty afterwards: SGLang drops every request then.
                memory = cache.pool.memory_saver_adapter.region(_kv_memory())
                kept = stage.allocate_statistics(cache, cache.buffer, cache.pool.start_layer, memory)
            except torch.OutOfMemoryError:
                kept = "statistics_memory"
            if on_any_rank(kept == "statistics_memory"):
                kept = "statistics_memory"  # ranks that share a batch must select alike
        if isinstance(kept, str):
            stage.refuse_statistics(kept)
        setattr(cache, KEPT, kept)

    return hook


def _refusal(cache: Any) -> str | None:
    from sglang.srt.mem_cache.index_key_cache import IndexKeyCache

    if type(cache) is not IndexKeyCache:
        return OTHER_CACHES.get(type(cache).__name__, "no_statistics")
    if type(cache.pool).__name__ == "HiSparseDSATokenToKVPool":
        return "hisparse"
    if getattr(cache.pool, "index_kpool", 1) != 1:
        return "kpool"
    # A page of the pool is a page of keys: else tables and buffers count pages differently (decode context parallel).
    if not cache.pool.page_size == getattr(cache.pool, "index_page_size", cache.pool.page_size) == 64:
        return "page_size"
    return None


def _after_cell_size(stage: Stage) -> Callable[..., int | None]:
    def hook(result: int, _sizes: Any, *args: Any, **kwargs: Any) -> int | None:
        kvc = kwargs["kvc"] if "kvc" in kwargs else args[0]
        if not stage.wants_statistics() or getattr(kvc.server_args, "enable_hisparse", False):
            return None
        layers, rest = divmod(result, KEY_BYTES_PER_TOKEN)
        return None if rest else result + layers * BYTES_PER_TOKEN

    return hook


def _after_k_only(stage: Stage) -> Callable[..., None]:
    def hook(
        _result: Any,
        _indexer: Any,
        _x: Any,
        _positions: Any,
        forward_batch: Any,
        layer_id: int,
        _act_quant: Any = None,
        metadata: Any = None,
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        if forward_batch.forward_mode.is_extend_without_speculative():
            refresh_extend(stage, current_pool(), layer_id, metadata)
        else:
            refresh_step(stage, current_pool(), layer_id, metadata, metadata.get_seqlens_int32())

    return hook


def _after_process_prebuilt(stage: Stage) -> Callable[..., None]:
    def hook(_result: None, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        caches = stage.statistics.caches()
        columns = -(-max(batch.seq_lens_cpu.tolist(), default=0) // 64)
        if not caches or not columns:
            return
        slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices, : columns * 64 : 64]
        page_table, lengths = (slots // 64).to(torch.int32), batch.seq_lens.to(torch.int32)
        # The target's and a draft model's pools share slots, and both came over the network.
        for cache, kept in caches:
            for layer_id in kept.layers():
                stage.fill_means(kept, layer_id, cache.get_buffer(layer_id), page_table, lengths)

    return hook


def _after_load_cpu_copy(stage: Stage) -> Callable[..., None]:
    def hook(_result: None, cache: Any, _index_k_cpu: Any, indices: torch.Tensor) -> None:
        _fill_pages(stage, cache, indices[::64] // 64)

    return hook


def _after_move(stage: Stage) -> Callable[..., None]:
    def hook(_result: None, cache: Any, tgt_loc: torch.Tensor, _src_loc: torch.Tensor) -> None:
        _fill_pages(stage, cache, torch.unique(tgt_loc.view(-1) // 64))

    return hook


def _fill_pages(stage: Stage, cache: Any, pages: torch.Tensor) -> None:
    """The means of whole pages; of one that is not full yet nothing is read before a decode step fills it."""
    kept = getattr(cache, KEPT, None)
    if not isinstance(kept, PoolStatistics) or not pages.numel():
        return
    page_table = pages.to(torch.int32).view(1, -1)
    length = torch.full((1,), 64 * pages.numel(), dtype=torch.int32, device=pages.device)
    for layer_id in kept.layers():
        stage.fill_means(kept, layer_id, cache.get_local_buffer(layer_id), page_table, length)


def _kv_memory() -> str:
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE

    return GPU_MEMORY_TYPE_KV_CACHE
