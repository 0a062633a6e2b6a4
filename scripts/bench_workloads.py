"""What `bench_modes.py` measures: workloads, the commands of SGLang's benchmark modules for them, and their results.

`serving` is `sglang.benchmark.serving`: clients that each ask several prompts, one after the other. `one_batch` is
`sglang.benchmark.one_batch_server`: one batch that arrives at once. Names and fields are those of SGLang 0.5.23.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from server_process import end_of, running

MODULES = {"serving": "sglang.benchmark.serving", "one_batch": "sglang.benchmark.one_batch_server"}
# SGLang keeps generated prompts on disk under the tokenizer's class name alone, so that another model's ids could come
# back; it does not where this ratio is not 1. Lengths stay exact: int(n * ratio) == n below ten million tokens.
UNCACHED_RATIO = "1.0000001"


class DoesNotFitError(Exception):
    """The server cannot hold the workload's batch; SGLang's tool says so and measures nothing."""


class Metric(NamedTuple):
    """A number that a tool reports. better: +1 larger is better, -1 smaller is better, 0 it only describes the run."""

    name: str
    title: str
    unit: str
    better: int


METRICS: dict[str, tuple[Metric, ...]] = {
    "serving": (
        Metric("median_ttft_ms", "time to first token, median", "ms", -1),
        Metric("mean_ttft_ms", "time to first token, mean", "ms", -1),
        Metric("p99_ttft_ms", "time to first token, 99th percentile", "ms", -1),
        Metric("median_tpot_ms", "time per output token, median", "ms", -1),
        Metric("p99_tpot_ms", "time per output token, 99th percentile", "ms", -1),
        Metric("median_e2e_latency_ms", "request latency, median", "ms", -1),
        Metric("total_throughput", "throughput, all tokens", "tokens/s", 1),
        Metric("output_throughput", "throughput, answer tokens", "tokens/s", 1),
        Metric("request_throughput", "requests finished", "1/s", 1),
        Metric("cache_hit_percent", "prompt tokens found in the prefix cache", "%", 0),
    ),
    "one_batch": (
        Metric("last_ttft_ms", "time until every request has its first token", "ms", -1),
        Metric("tpot_ms", "time per output token after that", "ms", -1),
        Metric("latency_ms", "latency of the batch", "ms", -1),
        Metric("input_throughput", "throughput, prompt tokens", "tokens/s", 1),
        Metric("output_throughput", "throughput, answer tokens", "tokens/s", 1),
    ),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """context: tokens of a prompt. concurrency: clients, or requests of the batch. shared: share of a prompt's tokens
    that other prompts begin with too (serving), or that are cached before the batch arrives (one_batch).
    """

    tool: str
    context: int
    concurrency: int
    shared: float

    @property
    def name(self) -> str:
        return f"{self.tool}/{self.context}/{self.concurrency}/{self.shared:g}"

    @property
    def shared_tokens(self) -> int:
        return round(self.shared * self.context)


@dataclass(frozen=True, slots=True)
class Load:
    """What all workloads of a run have in common. new_tokens: exact length of every answer. prompts_per_client: serving
    only. tokenizer: a model directory; None: the one that the server names.
    """

    new_tokens: int
    prompts_per_client: int
    tokenizer: str | None

    def num_prompts(self, workload: Workload) -> int:
        return workload.concurrency * (self.prompts_per_client if workload.tool == "serving" else 1)


def workloads_of(
    tools: Sequence[str], contexts: Sequence[int], concurrency: Sequence[int], shared: Sequence[float]
) -> list[Workload]:
    """Every combination, short contexts first. ValueError names the flag, the value and what is allowed."""
    for flag, values, holds, allowed in (
        ("--tools", tools, lambda tool: tool in MODULES, f"one of {', '.join(MODULES)}"),
        ("--contexts", contexts, lambda tokens: 1 < tokens < 10**7, "between 2 and 9999999"),
        ("--concurrency", concurrency, lambda clients: clients >= 1, "at least 1"),
        ("--shared", shared, lambda share: 0 <= share < 1, "at least 0 and below 1"),
    ):
        for value in values:
            if not holds(value):
                raise ValueError(f"{flag} {value} must be {allowed}")
    found = [
        Workload(tool, tokens, clients, share)
        for tool in tools
        for tokens in contexts
        for clients in concurrency
        for share in shared
    ]
    for workload in found:
        if workload.shared_tokens >= workload.context:
            raise ValueError(f"--shared {workload.shared} leaves no token of its own to prompts of {workload.context}")
    return list(dict.fromkeys(found))


def command_of(workload: Workload, load: Load, url: str, result: Path, seed: int) -> list[str]:
    """The command that measures the workload at `url` and appends JSON lines to `result`."""
    command = [sys.executable, "-m", MODULES[workload.tool], "--base-url", url, "--seed", str(seed)]
    if workload.tool == "one_batch":
        # The same length twice: the first batch builds what is built lazily, the second is the measurement.
        command += ["--model-path", "None", "--skip-warmup", "--no-append-to-github-summary"]
        command += ["--dataset-name", "random-ids", "--batch-size", str(workload.concurrency)]
        command += ["--input-len", str(workload.context), str(workload.context)]
        command += ["--output-len", str(load.new_tokens), "--cache-hit-rate", f"{workload.shared:g}"]
        command += ["--result-filename", str(result)]
        return command + (["--local-tokenizer-path", load.tokenizer] if load.tokenizer else [])
    # One group per client. Without sharing the common part is empty: uniform random ids, which `random` (one text
    # repeated to length) and `random-ids` (consecutive ids) are not.
    command += ["--backend", "sglang", "--tokenize-prompt", "--flush-cache", "--warmup-requests", "1"]
    command += ["--dataset-name", "generated-shared-prefix", "--gsp-range-ratio", UNCACHED_RATIO]
    command += ["--gsp-num-groups", str(workload.concurrency)]
    command += ["--gsp-prompts-per-group", str(load.prompts_per_client)]
    command += ["--gsp-system-prompt-len", str(workload.shared_tokens)]
    command += ["--gsp-question-len", str(workload.context - workload.shared_tokens)]
    command += ["--gsp-output-len", str(load.new_tokens)]
    command += ["--num-prompts", str(load.num_prompts(workload)), "--max-concurrency", str(workload.concurrency)]
    command += ["--cache-report", "--disable-tqdm", "--output-details", "--output-file", str(result)]
    return command + (["--model", load.tokenizer, "--tokenizer", load.tokenizer] if load.tokenizer else [])


def run_command(command: Sequence[str], log: Path, check_server: Callable[[], None]) -> None:
    """Run the command, its output in `log`. check_server is asked meanwhile, and its error ends the command.

    RuntimeError with the end of the log where the command fails.
    """
    with running(command, log) as process:
        while process.poll() is None:
            check_server()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    if process.returncode:
        check_server()
        raise RuntimeError(f"{command[2]} ended with {process.returncode}; the end of {log}:\n{end_of(log)}")


def read_result(workload: Workload, load: Load, result: Path, log: Path) -> dict[str, float]:
    """{name: value} of the tool's METRICS.

    DoesNotFitError where the tool left the workload out, RuntimeError where the measurement is not what was asked for.
    """
    lines = result.read_text().splitlines() if result.exists() else []
    if not lines and (reason := re.search(r"Skip benchmark (.+?)=*$", log.read_text(errors="replace"), re.MULTILINE)):
        raise DoesNotFitError(reason[1])
    expected = 2 if workload.tool == "one_batch" else 1
    if len(lines) != expected:
        raise RuntimeError(
            f"{workload.name}: {len(lines)} result lines in place of {expected}; the end of {log}:\n{end_of(log)}"
        )
    entry = json.loads(lines[-1])
    values = _one_batch(entry, load) if workload.tool == "one_batch" else _serving(entry, workload, load)
    wanted = load.num_prompts(workload) * load.new_tokens
    if entry["total_output_tokens"] != wanted:
        raise RuntimeError(f"{workload.name}: {entry['total_output_tokens']} answer tokens in place of {wanted}")
    return values


def _serving(entry: Mapping[str, Any], workload: Workload, load: Load) -> dict[str, float]:
    wanted = load.num_prompts(workload)
    if entry["completed"] != wanted:
        error = next((error for error in entry["errors"] if error), "no error given").strip()
        raise RuntimeError(f"{workload.name}: {entry['completed']} of {wanted} requests succeeded: {error[-1000:]}")
    # SGLang takes the first piece of visible text for the first token; an answer without any has a time of 0.
    silent = sum(seconds == 0 for seconds in entry["ttfts"])
    if silent:
        raise RuntimeError(f"{workload.name}: {silent} of {wanted} answers show no text, so no time to first token")
    values = {metric.name: entry[metric.name] for metric in METRICS["serving"] if metric.name in entry}
    return {**values, "cache_hit_percent": entry["cache_report"]["cache_hit_rate_pct"]}


def _one_batch(entry: Mapping[str, Any], load: Load) -> dict[str, float]:
    decode_s = entry["latency"] - entry["last_ttft"]
    return {
        "last_ttft_ms": 1e3 * entry["last_ttft"],
        "tpot_ms": 1e3 * decode_s / (load.new_tokens - 1),
        "latency_ms": 1e3 * entry["latency"],
        "input_throughput": entry["input_throughput"],
        "output_throughput": entry["output_throughput"],
    }
