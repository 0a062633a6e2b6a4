"""Measures SGLang's time to first token, time per output token and throughput in each of the plugin's modes.

    python scripts/bench_modes.py --model PATH --modes native misa_rerank auto --out DIR [-- arguments of the server]
    python scripts/bench_modes.py --url http://HOST:30000 --modes misa_rerank auto --out DIR
    python scripts/bench_modes.py --url native=http://HOST:30000 hisa=http://HOST:30001 --out DIR
    python scripts/bench_modes.py --compare OLD/bench.json NEW/bench.json --out DIR

SGLang's own benchmark modules measure, over --contexts, --concurrency and --shared (the share of a prompt that others
begin with). With --model a server is started for each mode, one after the other. One --url is switched from mode to
mode within every workload, which is fairest; it needs SGLANG_EXT_RUNTIME_SWITCH=1. `native` is always measured. A mode
whose device counters did not rise fails the run and is not recorded.

OUT/samples.jsonl holds finished measurements, from which the same command goes on; OUT/bench.json holds all numbers
and OUT/bench.html the report. A run that is interrupted or fails reports the workloads that it finished in all modes.
docs/benchmarking.md says how to read it.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench_compare import write_comparison
from bench_report import results_of, write_report
from bench_workloads import DoesNotFitError, Load, Workload, command_of, read_result, run_command, workloads_of
from eval_loop import ResultsFile, check_at_least_one, check_ran, comparable, run_main, switch
from openai_client import Client
from run_record import installed_version, run_record
from server_process import launch
from sglang_ext.settings import SERVE_MODES

HOST = ("--host=127.0.0.1",)
# Of /server_info, which also holds keys and passwords.
SERVER_FACTS = (
    "version", "model_path", "tp_size", "dp_size", "ep_size", "pp_size", "kv_cache_dtype", "chunked_prefill_size",
    "max_running_requests", "mem_fraction_static", "dsa_prefill_backend", "dsa_decode_backend", "page_size",
    "disable_radix_cache", "disable_cuda_graph", "enable_mixed_chunk", "quantization", "speculative_algorithm",
)  # fmt: skip
HOW = {
    "switched": "The modes took turns within every workload on one server, which was switched between them.",
    "urls": "The modes took turns within every workload, each on a server of its own.",
    "launched": "Each mode ran on a fresh server, one after the other: runs are not interleaved, so a machine that "
    "grew slower or faster meanwhile shows as a difference between modes.",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement of a workload. turn: 0, 1, ... of --repeats; each has prompts of its own."""

    workload: Workload
    turn: int

    @property
    def key(self) -> str:
        return f"{self.workload.name}/{self.turn}"


class Bench:
    """Measures jobs and keeps what is finished."""

    def __init__(self, results: ResultsFile, load: Load, seed: int, logs: Path, bar: tqdm) -> None:
        self.results, self.load, self.seed, self.logs, self.bar = results, load, seed, logs, bar
        self._described: set[str] = set()

    def measure(self, mode: str, job: Job, client: Client, check_server: Callable[[], None], switched: bool) -> None:
        """Measure unless it is finished. RuntimeError where the mode did not run, or the server or the tool failed."""
        if (mode, job.key) in self.results.samples:
            return
        self.bar.set_description(f"{mode} {job.key}")
        try:
            if switched:
                switch(client, mode)
            self._measure(mode, job, client, check_server)
        except ConnectionError:
            check_server()  # where the server has died, its log says more than the refused connection
            raise
        self.bar.update()

    def _measure(self, mode: str, job: Job, client: Client, check_server: Callable[[], None]) -> None:
        before = client.plugin_status()
        check_mode(mode, before, client.url)
        if mode not in self._described:
            info = client.call("/server_info")
            facts = {name: info[name] for name in SERVER_FACTS if info.get(name) is not None}
            self.results.add_counters({"mode": mode, "server": facts, "before": before})
            self._described.add(mode)
        log = self.logs / f"{mode}_{job.key.replace('/', '_')}.log"
        with tempfile.TemporaryDirectory() as folder:  # SGLang's record repeats /server_info with its keys
            result = Path(folder) / "result.jsonl"
            command = command_of(job.workload, self.load, client.url, result, self.seed + job.turn)
            run_command(command, log, check_server)
            after = client.plugin_status()
            try:
                outcome: dict[str, Any] = {"values": read_result(job.workload, self.load, result, log)}
            except DoesNotFitError as reason:
                outcome = {"skipped": str(reason)}
        check_mode(mode, after, client.url)
        if "values" in outcome:
            check_ran(mode, before, after, f"in {job.key}")
            if before is not None and mode != "native":
                check_ran(before["modes"]["decode"], before, after, f"in {job.key}", phase="decode")
        self.results.add_sample({"mode": mode, "key": job.key, **outcome, "forwards": new_forwards(before, after)})


