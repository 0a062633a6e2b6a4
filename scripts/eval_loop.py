"""The loop all evaluations share: modes in turn on one server, a pool of requests, a file that a rerun goes on from.

The results file is JSON lines: first the settings, then one line per finished sample, and one line per mode with its
counters before and after. A mode that was asked for must show in the server's device counters, or the run fails.
Concurrent requests share nothing but the server, so scores depend on --concurrency only as far as its batches do.
"""

import argparse
import json
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval_report import cell_means
from openai_client import Client
from run_record import run_record

NO_PLUGIN = "no_plugin"  # the mode's name on a server without the plugin
UNPROVEN = ("native", "auto", NO_PLUGIN)  # `auto` keeps native for short prompts


@dataclass(frozen=True, slots=True)
class Job:
    """One sample. cell: what it is averaged with. make: prompt and scorer of the completion (0..1), called only when
    the sample runs. size: compares prompts; the largest runs first and must show in the counters.
    """

    key: str
    cell: str
    size: int
    new_tokens: int
    make: Callable[[], tuple[str, Callable[[str], float]]]


class ResultsFile:
    """Finished samples on disk. ValueError where the file was made with other settings; the message names them."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[str, str], dict[str, Any]] = {}
        self.counters: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": wanted})
            return
        lines = path.read_text().split("\n")
        if lines[-1]:  # a run was cut off within a line: take it off, so that the next one starts anew
            path.write_text("".join(line + "\n" for line in lines[:-1]))
        entries = [json.loads(line) for line in lines[:-1]]
        if not entries:
            self._write({"settings": wanted})
            return
        self._refuse_other(entries[0].get("settings", {}), wanted)
        for entry in entries[1:]:
            if "key" in entry:
                self.samples[entry["mode"], entry["key"]] = entry
            else:
                self.counters.append(entry)

    def _refuse_other(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if names:
            differ = "; ".join(f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}" for name in names)
            raise ValueError(f"{self.path} was made with other settings: {differ}. Use another --out, or these again")

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def add_sample(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        self.samples[entry["mode"], entry["key"]] = entry

    def add_counters(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        self.counters.append(entry)


def evaluate(
    client: Client,
    args: argparse.Namespace,
    name: str,
    settings: Mapping[str, Any],
    jobs: Sequence[Job],
    skipped: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run all jobs in all modes of the flags of `add_arguments` and write OUT/NAME.json; (cells, modes).

    settings: what a rerun must share, besides commit, model, tokenizer and the server's own settings, to go on.
    """
    check_at_least_one(concurrency=args.concurrency)
    status = client.plugin_status()
    modes = list(dict.fromkeys(args.modes or [NO_PLUGIN if status is None else status["modes"]["prefill"]]))
    run = run_record()
    shared = {"commit": run["commit"], "model": client.model, "tokenizer": args.tokenizer}
    shared |= {"plugin": comparable(status), **settings}
    results = ResultsFile(args.out / "samples.jsonl", shared)
    run_modes(client, modes, jobs, results, args.concurrency)
    finished = [results.samples[mode, job.key] for mode in modes for job in jobs]
    cells = cell_means(finished)
    record = {"run": run, "settings": shared, "skipped": skipped, "cells": cells, "counters": results.counters}
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1))
    return cells, modes


def comparable(status: Mapping[str, Any] | None) -> dict[str, Any]:
    """The plugin's version, decode mode and parameters: what scores depend on, whatever the prefill mode is now."""
    if status is None:
        return {}
    left_out = ("mode", "prefill_mode", "decode_mode", "strict", "runtime_switch")
    parameters = {
        name: value
        for name, value in status.get("settings", {}).items()
        if name not in left_out and not name.startswith("trace")
    }
    return {"version": status.get("version"), "decode": status["modes"].get("decode"), **parameters}


def run_modes(
    client: Client, modes: Sequence[str], jobs: Sequence[Job], results: ResultsFile, concurrency: int
) -> None:
    """Run what is not finished of all jobs in each mode, in turn; the server is left in the last mode.

    RuntimeError where an asked-for mode does not show in the device counters after its first sample, or at its end.
    """
    for mode in modes:
        pending = [job for job in jobs if (mode, job.key) not in results.samples]
        if pending:
            _run_mode(client, mode, pending, results, concurrency, done=len(jobs) - len(pending))


