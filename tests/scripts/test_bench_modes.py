"""The benchmark's loop against stand-ins for the server and for SGLang's tools: what is measured, refused, resumed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import bench_modes
import bench_workloads
import openai_client
import server_process
from tests.scripts.bench_server import BenchServer

ROOT = Path(__file__).resolve().parents[2]
STUB = (sys.executable, "-m", "tests.scripts.bench_server")
TOOL = dict.fromkeys(bench_workloads.MODULES, "tests.scripts.bench_tool")
SMALL = ("--contexts", "64", "--concurrency", "1", "--shared", "0", "--new-tokens", "2", "--prompts-per-client", "2")
ONE = (*SMALL, "--tools", "serving", "--repeats", "1")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench_modes, "run_record", lambda: RECORD)  # without git and nvidia-smi
    monkeypatch.setattr(server_process, "SERVE", STUB)
    monkeypatch.setattr(bench_workloads, "MODULES", TOOL)
    monkeypatch.setattr(openai_client, "FIRST_PAUSE_S", 0.001)


RECORD = {
    "commit": "c0ffee",
    "gpu": "H200",
    "command": "python bench_modes.py",
    "time": "t",
    "packages": {"torch": "2"},
}


def bench(out: Path, *flags: str) -> int:
    return bench_modes.main(["--out", str(out), *flags])


def launched(out: Path, *flags: str, server: tuple[str, ...] = ()) -> int:
    """With servers of its own on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return bench(out, "--model", "some/model", "--port", port, *flags, "--", *server)


def sampled(out: Path) -> list[tuple[str, str]]:
    entries = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [(entry["mode"], entry["key"]) for entry in entries if "key" in entry]


def pids_of(out: Path) -> list[int]:
    return [int(re.search(r" as (\d+)", log.read_text())[1]) for log in (out / "logs").glob("server_*.log")]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_per_mode(tmp_path, capsys):
    flags = (*SMALL, "--modes", "misa", "--repeats", "2", "--set", "active_heads=4")
    assert launched(tmp_path, *flags, server=("--tp-size", "8")) == 0
    keys = [f"{tool}/64/1/0/{turn}" for tool in ("serving", "one_batch") for turn in (0, 1)]
    assert sampled(tmp_path) == [(mode, key) for mode in ("native", "misa") for key in keys]
    logs = {mode: (tmp_path / "logs" / f"server_{mode}.log").read_text() for mode in ("native", "misa")}
    assert "'--tp-size', '8'" in logs["native"] and "active_heads" not in logs["native"]
    assert "{'prefill_mode': 'misa', 'decode_mode': 'native', 'active_heads': '4'}" in logs["misa"]
    assert "'--host=127.0.0.1'" in logs["misa"] and "mem-fraction" not in logs["misa"], "no argument that nobody gave"
    assert len(pids_of(tmp_path)) == 2 and not any(map(alive, pids_of(tmp_path)))
    record = json.loads((tmp_path / "bench.json").read_text())
    assert "not interleaved" in record["how"] and record["modes"] == ["native", "misa"]
    assert [len(result["values"]["output_throughput"]) for result in record["results"]] == [2] * 4
    assert record["servers"]["misa"]["server"] == {"tp_size": 8}, "and no key of the server"
    assert "a secret" not in (tmp_path / "bench.json").read_text() + (tmp_path / "bench.html").read_text()
    assert "serving: time to first token, median, ms" in capsys.readouterr().out


def test_one_server_is_switched_in_rotation(tmp_path):
    with BenchServer(pause_s=0) as server:
        flags = ("--url", server.url, *SMALL, "--tools", "one_batch", "--modes", "misa", "hisa", "--repeats", "3")
        assert bench(tmp_path, *flags) == 0
    asked = [mode for mode, _, _ in server.prompts]
    assert asked == ["native", "misa", "hisa", "misa", "hisa", "native", "hisa", "native", "misa"]
    seeds = [batch[0][0] for _, batch, _ in server.prompts]
    assert seeds == [0] * 3 + [1] * 3 + [2] * 3, "all modes get the same prompts, every repeat others"
    for place, call in enumerate(server.calls):
        if call.startswith("switch"):
            assert "/flush_cache" in server.calls[place : server.calls.index("/generate", place)]
    record = json.loads((tmp_path / "bench.json").read_text())
    assert "took turns" in record["how"] and "on one server" in record["how"]


def test_a_server_that_cannot_switch_is_refused(tmp_path, capsys):
    with BenchServer(switchable=False) as server:
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa") == 2
    assert "SGLANG_EXT_RUNTIME_SWITCH=1" in capsys.readouterr().out
    assert {mode for mode, _ in sampled(tmp_path)} == {"native"}


