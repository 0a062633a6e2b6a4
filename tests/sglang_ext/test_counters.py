"""The counters of /server_info: what is counted under which key, and that all of it can be sent."""

import json
import logging
import threading

import pytest
import torch

from indexer_kernels import MODES
from sglang_ext.counters import Counters
from tests.support.model_building import model_building

CPU = torch.device("cpu")


def test_empty():
    empty = {"forwards": [], "calls": [], "captured": [], "device_runs": {}}
    assert Counters().snapshot() == empty | {
        "integrity_checked": 0,
        "integrity_mismatches": 0,
        "traces_written": 0,
        "traces_skipped": {},
        "reserved_mib": 0,
        "allocated_mib": 0,
    }


def test_what_torch_holds_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 << 30)
    memory = Counters().snapshot()
    assert (memory["reserved_mib"], memory["allocated_mib"]) == (3072, 2048)


def test_integrity_adds_up_in_one_place():
    """Graphs are captured over the memory, so it must not be replaced."""
    counters = Counters()
    memory = counters.prepare_integrity(CPU)
    for pages, mismatches in ((5, 0), (1 << 33, 2)):
        counters.count_integrity(torch.tensor(pages), torch.tensor(mismatches, dtype=torch.int32))
    assert counters.prepare_integrity(CPU) is memory
    snapshot = counters.snapshot()
    assert (snapshot["integrity_checked"], snapshot["integrity_mismatches"]) == (5 + (1 << 33), 2)


def test_traces():
    counters = Counters()
    counters.count_trace()
    assert [counters.skip_trace(why) for why in ("a", "b", "a")] == [True, True, False]
    snapshot = counters.snapshot()
    assert snapshot["traces_written"] == 1 and snapshot["traces_skipped"] == {"a": 2, "b": 1}


def test_calls_and_rows_add_up_per_phase_mode_and_reason():
    counters = Counters()
    for phase, mode, reason, rows in [
        ("prefill", "hisa", "configured", 5),
        ("prefill", "hisa", "configured", 7),
        ("prefill", "native", "native_layer", 5),
        ("prefill", "native", "too_long", 1),
        ("decode", "hisa", "configured", 0),
    ]:
        counters.count(phase, mode, reason, rows)
    assert counters.snapshot()["calls"] == [
        {"phase": "decode", "mode": "hisa", "reason": "configured", "calls": 1, "rows": 0},
        {"phase": "prefill", "mode": "hisa", "reason": "configured", "calls": 2, "rows": 12},
        {"phase": "prefill", "mode": "native", "reason": "native_layer", "calls": 1, "rows": 5},
        {"phase": "prefill", "mode": "native", "reason": "too_long", "calls": 1, "rows": 1},
    ]


def test_forwards():
    counters = Counters()
    for reason in ("configured", "configured", "too_long"):
        counters.count_forward("prefill", "native" if reason == "too_long" else "hisa", reason)
    assert counters.snapshot()["forwards"] == [
        {"phase": "prefill", "mode": "hisa", "reason": "configured", "forwards": 2},
        {"phase": "prefill", "mode": "native", "reason": "too_long", "forwards": 1},
    ]
    assert counters.snapshot()["calls"] == []


def test_only_the_first_of_a_kind_is_logged(caplog):
    counters = Counters()
    with caplog.at_level(logging.INFO, "sglang_ext"):
        for _ in range(3):
            counters.count("prefill", "hisa", "configured", 5)
        counters.count("prefill", "native", "too_long", 5)
    assert [record.getMessage() for record in caplog.records] == [
        "prefill runs hisa: configured",
        "prefill runs native: too_long",
    ]


def test_captures_are_kept_per_size():
    counters = Counters()
    for rows in (8, 8, 16):
        counters.count_capture("decode", "misa", rows)
    assert counters.snapshot()["captured"] == [
        {"phase": "decode", "mode": "misa", "rows": 8, "calls": 2},
        {"phase": "decode", "mode": "misa", "rows": 16, "calls": 1},
    ]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mode", MODES)
def test_device_runs(phase, mode):
    counters = Counters()
    counters.step_device(phase, mode, CPU)
    counters.step_device(phase, mode, CPU)
    assert counters.snapshot()["device_runs"] == {f"{phase}/{mode}": 2}


def test_device_memory_stays_where_a_captured_graph_wrote_it():
    counters = Counters()
    memory = counters.prepare_device(CPU)
    counters.step_device("decode", "hisa", CPU)
    assert counters.prepare_device(CPU) is memory
    assert int(memory.sum()) == 1


def test_a_snapshot_is_a_copy_and_can_be_sent():
    counters = Counters()
    counters.count("prefill", "hisa", "configured", 5)
    counters.count_capture("decode", "misa", 8)
    counters.step_device("prefill", "hisa", CPU)
    first = counters.snapshot()
    assert json.loads(json.dumps(first)) == first
    counters.count("prefill", "hisa", "configured", 5)
    assert first["calls"][0]["calls"] == 1


def test_counting_from_threads_loses_nothing():
    counters = Counters()

    def work() -> None:
        for _ in range(500):
            counters.count("prefill", "hisa", "configured", 2)
            counters.count_capture("decode", "misa", 8)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = counters.snapshot()
    assert snapshot["calls"][0]["calls"] == 4000 and snapshot["calls"][0]["rows"] == 8000
    assert snapshot["captured"][0]["calls"] == 4000


def test_prepared_while_a_model_is_built():
    """A server died at its start: SGLang's default device gave the host's copies GPU memory, which cannot be pinned."""
    counters, cpu = Counters(), torch.device("cpu")
    with model_building():
        counters.prepare_device(cpu)
        counters.prepare_integrity(cpu)
    counters.step_device("decode", "hisa", cpu)
    counters.count_integrity(torch.tensor(5), torch.tensor(1))
    for wait in (True, False, False):
        seen = counters.snapshot(wait)
    assert seen["device_runs"] == {"decode/hisa": 1}
    assert (seen["integrity_checked"], seen["integrity_mismatches"]) == (5, 1)