def check_mode(mode: str, status: Mapping[str, Any] | None, url: str) -> None:
    """ValueError where the server does not run the mode. Without the plugin it runs native."""
    runs = "native" if status is None else status["modes"]["prefill"]
    if runs != mode:
        raise ValueError(f"{mode}={url}: that server's prefill mode is {runs}")


def new_forwards(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, int]:
    """{phase/mode (reason): forwards} between two states of the server, as the host counted them."""

    def counted(status: Mapping[str, Any] | None) -> dict[str, int]:
        entries = (status or {}).get("forwards", [])
        return {f"{e['phase']}/{e['mode']} ({e['reason']})": e["forwards"] for e in entries}

    old = counted(before)
    return {name: number - old.get(name, 0) for name, number in counted(after).items() if number > old.get(name, 0)}


def server_urls(given: Sequence[str]) -> dict[str, str]:
    """{mode: url} of MODE=URL arguments, {"": url} of one plain URL. ValueError for anything else."""
    if len(given) == 1 and "=" not in given[0]:
        return {"": given[0]}
    urls = {}
    for text in given:
        mode, _, url = text.partition("=")
        if mode not in SERVE_MODES or not url.startswith(("http://", "https://")) or mode in urls:
            raise ValueError(
                f"--url {text} must be one URL, or MODE=URL once per mode, of modes {', '.join(SERVE_MODES)}"
            )
        urls[mode] = url
    if "native" not in urls:
        raise ValueError("--url must name native=URL too: native is the baseline")
    return urls


def plan(args: argparse.Namespace, server_arguments: Sequence[str]) -> tuple[list[str], dict[str, str], list[Job]]:
    """(modes, urls, jobs), native first. ValueError for arguments that do not go together."""
    check_at_least_one(repeats=args.repeats, prompts_per_client=args.prompts_per_client)
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens {args.new_tokens} must be at least 2: the first has no time per output token")
    if (args.model is None) == (args.url is None):
        raise ValueError("give either --model PATH, to start servers, or --url, for servers that run")
    urls = server_urls(args.url) if args.url else {}
    if urls and (server_arguments or args.set):
        raise ValueError(f"--set and arguments after -- are for servers started here: {[*args.set, *server_arguments]}")
    for item in args.set:
        if "=" not in item or item.partition("=")[0].lower() in ("mode", "prefill_mode"):
            raise ValueError(f"--set {item} must be KEY=VALUE of a setting other than the mode, which --modes sets")
    if args.modes and urls and "" not in urls:
        raise ValueError("--modes and MODE=URL both name the modes; give one of them")
    modes = list(urls) if urls and "" not in urls else args.modes or list(SERVE_MODES)
    for mode in modes:
        if mode not in SERVE_MODES:
            raise ValueError(f"--modes {mode} must be one of {', '.join(SERVE_MODES)}")
    workloads = workloads_of(args.tools, args.contexts, args.concurrency, args.shared)
    jobs = [Job(workload, turn) for workload in workloads for turn in range(args.repeats)]
    return list(dict.fromkeys(["native", *modes])), urls, jobs


def run(args: argparse.Namespace, server_arguments: Sequence[str]) -> None:
    modes, urls, jobs = plan(args, server_arguments)
    clients = {mode: Client(url, timeout=60) for mode, url in urls.items()}
    record = run_record()
    shared: dict[str, Any] = {
        **{name: record[name] for name in ("commit", "gpu")},
        "sglang": installed_version("sglang"),
        "new_tokens": args.new_tokens,
        "prompts_per_client": args.prompts_per_client,
        "seed": args.seed,
        "tokenizer": args.tokenizer,
        "model": args.model,
        "set": sorted(args.set),
        "server_arguments": list(server_arguments),
        "servers": {
            mode or "all modes": {"url": c.url, "model": c.model, "plugin": comparable(c.plugin_status())}
            for mode, c in clients.items()
        },
    }
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = ResultsFile(args.out / "samples.jsonl", shared)
    load = Load(args.new_tokens, args.prompts_per_client, args.tokenizer or args.model)
    how = "launched" if not urls else "switched" if "" in urls else "urls"
    known = {"what": "bench_modes", "run": record, "settings": shared, "how": HOW[how], "modes": modes}
    with tqdm(total=len(modes) * len(jobs), initial=measured(results, modes, jobs), unit="run") as bar:
        bench = Bench(results, load, args.seed, logs, bar)
        try:
            if clients:
                run_in_turn(bench, modes, jobs, clients)
            else:
                run_launched(bench, modes, jobs, args, server_arguments)
        finally:
            report(args.out, known, results, modes, jobs)


