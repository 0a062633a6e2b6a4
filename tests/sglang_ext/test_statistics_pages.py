"""Stored block statistics follow pages that are given back, reused, moved or filled from elsewhere in SGLang's pool."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")
from sglang.srt.disaggregation.decode_schedule_batch_mixin import ScheduleBatchDisaggregationDecodeMixin

from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.served_pool import Request, Server, make_pool

SETTINGS = {"mode": "native", "decode_mode": "hisa", "block_size": 64, "top_blocks": 33, "check_integrity": True}


@pytest.fixture(scope="module")
def installed() -> Iterator[Stage]:
    stage = Stage(Settings(backend="reference"), {})
    with sut.hooked(stage):
        yield stage


@pytest.fixture
def stage(installed) -> Stage:
    sut.use(installed, **SETTINGS)
    return installed


@pytest.fixture
def server(stage) -> Server:
    """Two layers with index keys around one without, and a target's layer ids."""
    return Server(make_pool(40, (False, True, False), start_layer=3))


def integrity(stage: Stage) -> tuple[int, int]:
    snapshot = stage.counters.snapshot()
    return snapshot["integrity_checked"], snapshot["integrity_mismatches"]


# Pages that go and come


def test_reuse_after_eviction_with_other_content(stage, server):
    gone, stays = Request(), Request()
    server.extend([(gone, 256), (stays, 64)])
    pages = set(gone.pages)
    server.release(gone)
    heir = Request()
    server.extend([(heir, 30)])
    server.decode([heir])
    for _ in range(200):
        server.decode([heir, stays])
    assert len(pages & set(heir.pages)) > 1, "the test is about reused pages"
    assert server.wrong(heir, heir.length) == server.wrong(stays, stays.length) == []
    assert integrity(stage)[1] == 0


def test_retraction_prefills_again_elsewhere(stage, server):
    request, rival = Request(), Request()
    server.extend([(request, 100)])
    for _ in range(40):
        server.decode([request])
    server.release(request, keep=1)  # what the radix cache holds of it
    server.extend([(rival, 150)])
    server.extend([(request, 77)])
    assert set(rival.pages).isdisjoint(request.pages)
    for _ in range(70):
        server.decode([request, rival])
    assert server.wrong(request, request.length) == server.wrong(rival, rival.length) == []
    assert integrity(stage)[1] == 0


def test_a_random_server(stage):
    """Hundreds of forwards of everything at once over a small pool."""
    draws, server = random.Random(3), Server(make_pool(24, (False, False)))
    live: list[Request] = []
    kinds: set[str] = set()
    for _ in range(250):
        kind = draws.choice(["extend", "short", "decode", "decode", "verify", "go", "retract", "hit"])
        kinds.add(kind)
        if kind in ("extend", "short", "hit") and len(server.free) > 8:
            shared = draws.choice(live) if kind == "hit" and live else None
            whole = 0 if shared is None else shared.length // 64
            request = Request([] if shared is None else shared.pages[:whole], 64 * whole)
            # a page of a shared prefix is no one's to give back: in this small world it is copied
            for place in range(whole):
                page = server.free.pop() if server.free else None
                if page is None:
                    break
                for keys in server.pool.index_key_cache.buffer:
                    keys[page] = keys[request.pages[place]]
                request.pages[place] = page
            else:
                live.append(request)
                server.extend([(request, draws.randint(1, 150))], short=kind == "short")
        elif kind == "go" and live:
            server.release(live.pop(draws.randrange(len(live))))
        elif kind == "retract" and live:
            request = live[draws.randrange(len(live))]
            tokens = request.length
            server.release(request)
            server.extend([(request, tokens)])
        elif kind in ("decode", "verify") and live and len(server.free) > len(live):
            if kind == "decode":
                server.decode(live)
            else:
                server.verify(live, 4)
                for request in live:
                    request.length += draws.randint(1, 4)
        for request in live:
            assert server.wrong(request, request.length) == [], kind
    assert len(kinds) == 7 and integrity(stage)[0] > 1000


# Keys that no extend follows


def test_prefilled_elsewhere(stage, server, monkeypatch):
    """PD disaggregation: pages arrive over the network, for the target and the draft model alike."""
    draft = Server(make_pool(40), seed=4)
    first, second = Request(), Request()
    for one, length in ((first, 200), (second, 63)):
        server.store(one, 0, length)
        draft.store(Request(one.pages), 0, length)
        one.length = length
    assert server.wrong(first, 200) and draft.wrong(first, 200)
    slots = torch.full((8, 300), 12345, dtype=torch.int32)
    for row, one in ((5, first), (2, second)):
        slots[row, : one.length] = torch.tensor([one.pages[p // 64] * 64 + p % 64 for p in range(one.length)])
    batch: Any = SimpleNamespace(
        reqs=[],
        tree_cache=None,
        device="cpu",
        seq_lens=torch.tensor([200, 63]),
        seq_lens_cpu=torch.tensor([200, 63]),
        req_pool_indices=torch.tensor([5, 2]),
        req_to_token_pool=SimpleNamespace(req_to_token=slots),
        spec_algorithm=SimpleNamespace(build_disagg_draft_input=lambda *_: "drafts"),
    )
    ScheduleBatchDisaggregationDecodeMixin.process_prebuilt(batch, None)
    assert batch.spec_info == "drafts", "SGLang's own method has run"
    assert server.wrong(first, 200) == draft.wrong(first, 200) == []
    server.decode([first, second])
    assert server.wrong(second, 64) == [] and integrity(stage)[1] == 0


def test_a_restored_request(stage, server):
    """A retracted request of a decode server comes back from the host into other pages."""
    request = Request()
    server.extend([(request, 200)])
    cache, slots = server.pool.index_key_cache, torch.tensor([page * 64 for page in request.pages])
    indices = (slots[:, None] + torch.arange(64)).view(-1)[:200]
    saved = [[keys[indices[::64] // 64].clone()] if len(keys) else [] for keys in cache.buffer]
    kept = list(request.pages)
    server.release(request)
    request.length = 200
    server.free = [page for page in server.free if page not in kept] + kept[:1]
    server.reserve(request, 200)
    indices = torch.tensor([request.pages[p // 64] * 64 + p % 64 for p in range(200)])
    restored = server.pool
    restored.cpu_offloading_chunk_size = 8192
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        cache.load_cpu_copy(saved, indices)
    assert request.pages != kept and server.wrong(request, 200) == []


def test_moved_keys(stage, server):
    source, target = Request(), Request()
    server.extend([(source, 128)])
    server.extend([(target, 70)])
    cache = server.pool.index_key_cache
    cache.move(
        torch.tensor([target.pages[0] * 64 + 3, target.pages[1] * 64]),
        torch.tensor([source.pages[0] * 64 + 9, source.pages[1] * 64 + 1]),
    )
    assert server.wrong(target, 70) == [] and server.wrong(source, 128) == []
    cache.move(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