def test_a_url_per_mode_must_run_that_mode(tmp_path, capsys):
    with BenchServer(plugin=False) as plain, BenchServer("hisa") as hisa:
        urls = ("--url", f"native={plain.url}", f"hisa={hisa.url}")
        assert bench(tmp_path / "right", *urls, *ONE) == 0
        assert sampled(tmp_path / "right") == [("native", "serving/64/1/0/0"), ("hisa", "serving/64/1/0/0")]
        assert len(plain.prompts) == len(hisa.prompts) == 2
        assert bench(tmp_path / "wrong", "--url", f"native={plain.url}", f"misa={hisa.url}", *ONE) == 2
        assert "that server's prefill mode is hisa" in capsys.readouterr().out
        assert len(hisa.prompts) == 2, "refused before anything is measured"


def test_a_mode_that_did_not_run_fails_and_is_not_recorded(tmp_path, capsys):
    with BenchServer(stuck=("hisa",), pause_s=0) as server:
        for _ in range(2):
            assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa", "hisa", "auto") == 1
            assert "mode hisa did not run: device_runs of prefill/hisa stayed at 0" in capsys.readouterr().out
            assert [mode for mode, _ in sampled(tmp_path)] == ["native", "misa"]
    assert not (tmp_path / "bench.json").exists()


def test_auto_and_native_need_not_show(tmp_path):
    with BenchServer(stuck=("native", "auto"), pause_s=0) as server:
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "auto") == 0


def test_a_decode_mode_must_run_too(tmp_path, capsys):
    with BenchServer(decode="hisa", pause_s=0) as server:
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa") == 1
    assert "mode hisa did not run: device_runs of decode/hisa stayed at 0" in capsys.readouterr().out


def test_forwards_of_each_measurement(tmp_path):
    with BenchServer(pause_s=0) as server:
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa") == 0
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [result["forwards"] for result in results] == [{"prefill/native (asked)": 2}, {"prefill/misa (asked)": 2}]


def test_a_rerun_measures_only_what_is_missing(tmp_path):
    flags = (*SMALL, "--tools", "serving", "--modes", "misa", "--repeats", "2")
    with BenchServer(pause_s=0) as server:
        server.fail_after = 5  # within the third measurement of two prompts each
        assert bench(tmp_path, "--url", server.url, *flags) == 1
        assert len(sampled(tmp_path)) == 2
        server.fail_after = None
        asked = len(server.prompts)
        assert bench(tmp_path, "--url", server.url, *flags) == 0
        assert len(server.prompts) - asked == 4
        assert Counter(sampled(tmp_path)).most_common(1)[0][1] == 1
        assert bench(tmp_path, "--url", server.url, *flags) == 0
        assert len(server.prompts) - asked == 4


def test_a_run_that_fails_reports_what_it_finished(tmp_path, capsys):
    flags = (*SMALL, "--tools", "serving", "--modes", "misa", "--repeats", "2", "--contexts", "64", "128")
    with BenchServer(pause_s=0) as server:
        server.fail_after = 13  # two prompts a measurement: within the seventh of eight
        assert bench(tmp_path, "--url", server.url, *flags) == 1
        assert "wrote" in (said := capsys.readouterr().out) and "6 of 8 measurements" in said
        part = json.loads((tmp_path / "bench.json").read_text())
        assert part["unfinished"] == {"measured": 6, "of": 8}
        shown = [(one["context"], one["mode"], len(one["values"]["median_ttft_ms"])) for one in part["results"]]
        assert shown == [(64, "native", 2), (64, "misa", 2)], "128 lacks a repeat"
        server.fail_after = None
        assert bench(tmp_path, "--url", server.url, *flags) == 0
    whole = json.loads((tmp_path / "bench.json").read_text())
    assert whole["unfinished"] is None and len(whole["results"]) == 4


def test_failed_requests_are_no_measurement(tmp_path, capsys):
    with BenchServer(pause_s=0) as server:
        server.fail_after = 1
        assert bench(tmp_path, "--url", server.url, *ONE) == 1
    assert "1 of 2 requests succeeded: the server hung up" in capsys.readouterr().out
    assert sampled(tmp_path) == []


def test_other_settings_are_refused(tmp_path, capsys):
    with BenchServer(pause_s=0) as server:
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa") == 0
        assert bench(tmp_path, "--url", server.url, *ONE, "--modes", "misa", "--seed", "3") == 2
        assert "seed was 0, now 3" in capsys.readouterr().out
    assert launched(tmp_path, *ONE, "--modes", "misa") == 2
    assert "model was None, now 'some/model'" in capsys.readouterr().out


def test_a_server_that_dies_is_named_and_the_run_goes_on_from_there(tmp_path, capsys):
    die = tmp_path / "die"
    die.write_text("4")  # native's second measurement is its third and fourth request
    flags = (*SMALL, "--tools", "serving", "--modes", "misa", "--repeats", "2")
    assert launched(tmp_path / "out", *flags, server=("--die-if", str(die))) == 1
    said = capsys.readouterr().out
    assert "the server ended (exit code 7)" in said and "RuntimeError: the stub's memory is gone" in said
    assert sampled(tmp_path / "out") == [("native", "serving/64/1/0/0")]
    assert launched(tmp_path / "out", *flags, server=("--die-if", str(die))) == 0
    assert Counter(sampled(tmp_path / "out")) == Counter(
        (mode, f"serving/64/1/0/{turn}") for mode in ("native", "misa") for turn in (0, 1)
    )