def measured(results: ResultsFile, modes: Sequence[str], jobs: Sequence[Job]) -> int:
    """How many measurements are finished."""
    return sum((mode, job.key) in results.samples for mode in modes for job in jobs)


def report(
    out: Path, known: Mapping[str, Any], results: ResultsFile, modes: Sequence[str], jobs: Sequence[Job]
) -> None:
    """Write OUT/bench.json and bench.html of the workloads that are finished in all modes, and print their tables."""
    done, of = measured(results, modes, jobs), len(modes) * len(jobs)
    lacking = {job.workload for job in jobs if measured(results, modes, [job]) < len(modes)}
    finished = [job for job in jobs if job.workload not in lacking]
    if not finished:
        return
    content = {
        **known,
        "unfinished": {"measured": done, "of": of} if done < of else None,
        "results": results_of(results, modes, [(job.workload, job.key) for job in finished]),
        "servers": {entry["mode"]: entry for entry in results.counters if entry["mode"] in modes},
    }
    (out / "bench.json").write_text(json.dumps(content, indent=1))
    print(write_report(out / "bench.html", content), flush=True)
    part = f" of {done} of {of} measurements" if done < of else ""
    print(f"wrote {out / 'bench.json'} and {out / 'bench.html'}{part}", flush=True)


def run_in_turn(bench: Bench, modes: Sequence[str], jobs: Sequence[Job], clients: Mapping[str, Client]) -> None:
    """Every job in all modes before the next; each turn begins with another mode."""
    for job in jobs:
        start = job.turn % len(modes)
        for mode in [*modes[start:], *modes[:start]]:
            client = clients.get(mode) or clients[""]
            bench.measure(mode, job, client, client.check_alive, switched="" in clients)


def run_launched(
    bench: Bench, modes: Sequence[str], jobs: Sequence[Job], args: argparse.Namespace, extra: Sequence[str]
) -> None:
    """A server for each mode that has something left to do, ended before the next starts."""
    for mode in modes:
        if all((mode, job.key) in bench.results.samples for job in jobs):
            continue
        settings = {"prefill_mode": mode, "decode_mode": "native"}
        if mode != "native":
            settings |= {name.lower(): value for name, _, value in (item.partition("=") for item in args.set)}
        bench.bar.set_description(f"{mode}: the server starts")
        log = bench.logs / f"server_{mode}.log"
        options: dict[str, Any] = {"dummy_weights": False, "arguments": HOST, "start_limit_s": args.start_limit_s}
        with launch(Path(args.model), log, settings, extra, {}, args.port, **options) as server:
            for job in jobs:
                bench.measure(mode, job, Client(server.url, timeout=60), server.check_alive, switched=False)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="model directory: servers are started; arguments after -- go to them")
    add("--url", nargs="+", help="a server that can switch modes, or MODE=URL for each mode")
    add("--modes", nargs="+", help=f"default: {' '.join(SERVE_MODES)}")
    add("--tools", nargs="+", default=["serving", "one_batch"], help="serving, one_batch (default: both)")
    add("--contexts", nargs="+", type=int, default=[32768, 65536, 131072], help="tokens of a prompt")
    add("--concurrency", nargs="+", type=int, default=[1, 8], help="clients, or requests of a batch")
    add("--shared", nargs="+", type=float, default=[0.0, 0.9], help="share of a prompt that others begin with")
    add("--new-tokens", type=int, default=64, help="tokens of every answer (default: %(default)s)")
    add("--prompts-per-client", type=int, default=4, help="serving: prompts of a client (default: %(default)s)")
    add("--repeats", type=int, default=3, help="measurements of each workload and mode (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first repeat's prompts (default: %(default)s)")
    add("--tokenizer", metavar="PATH", help="model directory; default: --model, or the one that the server names")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every started server but native's")
    add("--port", type=int, default=30000, help="of started servers (default: %(default)s)")
    add("--start-limit-s", type=float, default=3600, help="seconds a server may take to start (default: %(default)s)")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two bench.json: show what changed")
    add("--out", type=Path, default=Path("bench_results"), help="folder of results (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    end = given.index("--") if "--" in given else len(given)
    args, server_arguments = build_parser().parse_args(given[:end]), given[end + 1 :]
    if args.compare:
        return run_main(lambda: print(write_comparison(args.compare[0], args.compare[1], args.out), flush=True))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers as Ctrl-C does
    return run_main(lambda: run(args, server_arguments))


if __name__ == "__main__":
    sys.exit(main())
