"""Stored block statistics are those of the keys after extends, decode steps and verifies, on SGLang's own classes."""

import gc
import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from indexer_kernels import select_rows
from indexer_kernels.page_means import page_mean_buffer, update_page_means
from indexer_kernels.row_plan import plan_decode
from sglang_ext import runner
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import Recorder
from tests.sglang_ext.served_pool import Request, Server, make_pool

SETTINGS = {
    "mode": "native",
    "decode_mode": "hisa",
    "block_size": 64,
    "top_blocks": 33,
    "local_tokens": 1,
    "check_integrity": True,
}


@pytest.fixture(scope="module")
def installed() -> Iterator[tuple[Stage, Recorder]]:
    stage = Stage(Settings(backend="reference"), {})
    with sut.hooked(stage) as native:
        yield stage, native


@pytest.fixture
def stage(installed) -> Stage:
    sut.use(installed[0], **SETTINGS)
    # Less than Settings allow for a model of top_k 2048, enough for the tests' TOP_K: hisa prunes from 4 pages on.
    object.__setattr__(installed[0].settings, "top_blocks", 3)
    return installed[0]


@pytest.fixture
def server(stage) -> Server:
    """Two layers with index keys around one without, and a target's layer ids."""
    return Server(make_pool(40, (False, True, False), start_layer=3))


def integrity(stage: Stage) -> tuple[int, int]:
    snapshot = stage.counters.snapshot()
    return snapshot["integrity_checked"], snapshot["integrity_mismatches"]


def counted(stage: Stage, phase: str = "decode") -> set[tuple[str, str]]:
    return {(c["mode"], c["reason"]) for c in stage.counters.snapshot()["calls"] if c["phase"] == phase}


# Memory


def test_one_buffer_per_layer_with_keys(stage, server):
    kept = server.statistics()
    assert [tuple(means.shape) for means in kept.means] == [(41, 128), (0, 128), (41, 128)]
    assert all(means.dtype == torch.bfloat16 for means in kept.means)
    assert kept.of_layer(5) is kept.means[2] and kept.layers() == [3, 5]
    assert stage.status()["statistics"][-1] == {"layers": 2, "pages": 41, "bytes": 2 * 41 * 256}


def test_a_pool_that_is_gone_is_not_kept(stage):
    gc.collect()
    before = len(stage.status()["statistics"])
    pool = make_pool(3)
    assert len(stage.status()["statistics"]) == before + 1
    del pool
    gc.collect()  # a pool and its cache know each other
    assert len(stage.status()["statistics"]) == before


@pytest.mark.parametrize("settings", [{"decode_mode": "native"}, {"decode_mode": "auto"}, {"decode_mode": "misa"}])
def test_no_memory_where_decode_reads_none(stage, settings):
    sut.use(stage, **SETTINGS | settings)
    assert not hasattr(make_pool(3).index_key_cache, "sglang_ext_statistics")


@pytest.mark.parametrize("mode", ["hisa", "misa_rerank"])
def test_memory_where_decode_reads_them(stage, mode, caplog):
    sut.use(stage, **SETTINGS | {"decode_mode": mode})
    assert Server(make_pool(3)).statistics().layers() == [0]
    assert "loses answers on some models" in caplog.text


# Extends


def test_an_extend_fills_every_full_page(stage, server):
    first, second = Request(), Request()
    server.extend([(first, 200), (second, 64)])
    assert server.wrong(first, 200) == server.wrong(second, 64) == []
    # two layers; nothing was known before, and four pages are full afterwards
    assert integrity(stage) == (2 * 4, 0)


def test_chunks_and_mixed_batches(stage, server):
    chunked, decoding = Request(), Request()
    server.extend([(decoding, 127)])
    server.extend([(chunked, 100), (decoding, 1)], mode=ForwardMode.MIXED)
    server.extend([(chunked, 100), (decoding, 1)], mode=ForwardMode.MIXED)
    assert server.wrong(chunked, 200) == server.wrong(decoding, 129) == []
    assert integrity(stage)[1] == 0


def test_a_short_extend_skips_the_indexer_but_not_the_statistics(stage, server, installed):
    request = Request()
    installed[1].calls.clear()
    server.extend([(request, 130)], short=True)
    assert len(installed[1].calls) == 2, "SGLang's own method stores the keys first"
    assert server.wrong(request, 130) == []
    # decode grows out of it: only pages it fills itself are computed anew
    for _ in range(70):
        server.decode([request])
    assert server.wrong(request, 200) == [] and integrity(stage)[1] == 0


