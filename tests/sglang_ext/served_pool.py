"""SGLang's real index-key pool on the CPU, with requests that come, grow, go and share pages as a server's do."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DSAMetadata
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from indexer_kernels.page_layout import KEY_BYTES, unpack_pages
from sglang_ext.sglang_statistics import statistics_of
from sglang_ext.statistics import PoolStatistics
from tests.sglang_ext.patched_indexer import indexer, serving

HEADS = 4


def make_pool(num_pages: int, skipped: Sequence[bool] = (False,), start_layer: int = 0, **changes: Any) -> Any:
    """SGLang's pool; page 0 is its padding page."""
    tokens = num_pages * 64
    arguments = {
        "size": tokens,
        "page_size": 64,
        "kv_lora_rank": 8,
        "dtype": torch.bfloat16,
        "qk_rope_head_dim": 8,
        "layer_num": len(skipped),
        "device": "cpu",
        "index_head_dim": 128,
        "enable_memory_saver": False,
        "kv_cache_dim": 16,
        "start_layer": start_layer,
        "end_layer": start_layer + len(skipped),
        "index_buf_size": tokens,
        "skip_topk_layers": list(skipped),
    }
    return DSATokenToKVPool(**arguments | changes)


@dataclasses.dataclass(eq=False)
class Request:
    """pages: its physical pages in order; length: tokens whose keys are its own for good."""

    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0