def _run_mode(client: Client, mode: str, pending: list[Job], results: ResultsFile, concurrency: int, done: int) -> None:
    if mode != NO_PLUGIN:
        switch(client, mode)
    before = client.plugin_status()
    probe = max(pending, key=lambda job: job.size)
    rest = [job for job in pending if job is not probe]
    with tqdm(total=done + len(pending), initial=done, desc=mode, unit="sample") as bar:
        first = _run_job(client, mode, probe)
        # Nothing is written before the mode has shown that it runs: a rerun would take it for finished.
        probed = client.plugin_status()
        check_ran(mode, before, probed, "after the first sample")
        results.add_sample(first)
        bar.update()
        pool = ThreadPoolExecutor(concurrency)
        try:
            for future in as_completed([pool.submit(_run_and_keep, client, mode, job, results) for job in rest]):
                future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    after = client.plugin_status()
    if rest:
        check_ran(mode, probed, after, "after its first sample, at the end")
    results.add_counters({"mode": mode, "samples": len(pending), "before": before, "after": after})


def _run_and_keep(client: Client, mode: str, job: Job, results: ResultsFile) -> None:
    """In the worker, so that a failure elsewhere loses no finished sample."""
    results.add_sample(_run_job(client, mode, job))


def _run_job(client: Client, mode: str, job: Job) -> dict[str, Any]:
    prompt, scorer = job.make()
    answer = client.complete(prompt, job.new_tokens)
    return {
        "mode": mode,
        "key": job.key,
        "cell": job.cell,
        "score": scorer(answer.text),
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.seconds, 4),
        "completion": answer.text,
    }


def switch(client: Client, mode: str) -> None:
    """Set the server's prefill mode and forget cached prefixes, which hold what another mode computed.

    ValueError where the server cannot switch, or does not know the mode.
    """
    status = client.plugin_status()
    if status is None:
        raise ValueError(f"--modes {mode}: the server at {client.url} runs without the plugin; leave --modes out")
    if status["modes"]["prefill"] != mode:
        numbers = status.get("mode_numbers") or {}
        if mode not in numbers:
            allowed = ", ".join(numbers) or "none: start the server with SGLANG_EXT_RUNTIME_SWITCH=1"
            raise ValueError(f"--modes {mode}: the server can switch to {allowed}")
        client.switch_prefill(mode)
    client.flush()


def device_runs(status: Mapping[str, Any] | None, mode: str, phase: str = "prefill") -> int:
    """Forwards of the mode that the GPU counted."""
    return 0 if status is None else status["device_runs"].get(f"{phase}/{mode}", 0)


def check_ran(
    mode: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    when: str,
    phase: str = "prefill",
) -> None:
    """RuntimeError where device_runs of a mode that was asked for did not rise."""
    runs = device_runs(after, mode, phase)
    if mode in UNPROVEN or runs > device_runs(before, mode, phase):
        return
    raise RuntimeError(
        f"mode {mode} did not run: device_runs of {phase}/{mode} stayed at {runs} {when}; "
        "see `forwards` in /server_info for the reason"
    )


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The flags all evaluations share."""
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    parser.add_argument("--model", help="served model name; default: the first that /v1/models lists")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="local model directory; counts tokens")
    parser.add_argument(
        "--modes",
        nargs="+",
        help="prefill modes to switch to in turn (needs SGLANG_EXT_RUNTIME_SWITCH=1); default: the one that runs now",
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of results (default: %(default)s)")


def haystack_name(essay: Path | None) -> str:
    """What essay haystacks were made of: file name and checksum, or the word lists."""
    return "generated prose" if essay is None else f"{essay.name}, CRC-32 {zlib.crc32(essay.read_bytes()):08x}"


def check_at_least_one(**values: int) -> None:
    """ValueError for a flag whose value is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def run_main(work: Callable[[], None]) -> int:
    """Exit code: 0 done, 1 a mode did not run or the server failed, 2 the user asked for something impossible."""
    try:
        work()
    except (RuntimeError, ConnectionError) as error:
        print(f"failed: {error}", flush=True)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", flush=True)
        return 130
    return 0