def test_short_extends_of_older_calls_by_keyword(stage, server):
    """The prefill graphs' split op names the metadata."""
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    request = Request()
    server.store(request, 0, 64)
    request.length = 64
    found = server.metadata([request], [64], [64], list(range(1, 65)))
    with server.serving():
        for layer in server.layers:
            Indexer._forward_cuda_k_only(
                sut.indexer(),
                None,
                None,
                SimpleNamespace(forward_mode=ForwardMode.EXTEND),
                layer,
                None,
                metadata=found,
                return_indices=False,
                num_tokens=64,
            )
    assert server.wrong(request, 64) == []


def test_a_radix_hit_and_a_load_back_are_repaired(stage, server):
    """Whatever the prefix's means are when an extend begins, they are right when it ends."""
    first = Request()
    server.extend([(first, 192)])
    hit = Request(first.pages[:3], 192)
    for means in server.statistics().means:
        means.fill_(7)  # HiCache gives out pages that no extend of this process has seen
    server.extend([(hit, 1)])
    assert server.wrong(hit, 193) == []


def test_a_wrong_mean_before_an_extend_is_seen(stage):
    """A prefix's pages must have been right before: the extend repairs them, and says so."""
    stage.statistics._caches.clear()  # the first pool is the served model's
    server = Server(make_pool(20))
    request = Request()
    server.extend([(request, 192)])
    server.statistics().of_layer(0)[request.pages[1]] += 1
    before = integrity(stage)
    server.extend([(request, 10)])
    assert integrity(stage) == (before[0] + 2 * 3, before[1] + 1)
    # pages that the host's cache loads have no mean before
    server.pool.layer_transfer_counter = SimpleNamespace(wait_until=lambda layer: None)
    server.statistics().of_layer(0)[request.pages[1]] += 1
    server.extend([(request, 10)])
    assert integrity(stage)[1] == before[1] + 1 and server.wrong(request, 212) == []


def test_draft_models_have_their_own_statistics(stage, server):
    """Same pages, layer 0, other keys."""
    draft = Server(make_pool(40), seed=9)
    request = Request()
    server.extend([(request, 130)])
    copy = Request(list(request.pages))
    draft.store(copy, 0, 130)
    assert draft.wrong(copy, 130) == [(0, 0), (0, 1)]
    draft.extend([(copy, 130)])
    assert draft.wrong(copy, 130) == server.wrong(request, 130) == []


# Decode


def test_a_decode_step_computes_the_page_it_fills(stage, server):
    first, second = Request(), Request()
    server.extend([(first, 100), (second, 63)])
    for step in range(1, 66):
        server.decode([first, second], padding=step % 3)
        assert server.wrong(first, first.length) == server.wrong(second, second.length) == [], step
    assert counted(stage) == {("hisa", "configured")} and integrity(stage)[1] == 0


def test_selection_reads_the_layers_own_means(stage, server):
    request, other = Request(), Request()
    server.extend([(request, 700), (other, 300)])
    selected = server.decode([request, other])
    table = torch.zeros((2, 12), dtype=torch.int32)
    for row, one in enumerate((request, other)):
        table[row, : len(one.pages)] = torch.tensor(one.pages)
    lengths = torch.tensor([request.length, other.length], dtype=torch.int32)
    for got, layer in zip(selected, server.layers):
        keys = server.pool.index_key_cache.buffer[layer - 3]
        means = page_mean_buffer(len(keys), "cpu")
        update_page_means(keys, table, lengths, means)
        q, weights = server.queries(2, layer)
        params = stage.settings.params(sut.TOP_K)
        plan = plan_decode(lengths, 12)
        want = select_rows("hisa", q, weights[..., 0], keys, table, plan, params, backend="reference", page_means=means)
        without = select_rows("native", q, weights[..., 0], keys, table, plan, params, backend="reference")
        assert torch.equal(got, want) and not torch.equal(got, without)


