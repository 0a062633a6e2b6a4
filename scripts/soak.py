"""Soaks a running server in mixed traffic and checks that nothing broke: no error, no stale statistic, flat memory.

    sglang-ext serve --decode-mode hisa --set check_integrity=1 --strict --model-path DIR --max-total-tokens 400000 ...
    python scripts/soak.py --url http://127.0.0.1:30000 --out soak.json --seconds 600

Multi-turn conversations, cancelled requests, prompts of 1 to --max-tokens tokens, --concurrency at once; a server with
a small pool of keys retracts requests as well. Each run is added to OUT, whose `seconds` are those of all runs in all.
Fails where a request fails or stays in the server; where the plugin's counters show a mismatch, nothing compared, or a
mode refused; where a mode that the server was started with did not run, or shadow sampling met an error; where torch
has more allocated in the idle server at the end than before the first request; where after the first half the memory
grew that torch holds in the server, or the GPU's (--no-memory: others come and go on that GPU, or it is on another
machine); and where nothing was retracted or too little cached, if --must-retract or --must-reuse ask for it.
"""

import argparse
import json
import sys
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

from openai_client import Client
from run_record import ask_gpus, run_record
from server_checks import shadow_forwards
from soak_traffic import Totals, Traffic

SAMPLE_EVERY_S = 10.0
IDLE_LIMIT_S = 120.0


def used_memory_mib() -> int | None:
    """Memory in use on the GPUs that this process may use, None where nvidia-smi does not tell."""
    lines = ask_gpus("memory.used")
    return sum(int(line) for line in lines) if lines and all(line.strip().isdigit() for line in lines) else None


class MemoryWatch:
    """Samples memory every SAMPLE_EVERY_S seconds inside a `with`, as (seconds since start, MiB).

    samples: of the GPUs, by nvidia-smi; reserved: what torch holds in the server, others on the GPU left out.
    """

    def __init__(self, client: Client) -> None:
        self.samples: list[tuple[float, int]] = []
        self.reserved: list[tuple[float, int]] = []
        self._client = client
        self._end = threading.Event()

    def __enter__(self) -> "MemoryWatch":
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_EVERY_S if self.reserved else 0):
            if not self._sample():
                return

    def _sample(self) -> bool:
        seconds = round(time.monotonic() - self._began, 1)
        used = used_memory_mib()
        if used is not None:
            self.samples.append((seconds, used))
        try:
            self.reserved.append((seconds, self._client.status()["reserved_mib"]))
        except ConnectionError:  # the server is gone, which the run's end says
            return False
        return True


def becomes_idle(client: Client) -> bool:
    """Whether the server, after the last answer, lets its cache be emptied: no request is left in it."""
    limit = time.monotonic() + IDLE_LIMIT_S
    while time.monotonic() < limit:
        try:
            client.call("/flush_cache", {})
            return True
        except urllib.error.HTTPError:
            time.sleep(0.2)
    return False


def growth_mib(samples: list[tuple[float, int]]) -> int | None:
    """How far memory rose above its peak of the first half; None for fewer than two samples.

    Memory that is held follows the largest batch so far, which random traffic sends when it happens to: what is never
    given back shows in `allocated_mib`.
    """
    if len(samples) < 2:
        return None
    first = len(samples) // 2
    return max(used for _, used in samples[first:]) - max(used for _, used in samples[:first])


def shadow_errors(status: dict[str, Any]) -> int:
    """Forwards in which shadow sampling met an error, after which it measures nothing any more."""
    return sum(count for name, count in shadow_forwards(status).items() if name.endswith("/error"))