def test_a_server_killed_in_the_middle_of_a_measurement(tmp_path, capsys):
    """As by the kernel where memory runs out: nothing of that measurement is kept, and the same command goes on."""
    die = tmp_path / "die"
    die.write_text("2 kill")  # the second of a measurement's two prompts
    flags = (*ONE, "--modes", "misa")
    assert launched(tmp_path / "out", *flags, server=("--die-if", str(die))) == 1
    assert "failed: the server was killed (SIGKILL); the end of " in capsys.readouterr().out
    assert sampled(tmp_path / "out") == [] and not any(alive(pid) for pid in pids_of(tmp_path / "out"))
    assert launched(tmp_path / "out", *flags, server=("--die-if", str(die))) == 0
    assert sorted(mode for mode, _ in sampled(tmp_path / "out")) == ["misa", "native"]


def test_a_server_at_a_url_killed_in_the_middle(tmp_path, capsys):
    die = tmp_path / "die"
    die.write_text("2 kill")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*STUB, "--set", "prefill_mode=misa", "--set", "decode_mode=native", "--port", port]
    with BenchServer(pause_s=0) as native, subprocess.Popen([*command, "--die-if", str(die)], cwd=ROOT) as theirs:
        try:
            limit = time.monotonic() + 60
            while not listening(int(port)):
                assert time.monotonic() < limit and theirs.poll() is None
                time.sleep(0.05)
            urls = ("--url", f"native={native.url}", f"misa=http://127.0.0.1:{port}")
            assert bench(tmp_path / "out", *urls, *ONE) == 1
        finally:
            theirs.kill()
    said = capsys.readouterr().out
    assert f"failed: no server at http://127.0.0.1:{port}: the connection was refused" in said
    assert [mode for mode, _ in sampled(tmp_path / "out")] == ["native"]


def test_a_server_that_does_not_start(tmp_path, capsys):
    assert launched(tmp_path, *ONE, "--modes", "misa", server=("--fail-start",)) == 1
    assert "the stub cannot start: no such weights" in capsys.readouterr().out


# In the foreground: a shell starts background jobs, such as a test run, with SIGINT ignored, and children inherit that.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import bench_modes, bench_workloads, server_process
server_process.SERVE = (sys.executable, "-m", "tests.scripts.bench_server")
bench_workloads.MODULES = dict.fromkeys(bench_workloads.MODULES, "tests.scripts.bench_tool")
sys.exit(bench_modes.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(sent, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = (*ONE, "--modes", "misa", "--prompts-per-client", "100000")  # far too many to be done before the signal
    command = [sys.executable, "-c", DRIVER, "--model", "m", "--port", port, "--out", str(tmp_path), *flags]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    run = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        tool_log, limit = tmp_path / "logs" / "native_serving_64_1_0_0.log", time.monotonic() + 120
        while not tool_log.exists():
            assert time.monotonic() < limit and run.poll() is None
            time.sleep(0.05)
        (server,) = pids_of(tmp_path)
        tools = [pid for pid in children_of(run.pid) if pid != server]
        assert alive(server) and len(tools) == 1
        run.send_signal(sent)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "the same command goes on from here" in said
    assert not alive(server) and not alive(tools[0])
    assert sampled(tmp_path) == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "give either --model PATH"),
        (("--model", "m", "--url", "http://h"), "give either --model PATH"),
        (("--model", "m", "--modes", "fast"), "--modes fast must be one of native, misa"),
        (("--model", "m", "--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("--model", "m", "--new-tokens", "1"), "--new-tokens 1 must be at least 2"),
        (("--model", "m", "--shared", "2"), "--shared 2.0 must be at least 0 and below 1"),
        (("--model", "m", "--set", "mode=hisa"), "--set mode=hisa must be KEY=VALUE of a setting other than the mode"),
        (("--model", "m", "--set", "strict"), "--set strict must be KEY=VALUE"),
        (("--url", "http://h", "--set", "a=1"), "are for servers started here: ['a=1']"),
        (("--url", "http://h", "--", "--tp-size", "8"), "are for servers started here: ['--tp-size', '8']"),
        (("--url", "hisa=http://h"), "--url must name native=URL too"),
        (("--url", "native=http://h", "fast=http://h"), "--url fast=http://h must be one URL, or MODE=URL"),
        (("--url", "native=http://h", "hisa=http://h", "--modes", "hisa"), "both name the modes"),
        (("--compare", "none.json", "none.json"), "--compare none.json cannot be read as a bench.json"),
    ],
)
def test_wrong_arguments(flags, said, tmp_path, capsys):
    assert bench_modes.main(["--out", str(tmp_path), *flags]) == 2
    assert said in capsys.readouterr().out
    assert not (tmp_path / "samples.jsonl").exists()
