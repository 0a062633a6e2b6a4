"""Reading SGLang's objects: what of them the stage gets, and why a forward must stay with SGLang's own indexer."""

from typing import Any

import torch

from sglang_ext.runner import OutputForm


def unsupported_reason(indexer: Any, attention: Any, pool: Any) -> str | None:
    """The policy's reason why this forward must stay with SGLang's own indexer, or None. Host values only."""
    if indexer.index_topk > 2048:
        return "index_topk"
    if indexer.head_dim != 128:
        return "head_dim"
    if indexer.num_init_tokens or indexer.num_local_tokens:
        return "forced_tokens"
    if getattr(indexer, "dsa_enable_prefill_cp", False):
        return "context_parallel"
    if getattr(attention, "indexer_logical_page_table", None) is not None:
        return "kv_shard"
    if hasattr(pool, "get_broadcastable_index_k_with_scale_buffer"):
        return "layer_split_pool"
    if getattr(pool, "index_page_size", pool.page_size) != 64:
        return "page_size"
    if getattr(attention_backend(), "hisparse_coordinator", None) is not None:
        return "hisparse"
    return None


def rows_are_close() -> bool:
    """Whether the rows of one request of target-verify or draft-extend see lengths at most 64 tokens apart, as far as
    is known.
    """
    drafts = getattr(attention_backend(), "speculative_num_draft_tokens", None)
    return drafts is not None and 0 < drafts <= 65


def output_form(metadata: Any, phase: str) -> OutputForm:
    """What the metadata's forward expects of an index: a physical slot, or a position in its request or its batch."""
    if metadata.force_unfused_topk:
        return OutputForm("position")
    if phase == "prefill" and metadata.topk_transform_method.name == "RAGGED":
        return OutputForm("position", metadata.attn_metadata.topk_indices_offset)
    return OutputForm("slot")


def layer_tensors(
    layer_id: int, q_fp8: torch.Tensor, weights: torch.Tensor, metadata: Any, pool: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, weights [.., H], index-key pages and page table of a layer."""
    weights = weights[: q_fp8.shape[0]].squeeze(-1)
    return q_fp8, weights, pool.get_index_k_with_scale_buffer(layer_id=layer_id), metadata.get_page_table_64()


def current_pool() -> Any:
    """The key pool of the model that runs: the target's and a draft model's differ."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    return dsa_indexer.get_token_to_kv_pool()


def attention_backend() -> Any:
    """The attention backend of the model that runs."""
    from sglang.srt.layers.attention.dsa import dsa_indexer

    return dsa_indexer.get_attn_backend()


def makes_up_forwards(phase: str) -> bool:
    """Whether SGLang runs forwards of its own making now, as it captures graphs: what they select says nothing.

    Its own capture mode is on in every replay of a prefill graph too, so that phase has another sign. Versions without
    these say False.
    """
    if phase == "decode":
        from sglang.srt.layers.attention.dsa import dsa_indexer

        capturing = getattr(dsa_indexer, "get_is_capture_mode", None)
        return capturing is not None and bool(capturing())
    try:
        from sglang.srt.runtime_context import get_flags
    except ImportError:
        return False
    return bool(getattr(getattr(get_flags(), "dp", None), "capturing_prefill_graph", False))


def indexer_device(indexer: Any) -> torch.device:
    """Where an Indexer's weights are."""
    return next(indexer.parameters()).device