def failures_of(
    totals: Totals,
    before: dict[str, Any],
    after: dict[str, Any],
    growth: int | None,
    own_growth: int | None,
    kept: int,
    args: argparse.Namespace,
) -> list[str]:
    """What a run proved wrong, or could not prove: one sentence each."""
    failures = []
    if totals.errors:
        failures.append(f"{totals.errors} requests failed, as {totals.first_errors[0]}")
    if not totals.new_tokens:
        failures.append("no request was answered")
    if args.must_retract and not totals.retractions:
        failures.append(
            "no request was retracted: serve with SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION=1 and few --max-total-tokens, "
            "or with SGLANG_TEST_RETRACT=1"
        )
    if args.must_reuse and totals.cached_tokens < args.must_reuse * totals.prompt_tokens:
        failures.append(
            f"{totals.cached_tokens} of {totals.prompt_tokens} prompt tokens were in the prefix cache, less than "
            f"{args.must_reuse:g} of them: serve with more --max-total-tokens"
        )
    checked, mismatches = (after[name] - before[name] for name in ("integrity_checked", "integrity_mismatches"))
    if mismatches:
        failures.append(f"{mismatches} block statistics were not those of the keys")
    if not checked and not args.no_integrity:
        failures.append(
            "no block statistic was compared with the keys: serve with check_integrity=1 (or --no-integrity)"
        )
    if after["refused"]:
        failures.append(f"SGLang's own indexer served: {'; '.join(after['refused'])}")
    for phase, mode in after["modes"].items():
        ran = after["device_runs"].get(f"{phase}/{mode}", 0) - before["device_runs"].get(f"{phase}/{mode}", 0)
        if mode not in ("native", "auto") and not ran:
            failures.append(f"{phase} mode {mode} did not run")
    if (errors := shadow_errors(after) - shadow_errors(before)) > 0:
        failures.append(f"shadow sampling met an error {errors} times: see the server's log")
    if growth is None and not args.no_memory:
        failures.append("the GPU's memory was not measured: run beside the server (or --no-memory)")
    if kept > args.kept_slack_mib:
        failures.append(f"{kept} MiB more are allocated in the idle server than before, over {args.kept_slack_mib}")
    if growth is not None and growth > args.memory_slack_mib:
        failures.append(f"memory grew by {growth} MiB after the first half, more than {args.memory_slack_mib}")
    if own_growth is not None and own_growth > args.memory_slack_mib:
        failures.append(f"torch's memory in the server grew by {own_growth} MiB, more than {args.memory_slack_mib}")
    return failures


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """One run's record, also of a server that is gone at its end. ConnectionError, ValueError where it cannot begin."""
    client = Client(args.url, timeout=args.timeout)
    before = client.plugin_status()
    if before is None:
        raise ValueError(f"--url {args.url}: that server runs without the plugin")
    if "allocated_mib" not in before:
        raise ValueError(f"--url {args.url}: that server's plugin is of another version than this script")
    traffic = Traffic(
        client, args.concurrency, args.max_tokens, args.max_new_tokens, args.vocabulary, args.endless_share, args.seed
    )
    began = time.monotonic()
    with MemoryWatch(client) as memory:
        totals = traffic.run(args.seconds)
    seconds = time.monotonic() - began
    growth = None if args.no_memory else growth_mib(memory.samples)
    own_growth = growth_mib(memory.reserved)
    after = kept = None
    try:
        idle, after = becomes_idle(client), client.status()
        kept = after["allocated_mib"] - before["allocated_mib"]
        failures = failures_of(totals, before, after, growth, own_growth, kept, args)
        failures += [] if idle else [f"a request was left in the server {IDLE_LIMIT_S:.0f} s after the last answer"]
    except ConnectionError as error:
        failures = [f"the server is gone: {error}"]
    return {
        "run": run_record(),
        "seconds": round(seconds, 1),
        "concurrency": args.concurrency,
        "max_tokens": args.max_tokens,
        "endless_share": args.endless_share,
        "totals": totals.as_dict(),
        "memory_mib": memory.samples,
        "memory_growth_mib": growth,
        "reserved_mib": memory.reserved,
        "reserved_growth_mib": own_growth,
        "kept_mib": kept,
        "before": before,
        "after": after,
        "failures": failures,
    }


def add_run(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """OUT's record with this run in it, written back."""
    runs = json.loads(out.read_text())["runs"] if out.is_file() else []
    runs.append(run)
    record = {
        "seconds": round(sum(one["seconds"] for one in runs), 1),
        "failures": [failure for one in runs for failure in one["failures"]],
        "runs": runs,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--out", type=Path, required=True, help="JSON record, to which this run is added")
    parser.add_argument("--seconds", type=float, default=600, help="requests are sent for so long")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=120_000, help="of prompt and answer")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4000, help="token ids are drawn below it")
    parser.add_argument(
        "--endless-share", type=float, default=0.5, metavar="SHARE", help="of the answers, that ignore their end"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed sends other requests")
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one request")
    parser.add_argument("--memory-slack-mib", type=int, default=512, help="by which held memory may grow")
    parser.add_argument("--kept-slack-mib", type=int, default=128, help="that an idle server may have allocated beside")
    parser.add_argument("--no-memory", action="store_true", help="not judged: the GPU is shared or elsewhere")
    parser.add_argument("--must-retract", action="store_true", help="fail where the server retracted no request")
    parser.add_argument(
        "--must-reuse", type=float, default=0.0, metavar="SHARE", help="fail where fewer prompt tokens were cached"
    )
    parser.add_argument("--no-integrity", action="store_true", help="the server runs without check_integrity")
    args = parser.parse_args(argv)
    if not 0 < args.max_new_tokens < args.max_tokens:
        parser.error(f"--max-new-tokens {args.max_new_tokens} must be in 1 .. {args.max_tokens - 1} (--max-tokens)")
    if not 0 <= args.endless_share <= 1:
        parser.error(f"--endless-share {args.endless_share:g} must be from 0 to 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run = soak(args)
    except (ConnectionError, ValueError) as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 2
    record = add_run(args.out, run)
    totals, after = run["totals"], run["after"] or run["before"]
    print(
        f"{run['seconds']:.0f} s: {totals['requests']}, {totals['prompt_tokens']} prompt tokens "
        f"({totals['cached_tokens']} cached), {totals['new_tokens']} new, {totals['retractions']} retractions; "
        f"{after['integrity_checked'] - run['before']['integrity_checked']} statistics compared; "
        f"MiB more: {run['memory_growth_mib']} on the GPU, {run['reserved_growth_mib']} held by torch in the server, "
        f"{run['kept_mib']} allocated when idle"
    )
    print("\n".join(["failed:", *run["failures"]]) if run["failures"] else "nothing broke")
    print(f"{record['seconds']:.0f} s in all, {len(record['runs'])} runs, {len(record['failures'])} failures")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
