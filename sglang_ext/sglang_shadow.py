"""Shadow sampling's view of SGLang: the rows of a forward, its own selection for some of them, the ranks of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sglang_ext.forwards import Forward
from sglang_ext.guard import agree_in
from sglang_ext.overlap import Key
from sglang_ext.sglang_objects import makes_up_forwards
from sglang_ext.sglang_ranks import attention_group
from sglang_ext.shadow import Sample, Shadow
from sglang_ext.stage import Stage


def plan_prefill(stage: Stage, shadow: Shadow, metadata: Any, device: torch.device) -> Sample | None:
    """What to compare of a prefill, from SGLang's host values. Nothing of those that SGLang makes up, for its graphs or
    where data-parallel attention leaves a rank without prompts while others prefill: their keys are all alike, so that
    any selection is as good as native's and none overlaps with it.
    """
    if not shadow.prefill_comes or makes_up_forwards("prefill"):
        return None
    seen = [int(length) for length in metadata.get_indexer_seq_len_cpu().tolist()]
    extend = [int(rows) for rows in metadata.get_dsa_extend_len_cpu()]
    return shadow.plan_prefill(seen, extend, stage.tail_starts(seen, extend), stage.settings_top_k(), device)


def plan_decode(stage: Stage, shadow: Shadow, forward: Forward) -> Sample | None:
    """What to compare of a decode; nothing of the eager runs before a graph's capture."""
    if makes_up_forwards("decode"):
        return None
    return shadow.plan_decode(forward.num_rows, forward.made_of[0], stage.settings_top_k())


def native_prefill_rows(
    original: Callable[..., torch.Tensor],
    indexer: Any,
    enable_dual_stream: bool,
    forward_batch: Any,
    layer_id: int,
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    metadata: Any,
    sample: Sample,
) -> torch.Tensor:
    """[S, K] of SGLang's `_get_topk_ragged` for the sample's rows alone, in the form of the whole forward's result.

    A batch of one request that brings S rows: it costs what S rows cost, and S rows of scores in memory.
    """
    # fp8 tensors cannot be indexed by rows on every device, their bytes can
    q = q_fp8.view(torch.uint8)[sample.rows].view(q_fp8.dtype)
    rows = metadata_of_rows(metadata, sample)
    return original(indexer, enable_dual_stream, forward_batch, layer_id, q, weights[sample.rows], rows, None)


def metadata_of_rows(metadata: Any, sample: Sample) -> Any:
    """SGLang's prefill metadata as a batch would have it that consists of the sample's rows."""
    attention, request = metadata.attn_metadata, sample.request
    assert request is not None and sample.spans is not None, "a sample of a prefill"
    zeros, offsets = torch.zeros_like(sample.lengths), attention.topk_indices_offset

    def own(of_requests: torch.Tensor | None) -> torch.Tensor | None:
        # A copy starts where SGLang's tensors start: another alignment would be another kernel to compile.
        return None if of_requests is None else of_requests[request : request + 1].clone()

    batch = dataclasses.replace(
        attention,
        cache_seqlens_int32=own(attention.cache_seqlens_int32),
        cu_seqlens_q=sample.spans[0],
        cu_seqlens_k=sample.spans[1],
        page_table_1=own(attention.page_table_1),
        real_page_table=own(attention.real_page_table),
        dsa_extend_seq_lens_list=[sample.rows.shape[0]],
        dsa_seqlens_expanded=sample.lengths,
        seq_lens_sum=sample.seen,
        topk_indices_offset=None if offsets is None else offsets[sample.rows],
        indexer_k_start_end=(zeros, sample.lengths),
        indexer_seq_lens=own(attention.indexer_seq_lens),
        indexer_seq_lens_cpu=own(attention.indexer_seq_lens_cpu),
        token_to_batch_idx=zeros,
    )
    return dataclasses.replace(metadata, attn_metadata=batch)


def check_guard() -> None:
    """RuntimeError where this SGLang does not say which ranks share a batch: asked as a model is built, not in use."""
    from sglang.srt.distributed import parallel_state

    if not hasattr(parallel_state, "get_attn_tp_group"):
        raise RuntimeError("sglang-ext: guard_overlap needs SGLang's get_attn_tp_group, which this version lacks")


def agree_among_attention_ranks(fallen: list[Key]) -> list[Key]:
    """What the first rank of the attention tensor-parallel group has found; all of them call this at the same batch."""
    group = attention_group()
    return fallen if group is None else agree_in(group.cpu_group, group.ranks[0], fallen)
