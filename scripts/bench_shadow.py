"""What shadow sampling costs: prefill throughput of two running servers that differ in shadow_rate alone.

    sglang-ext serve --prefill-mode misa_rerank --set shadow_rate=0.01 --port 30001 ...    # and one without, on one GPU
    python scripts/bench_shadow.py --off http://127.0.0.1:30000 --on http://127.0.0.1:30001 --out shadow_cost.json
                                   [--context 131072] [--prompts 8] [--concurrency 2] [--repeats 8] [--limit 0.015]

A measurement sends --prompts fresh prompts to one server, with nothing cached, and asks one token of each. The servers
take turns, in the order off on, on off. Samples are rare and unevenly spread, so the cost is that of all measurements
together, 1 - seconds off / seconds on; medians stand beside it. Fails where the cost is above --limit, where the mode
did not run, where nothing was sampled, or where the two servers' settings differ in more than the shadow's.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai_client import Client
from run_record import run_record
from server_checks import prompt, shadow_forwards

OWN = ("shadow_rate", "shadow_rows", "guard_overlap", "guard_min_samples")


@dataclass
class Side:
    """One of the two servers. seconds: of each measurement; before: its status when they began."""

    name: str
    client: Client
    seconds: list[float] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def runs(self, mode: str) -> int:
        """Prefill forwards of the mode that the device ran between the two states."""
        before, after = (status["device_runs"].get(f"prefill/{mode}", 0) for status in (self.before, self.after))
        return after - before

    def shadowed(self) -> dict[str, int]:
        """{phase/outcome: forwards} of shadow sampling between the two states."""
        before = shadow_forwards(self.before)
        return {key: count - before.get(key, 0) for key, count in shadow_forwards(self.after).items()}


def check_alike(off: Side, on: Side) -> str:
    """The prefill mode of both. ValueError where they cannot be compared."""
    first, second = off.before["settings"], on.before["settings"]
    if first["shadow_rate"] or not second["shadow_rate"]:
        raise ValueError(
            f"shadow_rate is {first['shadow_rate']} at --off and {second['shadow_rate']} at --on: "
            "it must be 0 at the first and more at the second"
        )
    differing = [name for name in first if name not in OWN and first[name] != second.get(name)]
    mode = off.before["modes"]["prefill"]
    if differing or on.before["modes"]["prefill"] != mode:
        raise ValueError(f"the servers differ in {', '.join(differing) or 'their prefill mode'} too")
    if mode == "native":
        raise ValueError("the servers' prefill mode is native, of which nothing is sampled")
    return mode


def measure(sides: list[Side], context: int, prompts: int, concurrency: int, repeats: int) -> None:
    """Fill in the sides' seconds; the first turn of each is not counted, it builds what is built lazily."""
    for turn in range(repeats + 1):
        for side in sides if turn % 2 else sides[::-1]:
            batch = [prompt(context, seed=turn * prompts + number) for number in range(prompts)]
            side.client.flush()
            if turn == 1:
                side.before = side.client.status()
            began = time.perf_counter()
            with ThreadPoolExecutor(concurrency) as pool:
                list(pool.map(side.client.generate, batch, [1] * prompts))
            if turn:
                side.seconds.append(time.perf_counter() - began)
    for side in sides:
        side.after = side.client.status()


def failures_of(off: Side, on: Side, mode: str, cost: float, limit: float) -> list[str]:
    failures = [
        f"--{side.name}: {mode} did not run on the device"
        for side in (off, on)
        if mode != "auto" and side.runs(mode) <= 0
    ]
    if not on.shadowed().get("prefill/sampled"):
        failures.append("no forward was sampled: more prompts, more repeats, or a higher shadow_rate")
    if on.shadowed().get("prefill/error"):
        failures.append("shadow sampling met an error and stopped: see the server's log")
    if cost > limit:
        failures.append(f"it costs {100 * cost:.2f} % of the throughput, more than {100 * limit:.2f} %")
    return failures


def run(args: argparse.Namespace) -> int:
    off, on = Side("off", Client(args.off)), Side("on", Client(args.on))
    for side in (off, on):
        side.before = side.client.status()
    mode = check_alike(off, on)
    measure([off, on], args.context, args.prompts, args.concurrency, args.repeats)
    cost = 1 - sum(off.seconds) / sum(on.seconds)
    medians = {side.name: statistics.median(side.seconds) for side in (off, on)}
    failures = failures_of(off, on, mode, cost, args.limit)
    record = {
        "run": run_record(),
        "mode": mode,
        "shadow_rate": on.before["settings"]["shadow_rate"],
        "context": args.context,
        "prompts": args.prompts,
        "concurrency": args.concurrency,
        "seconds": {side.name: side.seconds for side in (off, on)},
        "medians": medians,
        "cost": cost,
        "device_runs": {side.name: side.runs(mode) for side in (off, on)},
        "shadow_forwards": on.shadowed(),
        "failures": failures,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    tokens = args.context * args.prompts
    rates = "  ".join(f"{name} {tokens / seconds:.0f} tokens/s" for name, seconds in medians.items())
    sampled = on.shadowed().get("prefill/sampled", 0)
    print(f"{rates} (medians); cost in all {100 * cost:.2f} %; {sampled} forwards sampled")
    print("\n".join(["failed:", *failures]) if failures else "ok")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--off", required=True, metavar="URL", help="server without shadow sampling")
    parser.add_argument("--on", required=True, metavar="URL", help="server with it")
    parser.add_argument("--out", type=Path, required=True, help="JSON record")
    parser.add_argument("--context", type=int, default=131072, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="of a measurement (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="measurements of each server (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.015, help="share of throughput (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.context, args.prompts, args.concurrency, args.repeats) < 1:
        parser.error("--context, --prompts, --concurrency and --repeats must be at least 1")
    try:
        return run(args)
    except (ConnectionError, KeyError, ValueError) as error:
        print(f"bench_shadow: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