class Server:
    """A pool and what SGLang does with it: allocation of pages, stores of keys, calls of the (hooked) indexer."""

    def __init__(self, pool: Any, seed: int = 0) -> None:
        self.pool, self.unfused = pool, True
        self.backend: dict[str, Any] = {}  # attributes of SGLang's attention backend
        self.free = list(range(pool.index_key_cache.buffer[0].shape[0] - 1, 0, -1))
        self.random = torch.Generator().manual_seed(seed)
        self.layers = [pool.start_layer + i for i, keys in enumerate(pool.index_key_cache.buffer) if len(keys)]

    def statistics(self) -> PoolStatistics:
        kept = statistics_of(self.pool)
        assert isinstance(kept, PoolStatistics)
        return kept

    def reserve(self, request: Request, length: int) -> None:
        """Pages for so many tokens: the last freed first, so that they still hold what was there before."""
        while len(request.pages) * 64 < length:
            request.pages.append(self.free.pop())

    def release(self, request: Request, keep: int = 0) -> None:
        """Give back its pages but the first `keep`."""
        self.free += request.pages[keep:]
        del request.pages[keep:]
        request.length = min(request.length, 64 * keep)

    def store(self, request: Request, start: int, stop: int) -> None:
        """New random keys at positions start .. stop - 1, in every layer."""
        self.reserve(request, stop)
        for layer in self.layers:
            buffer = self.pool.index_key_cache.buffer[layer - self.pool.start_layer]
            for position in range(start, stop):
                page, at = request.pages[position // 64], position % 64
                key = torch.randn(128, generator=self.random) + torch.randn((), generator=self.random)
                scale = torch.rand(1, generator=self.random) + 0.5
                buffer[page, at * 128 : at * 128 + 128] = key.to(torch.float8_e4m3fn).view(torch.uint8)
                buffer[page, KEY_BYTES + at * 4 : KEY_BYTES + at * 4 + 4] = scale.view(torch.uint8)

    def extend(
        self, brought: Sequence[tuple[Request, int]], short: bool = False, mode: ForwardMode = ForwardMode.EXTEND
    ) -> None:
        """A forward that brings so many tokens of each request; short: one that skips the indexer."""
        for request, count in brought:
            self.store(request, request.length, request.length + count)
            request.length += count
        counts = [count for _, count in brought]
        lengths = [request.length for request, _ in brought]
        seen = [length - count + i + 1 for length, count in zip(lengths, counts) for i in range(count)]
        found = self.metadata([request for request, _ in brought], lengths, counts, seen)
        for layer in self.layers:
            with self.serving():
                fields = SimpleNamespace(forward_mode=mode)
                if short:
                    Indexer._forward_cuda_k_only(indexer(), None, None, fields, layer, None, found, False)
                else:
                    Indexer._get_topk_ragged(indexer(), False, fields, layer, *self.queries(len(seen)), found, None)

    def idle(self, rows: int) -> list[torch.Tensor]:
        """The forward of a data-parallel rank without requests in a graph: rows of one token on the padding page."""
        found = self.metadata([Request([0])] * rows, [1] * rows, [1] * rows, [1] * rows)
        return self.paged(found, ForwardMode.IDLE, rows)

    def decode(self, requests: Sequence[Request], padding: int = 0) -> list[torch.Tensor]:
        """One token more for each request, and rows that only pad a graph's batch; every layer's selection."""
        for request in requests:
            self.store(request, request.length, request.length + 1)
            request.length += 1
        lengths = [request.length for request in requests] + [1] * padding
        found = self.metadata([*requests, *[Request([0])] * padding], lengths, [1] * len(lengths), lengths)
        return self.paged(found, ForwardMode.DECODE, len(lengths))

    def verify(
        self, requests: Sequence[Request], drafts: int, mode: ForwardMode = ForwardMode.TARGET_VERIFY
    ) -> list[torch.Tensor]:
        """Keys of so many draft tokens for each request, of which none is accepted yet; every layer's selection."""
        for request in requests:
            self.store(request, request.length, request.length + drafts)
        seen = [request.length + i + 1 for request in requests for i in range(drafts)]
        rows = [request for request in requests for _ in range(drafts)]
        last = [request.length + drafts for request in requests]
        found = self.metadata(rows, last, [drafts] * len(requests), seen)
        return self.paged(found, mode, len(seen))

    def paged(self, found: DSAIndexerMetadata, mode: ForwardMode, rows: int) -> list[torch.Tensor]:
        with self.serving():
            fields = SimpleNamespace(forward_mode=mode)
            return [
                Indexer._get_topk_paged(indexer(), fields, layer, *self.queries(rows, layer), found)
                for layer in self.layers
            ]

    def queries(self, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        q = torch.randn((rows, HEADS, 128), generator=random).to(torch.float8_e4m3fn)
        return q, torch.rand((rows, HEADS, 1), generator=random)

    def metadata(
        self, rows: Sequence[Request], lengths: Sequence[int], counts: Sequence[int], seen: Sequence[int]
    ) -> DSAIndexerMetadata:
        """SGLang's real metadata; table entries past a request's pages are other requests' old ones."""
        table = torch.randint(1, 5, (len(rows), 2 + max(len(row.pages) for row in rows)), generator=self.random).int()
        for row, request in enumerate(rows):
            table[row, : len(request.pages)] = torch.tensor(request.pages)
        fields = {field.name: None for field in dataclasses.fields(DSAMetadata) if field.default is dataclasses.MISSING}
        fields |= {
            "page_size": 64,
            "cache_seqlens_int32": torch.tensor(lengths, dtype=torch.int32),
            "real_page_table": table,
            "dsa_extend_seq_lens_list": list(counts),
            "dsa_seqlens_expanded": torch.tensor(seen, dtype=torch.int32),
            "indexer_seq_lens_cpu": torch.tensor(lengths),
        }
        return DSAIndexerMetadata(
            attn_metadata=DSAMetadata(**fields),
            topk_transform_method=TopkTransformMethod.PAGED,
            force_unfused_topk=self.unfused,
        )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with serving(self.pool, **self.backend):
            yield

    def wrong(self, request: Request, length: int) -> list[tuple[int, int]]:
        """(layer, position in the request) of full pages among the first `length` tokens with another mean."""
        found = []
        for layer in self.layers:
            buffer = self.pool.index_key_cache.buffer[layer - self.pool.start_layer]
            for place, page in enumerate(request.pages[: length // 64]):
                keys, scales = unpack_pages(buffer[page : page + 1], 64)
                want = (keys.float() * scales[:, None]).mean(0)
                stored = self.statistics().of_layer(layer)[page].float()
                if not torch.allclose(stored, want, rtol=1e-2, atol=1e-3):
                    found.append((layer, place))
        return found