def test_slots_where_sglang_fuses(stage, server):
    request, twin = Request(), Server(make_pool(40, (False, True, False), start_layer=3))
    server.extend([(request, 700)])
    twin.extend([(same := Request(), 700)])
    twin.unfused = False
    for positions, slots in zip(server.decode([request], padding=2), twin.decode([same], padding=2)):
        want = [same.pages[p // 64] * 64 + p % 64 for p in positions[0].tolist()]
        assert sorted(slots[0].tolist()) == sorted(want) and len(set(want)) == sut.TOP_K
        assert slots[1:].tolist() == [[0] + [-1] * (sut.TOP_K - 1)] * 2, (
            "padding rows see the padding page's first token"
        )


def test_idle_ranks_touch_nothing(stage, server):
    request = Request()
    server.extend([(request, 130)])
    before = [means.clone() for means in server.statistics().means]
    for rows in server.idle(3):
        assert rows[:, 0].tolist() == [0, 0, 0] and (rows[:, 1:] == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(before, server.statistics().means))
    assert integrity(stage)[1] == 0


def test_a_stale_mean_is_found_and_changes_what_is_selected(stage, server):
    request = Request()
    server.extend([(request, 700)])
    first, _ = server.decode([request])
    checked, mismatches = integrity(stage)
    assert mismatches == 0
    server.statistics().of_layer(3)[request.pages[4]] *= -40
    second, _ = server.decode([request])
    assert integrity(stage) == (checked + 2 * 10, 1)
    assert not torch.equal(first.sort().values, second.sort().values)


def test_nothing_is_compared_unless_asked(stage, server):
    sut.use(stage, **SETTINGS | {"check_integrity": False})
    request = Request()
    server.extend([(request, 130)])
    server.decode([request])
    assert integrity(stage) == (0, 0) and server.wrong(request, 131) == []


def test_native_decode_keeps_them_right_too(stage, server, installed):
    """A batch below break-even runs native; the next one may not."""
    request = Request()
    server.extend([(request, 63)])
    installed[1].calls.clear()
    sut.use(stage, **SETTINGS | {"native_layers": (3, 4, 5)})
    for _ in range(2):
        server.decode([request])
    assert counted(stage) == {("native", "native_layer")} and len(installed[1].calls) == 4
    assert server.wrong(request, 65) == []


# Speculation


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("drafts", [2, 5, 65, 70])
def test_rejected_drafts(stage, server, drafts, checked):
    """Pages that filled with drafts and were written over, at any speed of acceptance."""
    stage_draws = random.Random(drafts)
    object.__setattr__(stage.settings, "check_integrity", checked)
    server.backend["speculative_num_draft_tokens"] = drafts
    request, other = Request(), Request()
    server.extend([(request, 62), (other, 127)])
    for step in range(40 if drafts < 64 else 4):
        selected = server.verify([request, other], drafts)
        assert [len(rows) for rows in selected] == [2 * drafts] * 2
        for one in (request, other):
            assert server.wrong(one, one.length + drafts) == [], f"step {step}: what its longest row reads"
            one.length += stage_draws.choice([1, 1, drafts, stage_draws.randint(1, drafts)])
    assert request.length > 64 and other.length > 128, "pages were filled"
    assert integrity(stage)[1] == 0 and counted(stage) == {("hisa", "configured")}


@pytest.mark.parametrize(
    ("checked", "drafts", "backend", "together"),
    [(False, 0, None, True), (True, 0, None, False), (False, 4, 4, True), (True, 4, 4, False)]
    + [(False, 4, None, False), (False, 66, 66, False), (False, 65, 65, True)],
)
def test_the_update_is_part_of_the_selection(stage, server, monkeypatch, checked, drafts, backend, together):
    """Unless it must be compared first, or rows of a request may lie further apart than the kernels allow."""
    object.__setattr__(stage.settings, "check_integrity", checked)
    server.backend |= {} if backend is None else {"speculative_num_draft_tokens": backend}
    asked: list[bool] = []
    select = runner.select_rows

    def spy(*args: object, update_means: bool, **kwargs: object) -> torch.Tensor:
        asked.append(update_means)
        return select(*args, update_means=update_means, **kwargs)

    monkeypatch.setattr(runner, "select_rows", spy)
    request = Request()
    server.extend([(request, 62)])
    if drafts:
        server.verify([request], drafts)
    else:
        server.decode([request])
    assert asked == [together] * 2


def test_draft_steps_and_draft_extends(stage):
    """A draft model writes keys one step at a time, then again for all drafts once they are judged."""
    draft, draws = Server(make_pool(30)), random.Random(1)
    request = Request()
    draft.extend([(request, 60)])
    for _ in range(60):
        accepted = request.length
        for _ in range(3):
            draft.decode([request])
            assert draft.wrong(request, request.length) == []
        request.length = accepted
        draft.verify([request], 4, ForwardMode.DRAFT_EXTEND_V2)
        assert draft.wrong(request, request.length + 4) == []
        request.length += draws.randint(1, 4)
    assert integrity(stage)[1] == 0
