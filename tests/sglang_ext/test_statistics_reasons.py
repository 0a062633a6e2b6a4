"""Where block statistics cannot be, decode says why and SGLang's own indexer serves; what they cost is counted."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")
from sglang.srt.mem_cache import index_key_cache
from sglang.srt.model_executor import pool_configurator

from sglang_ext import sglang_statistics, statistics
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import Recorder
from tests.sglang_ext.served_pool import Request, Server, make_pool
from tests.support.stage_calls import log_lines

SETTINGS = {"mode": "native", "decode_mode": "hisa", "block_size": 64, "top_blocks": 33}


@pytest.fixture(scope="module")
def installed() -> Iterator[tuple[Stage, Recorder]]:
    stage = Stage(Settings(backend="reference"), {})
    with sut.hooked(stage) as native:
        yield stage, native


@pytest.fixture
def stage(installed) -> Stage:
    sut.use(installed[0], **SETTINGS)
    return installed[0]


def decoded(stage: Stage, pool: object) -> set[tuple[str, str]]:
    """(mode, reason) of a decode step over the pool."""
    server, request = Server(pool), Request()
    server.extend([(request, 64)])
    server.decode([request])
    return {(c["mode"], c["reason"]) for c in stage.counters.snapshot()["calls"] if c["phase"] == "decode"}


# Refusals


class OtherCache(index_key_cache.IndexKeyCache):
    """A cache of an SGLang that the plugin has not seen."""


class _PageInterleaveIndexKeyCache(index_key_cache.IndexKeyCache):
    """Named as the one of SGLang's key-value sharding."""


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"), [(OtherCache, "no_statistics"), (_PageInterleaveIndexKeyCache, "kv_shard")]
)
def test_other_caches(stage, monkeypatch, caplog, kind, reason, strict):
    sut.use(stage, **SETTINGS, strict=strict)
    monkeypatch.setattr(
        "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool._create_index_key_cache",
        lambda pool: kind(pool, pool.index_buf_size),
    )
    if strict:
        with pytest.raises(RuntimeError, match=f"strict.*decode mode 'hisa'.*{reason}"):
            make_pool(4)
        return
    pool = make_pool(4)
    assert sglang_statistics.statistics_of(pool) == reason
    assert [reason in line for line in log_lines(caplog, logging.WARNING)] == [True]
    assert decoded(stage, pool) == {("native", reason)}
    assert any(reason in sentence for sentence in stage.status()["refused"])


def test_sglangs_other_caches_are_known_by_name():
    from sglang.srt.mem_cache import dsa_cache_layer_split, page_interleave_pool

    assert page_interleave_pool._PageInterleaveIndexKeyCache.__name__ in sglang_statistics.OTHER_CACHES
    assert dsa_cache_layer_split.LayerSplitIndexKeyCache.__name__ in sglang_statistics.OTHER_CACHES


def test_hisparse_pools():
    from sglang.srt.mem_cache.hisparse_memory_pool import HiSparseDSATokenToKVPool

    pool = object.__new__(HiSparseDSATokenToKVPool)
    assert sglang_statistics._refusal(_cache_of(pool)) == "hisparse"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"index_kpool": 4}, "kpool"),
        ({"page_size": 128}, "page_size"),
        ({"page_size": 128, "index_page_size": 128}, "page_size"),
        ({"index_page_size": 32}, "page_size"),
    ],
)
def test_pools_whose_pages_are_not_pages_of_keys(changes, reason):
    pool = SimpleNamespace(**{"index_kpool": 1, "page_size": 64, "index_page_size": 64} | changes)
    assert sglang_statistics._refusal(_cache_of(pool)) == reason


def test_older_pools_name_their_page_size_otherwise():
    assert sglang_statistics._refusal(_cache_of(SimpleNamespace(page_size=64))) is None


def _cache_of(pool: object) -> index_key_cache.IndexKeyCache:
    cache = object.__new__(index_key_cache.IndexKeyCache)
    cache.pool = pool
    return cache


