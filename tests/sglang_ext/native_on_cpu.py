"""SGLang's real `_get_topk_ragged` on a CPU: its own code, over stand-ins of the three kernels that need a GPU."""

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.dsa import dsa_indexer, dsa_topk_backend
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins.hook_registry import HookRegistry

from indexer_kernels.page_layout import PAGE_TOKENS, unpack_pages
from indexer_kernels.reference.scores import token_scores
from sglang_ext import sglang_hooks
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.support.inputs import Batch

HEADS = 32  # SGLang pads fewer, which fp8 on a CPU cannot
GARBAGE = 1e30  # scores outside a row's keys, which its top-k must not look at


class Numbered(torch.Tensor):
    """On a device with a number, as SGLang asserts."""

    device = property(lambda _self: torch.device("cpu", 0))  # type: ignore[assignment]


class Pool(sut.Pool):
    """Gathers keys as SGLang's pool does."""

    def get_index_k_scale_buffer(
        self, layer: int, lengths: torch.Tensor, table: torch.Tensor, total: int, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer in self.layers and len(table) == len(lengths)
        assert total == int(lengths.sum()) and longest == int(lengths.max())
        parts = []
        for pages, length in zip(table, lengths.tolist()):
            parts.append(unpack_pages(self.pages[pages[: -(-length // PAGE_TOKENS)].long()], length))
        keys, scales = (torch.cat(part) for part in zip(*parts))
        return keys.view(torch.uint8), scales.view(torch.uint8).view(-1, 4)


def logits(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    ks: Any,
    ke: Any,
    clean_logits: bool,
) -> torch.Tensor:
    """DeepGEMM's fp8_mqa_logits: what lies outside [ks, ke) is not cleaned."""
    assert not clean_logits and weights.shape == q.shape[:2] and len(ks) == len(ke) == len(q)
    columns = torch.arange(len(keys[0]))
    visible = (columns >= ks[:, None]) & (columns < ke[:, None])
    plain = (tensor.as_subclass(torch.Tensor) for tensor in (q, weights, *keys))
    return token_scores(*plain).masked_fill(~visible, GARBAGE)


def transform(
    _backend: Any,
    logits: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    topk_transform_method: TopkTransformMethod,
    attn_metadata: Any,
    cu_seqlens_q_topk: torch.Tensor | None = None,
    topk_indices_offset: torch.Tensor | None = None,
    row_starts: torch.Tensor | None = None,
    batch_idx_list: Any = None,
    force_unfused_topk: bool = False,
) -> torch.Tensor:
    """SGLang's fused kernels by their contract: a row's request is found in cu_seqlens_q, its slots in page_table_1."""
    assert batch_idx_list is None and len(logits) == len(lengths)
    chosen = dsa_topk_backend._topk_unfused(logits, lengths, topk, row_starts)
    if force_unfused_topk:
        return chosen
    if topk_transform_method is TopkTransformMethod.RAGGED:
        assert topk_indices_offset is not None and len(topk_indices_offset) == len(logits)
        return torch.where(chosen >= 0, chosen + topk_indices_offset[:, None], chosen)
    assert cu_seqlens_q_topk is not None and int(cu_seqlens_q_topk[-1]) == len(logits)
    assert len(attn_metadata.page_table_1) == len(cu_seqlens_q_topk) - 1
    request = torch.searchsorted(cu_seqlens_q_topk[1:].contiguous(), torch.arange(len(logits)).int(), right=True)
    slots = attn_metadata.page_table_1[request].gather(1, chosen.clamp_min(0).long())
    return torch.where(chosen >= 0, slots, chosen)


@contextlib.contextmanager
def real_native() -> Iterator[None]:
    """SGLang's method runs on a CPU inside."""
    method = Indexer._get_topk_ragged

    @functools.wraps(method)
    def on_cpu(indexer: Any, dual: bool, batch: Any, layer: int, q: torch.Tensor, *more: Any) -> torch.Tensor:
        return method(indexer, dual, batch, layer, q.as_subclass(Numbered), *more).as_subclass(torch.Tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Indexer, "_get_topk_ragged", on_cpu)
        patch.setattr(dsa_indexer, "resolve_fp8_mqa_logits_fn", lambda: logits)
        patch.setattr(dsa_topk_backend.DSATopKBackend, "topk_transform", transform)
        yield


@contextlib.contextmanager
def watched(stage: Stage) -> Iterator[None]:
    """The hooks of `stage` around SGLang's real methods."""
    with real_native(), sut.unpatched_sglang():
        sglang_hooks.install(stage)
        HookRegistry.apply_hooks()
        assert sglang_hooks.unapplied(stage) == []
        yield


def metadata(batch: Batch, counts: list[int], **changes: Any) -> Any:
    """As `patched_indexer.metadata`, with what SGLang's own method reads besides."""
    per_request = torch.tensor([len(keys) for keys in batch.k])
    wide = batch.page_table.long()[:, :, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=batch.page_table.device)
    wide = wide.flatten(1).clamp(-(2**31), 2**31 - 1).int()

    def starts(parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1), parts.cumsum(0)]).int()

    own = {"page_table_1": wide, "cu_seqlens_q": starts(torch.tensor(counts)), "cu_seqlens_k": starts(per_request)}
    return sut.metadata(batch, counts, **own | changes)


def prefill(
    batch: Batch, found: Any, counts: list[int], pad: int = 0, layer: int = sut.LAYER, out: Any = None, **pool: Any
) -> torch.Tensor:
    """Calls `Indexer._get_topk_ragged` as SGLang does, hooked or not."""
    lengths = [len(keys) for keys in batch.k]
    fields = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, seq_lens_cpu=torch.tensor(lengths), extend_seq_lens_cpu=counts
    )
    q, weights = sut.padded(batch.q, pad), sut.padded(batch.weights, pad).unsqueeze(-1)
    of = sut.indexer(n_heads=HEADS, logits_with_pp_recv=False)
    with sut.serving(Pool(batch.k_pages, range(8), **pool)):
        return Indexer._get_topk_ragged(of, False, fields, layer, q, weights, found, out)