def test_no_memory_left(stage, monkeypatch):
    def full(*_args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(statistics, "page_mean_buffer", full)
    pool = make_pool(4)
    assert decoded(stage, pool) == {("native", "statistics_memory")}


def test_a_pool_made_before_anything_asked(stage):
    sut.use(stage, mode="native")
    pool = make_pool(4)
    sut.use(stage, **SETTINGS)
    assert decoded(stage, pool) == {("native", "no_statistics")}


@pytest.mark.parametrize("field", [{"block_size": 96}, {"decode_mode": "misa_rerank", "route_block": 32}])
def test_blocks_that_are_not_whole_pages(stage, field):
    sut.use(stage, **SETTINGS | field)
    assert decoded(stage, make_pool(4)) == {("native", "block_size")}


def test_hisa_reads_no_blocks_that_route(stage):
    sut.use(stage, **SETTINGS | {"route_block": 32})
    assert decoded(stage, make_pool(4)) == {("hisa", "configured")}


def test_modes_that_read_none_run_without(stage):
    sut.use(stage, mode="native", decode_mode="misa")
    assert decoded(stage, make_pool(4)) == {("misa", "configured")}


@pytest.mark.parametrize("strict", [False, True])
def test_a_step_that_cannot_be_followed_ends_their_use(stage, strict):
    """Statistics that missed a step are wrong, so no later step may read them."""
    sut.use(stage, **SETTINGS, strict=strict)
    server, request = Server(make_pool(8)), Request()
    server.extend([(request, 70)])
    kept = server.statistics()
    table = torch.tensor([request.pages], dtype=torch.int32)
    lengths = torch.tensor([70, 71], dtype=torch.int32)
    keys = server.pool.index_key_cache.buffer[0]
    if strict:
        with pytest.raises(RuntimeError, match="strict.*statistics_lost"):
            stage.step_means(kept, 0, keys, table, lengths)
        return
    stage.step_means(kept, 0, keys, table, lengths)
    server.decode([request])
    reasons = {(c["mode"], c["reason"]) for c in stage.counters.snapshot()["calls"] if c["phase"] == "decode"}
    assert reasons == {("native", "statistics_lost")} and not stage.wants_statistics()


@pytest.mark.parametrize(
    ("phase", "mode", "ends"),
    [("decode", "hisa", True), ("decode", "misa_rerank", True), ("decode", "misa", False), ("prefill", "hisa", False)],
)
def test_it_ends_a_server_whose_graphs_read_them(stage, phase, mode, ends):
    """A graph goes on reading whatever the host decides later."""
    sut.use(stage, **SETTINGS)
    server, request = Server(make_pool(8)), Request()
    server.extend([(request, 70)])
    stage.counters.count_capture(phase, mode, rows=1)
    table, lengths = torch.tensor([request.pages], dtype=torch.int32), torch.tensor([70, 71], dtype=torch.int32)
    step = functools.partial(
        stage.step_means, server.statistics(), 0, server.pool.index_key_cache.buffer[0], table, lengths
    )
    if ends:
        with pytest.raises(RuntimeError, match="statistics_lost.*1 selections in captured CUDA graphs read them"):
            step()
    else:
        step()


# Memory accounting


@pytest.fixture
def sizes(stage, monkeypatch):
    """SGLang's own sizing, called as it calls it: bytes per token of so many indexer layers."""
    monkeypatch.setattr(pool_configurator, "get_dsa_index_head_dim", lambda config: config.index_head_dim)
    monkeypatch.setattr(pool_configurator, "get_memory", lambda: SimpleNamespace(enable_hisparse=False))
    monkeypatch.setattr(
        "sglang.srt.mem_cache.kv_cache_configurator._should_elide_dsa_index_k", lambda is_draft_worker: False
    )
    configurator = object.__new__(pool_configurator.DefaultPoolConfigurator)

    def size(layers: int, hisparse: bool = False, **config: int) -> int:
        kvc = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(index_head_dim=128, **config)),
            server_args=SimpleNamespace(enable_hisparse=hisparse),
            is_draft_worker=False,
        )
        return configurator._compute_dsa_indexer_cell_size(kvc=kvc, num_layers=layers, allocate_all_layers=True)

    return size


def test_their_bytes_are_counted_where_sglang_sizes_its_pools(stage, sizes):
    sut.use(stage, mode="native")
    assert sizes(61) == 61 * 132
    sut.use(stage, **SETTINGS)
    assert sizes(61) == 61 * (132 + 4) and sizes(1) == 136 and sizes(0) == 0
    # what a page costs is what is allocated: 256 bytes for 64 tokens
    pool = make_pool(100, (False, True, False))
    tokens = 64 * len(pool.index_key_cache.buffer[0])
    assert sglang_statistics.statistics_of(pool).status()["bytes"] == tokens * (sizes(2) - 2 * 132)


@pytest.mark.parametrize("mode", ["misa_rerank", "hisa"])
def test_a_mode_of_prefill_takes_no_memory_for_decode(stage, sizes, mode):
    sut.use(stage, mode=mode, decode_mode=None, strict=True)
    assert sizes(61) == 61 * 132
    pool = make_pool(4)
    assert sglang_statistics.statistics_of(pool) is None
    assert decoded(stage, pool) == {("native", "auto_decode_native")} and stage.status()["refused"] == []


def test_nothing_is_counted_where_nothing_will_be_allocated(stage, sizes):
    assert sizes(61, hisparse=True) == 61 * 132
    assert sizes(61, index_kpool=4) == 61 * 33


def test_they_are_released_with_the_keys_and_what_is_counted_is_not(stage, monkeypatch):
    """SGLang can give the pool's memory back for a while (release_memory_occupation)."""
    pool, log = make_pool(4), []

    @contextlib.contextmanager
    def region(kind: str) -> Iterator[None]:
        log.append(f"enter {kind}")
        yield
        log.append("leave")

    pool.memory_saver_adapter = SimpleNamespace(region=region)
    make, count = statistics.page_mean_buffer, stage.counters.prepare_integrity
    monkeypatch.setattr(statistics, "page_mean_buffer", lambda *args: log.append("means") or make(*args))
    monkeypatch.setattr(stage.counters, "prepare_integrity", lambda device: log.append("counters") or count(device))
    index_key_cache.IndexKeyCache(pool, 128)
    assert log == ["enter kv_cache", "leave", "counters", "enter kv_cache", "means", "leave"]


# On a stream of their own


def test_native_decode_runs_beside_the_update(monkeypatch):
    """The side stream waits for what came before and runs the update; the main stream waits for it at the end."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(statistics, "_side_stream", lambda device: Stream("side"))
    work = lambda: log.append("work") or 5  # noqa: E731
    assert statistics.beside(torch.device("cuda"), lambda: log.append("update"), work) == 5
    assert log == ["side waits for main", "on side", "update", "back", "work", "main waits for side"]
    log.clear()
    assert statistics.beside(torch.device("cpu"), lambda: log.append("update"), work) == 5
    assert log == ["update", "work"]
