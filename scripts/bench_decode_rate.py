"""Tokens per second of decoding alone, on servers that run already, at one batch and context.

    python scripts/bench_decode_rate.py --url native=http://127.0.0.1:30000 hisa=http://127.0.0.1:30001
                                        --out rate.json [--batch 32] [--context 65536] [--tokens 1024] [--repeats 5]
                                        [--prepare]

Every server is given the same prompts, whose keys stay in its prefix cache: a measurement in which they were not there
fails. (--prepare fills the caches and measures nothing.) A measurement asks all prompts at once and counts the tokens
that come while every one of them is answered: from the moment when the last has its second chunk to the one when the
first has its last. Answers are streamed EVERY tokens at a time, so that reading them costs little. Servers take turns,
after a round that is not recorded; medians, and how far the repeats lie apart. A server must decode in the mode of its
name, and unless that is `native` or `auto` its device counter must rise by the steps taken, and by few more: more mean
that the batch was not decoded at once. `auto` at a batch below its break-even shows what keeping block statistics costs
native decode.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from indexer_kernels.page_layout import PAGE_TOKENS
from openai_client import Client
from run_record import run_record
from server_checks import prompt, runs

EVERY = 16  # tokens between two chunks of a streamed answer
LEAST_SHARE = 0.5  # of an answer's tokens: as long all requests must have been answered at once
MOST_STEPS = 2 - LEAST_SHARE  # device runs for each step asked for: as many where the last begins as late as it may
Progress = list[tuple[float, int]]  # (clock, tokens of an answer that have come), growing


def prompts_of(batch: int, context: int) -> list[list[int]]:
    """Token ids; no two prompts begin alike."""
    return [prompt(context, seed) for seed in range(batch)]


def answers_of(server: Client, prompts: list[list[int]], tokens: int, cached: bool = True) -> list[Progress]:
    """How every prompt's answer came. RuntimeError where tokens are missing, or where prompts were not `cached`."""

    def ask(ids: list[int]) -> tuple[Progress, int]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "stream_interval": EVERY}
        progress, reused = [], 0
        for chunk in server.stream("/generate", {"input_ids": ids, "sampling_params": sampling}):
            progress.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
            reused = chunk["meta_info"]["cached_tokens"]
        return progress, len(ids) - reused

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    if short := [
        progress[-1][1] if progress else 0 for progress, _ in answers if not progress or progress[-1][1] != tokens
    ]:
        raise RuntimeError(f"{server.url}: answers of {short} tokens where {tokens} were asked")
    if cached and (computed := max(count for _, count in answers)) > PAGE_TOKENS:  # the last page is computed anew
        raise RuntimeError(
            f"{server.url}: {computed} tokens of a prompt were not in the prefix cache: the server needs room for "
            f"--batch times --context tokens and their answers (--max-total-tokens)"
        )
    return [progress for progress, _ in answers]


def tokens_at(progress: Progress, moment: float) -> float:
    """Tokens that had come by then, between two chunks in proportion to the time."""
    for (began, before), (ended, after) in pairwise(progress):
        if began <= moment <= ended:
            return before + (after - before) * (moment - began) / (ended - began) if ended > began else after
    return progress[-1][1]


def rate_of(answers: Sequence[Progress]) -> float:
    """Tokens per second while all are answered. RuntimeError where that was too short to tell.

    From the last one's second chunk on: what others were sent around its first was held up by its prefill.
    """
    began, ended = max(one[:2][-1][0] for one in answers), min(one[-1][0] for one in answers)
    came = [tokens_at(one, ended) - tokens_at(one, began) for one in answers] if ended > began else [0.0]
    if min(came) < (least := LEAST_SHARE * answers[0][-1][1]):
        raise RuntimeError(
            f"{min(came):.0f} tokens of an answer came while all requests were answered, fewer than {least:.0f}: "
            f"ask for more --tokens"
        )
    return sum(came) / (ended - began)


def forwards_of(server: Client) -> dict[str, int]:
    """{mode (reason): decode forwards}, of which CUDA graphs count at their capture."""
    listed = [one for one in server.status()["forwards"] if one["phase"] == "decode"]
    return {f"{one['mode']} ({one['reason']})": one["forwards"] for one in listed}


def named_servers(urls: list[str]) -> dict[str, Client]:
    """name=url, with what each decodes in checked. ValueError names the entry and what is allowed."""
    servers = {}
    for entry in urls:
        name, given, url = entry.partition("=")
        if not given or name in servers:
            raise ValueError(f"--url {entry} must be NAME=URL with a name of its own")
        servers[name] = Client(url)
        decodes = servers[name].status()["modes"]["decode"]
        if decodes != name:
            raise ValueError(f"--url {entry}: that server's decode mode is {decodes}")
    return servers


def measure(servers: dict[str, Client], prompts: list[list[int]], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Rates of each server, which take turns. RuntimeError where a mode did not run in every step, or in far more."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for server in servers.values():
        answers_of(server, prompts, 1, cached=False)
    for turn in range(repeats + 1):
        for name, server in servers.items():
            before = runs(server, f"decode/{name}")
            answers = answers_of(server, prompts, tokens)
            ran, steps = runs(server, f"decode/{name}") - before, tokens - 1
            if name not in ("native", "auto") and ran < steps:
                raise RuntimeError(f"{name}: {ran} runs on the device for {steps} decode steps")
            if ran > MOST_STEPS * steps + len(prompts):
                raise RuntimeError(f"{name}: {ran} runs for {steps} decode steps: the batch was not decoded at once")
            if turn:  # the first builds what is built lazily
                rates[name].append(rate_of(answers))
    return rates


def scatter_of(rates: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return (max(rates) - min(rates)) / statistics.median(rates)


def summary(name: str, rates: dict[str, list[float]], batch: int) -> str:
    """A line: the median, how far the repeats lie apart, and against native whether the repeats tell them apart."""
    mine, native = rates[name], rates.get("native")
    rate = statistics.median(mine)
    line = f"{name}: {rate:.0f} tokens/s, {1e3 * batch / rate:.2f} ms a step, scatter {100 * scatter_of(mine):.0f} %"
    if native is None or name == "native":
        return line
    apart = min(mine) > max(native) or max(mine) < min(native)
    return f"{line}, {rate / statistics.median(native):.2f}x native{'' if apart else ', within the scatter'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", nargs="+", required=True, metavar="NAME=URL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="fill the prefix caches and measure nothing")
    args = parser.parse_args()
    if args.tokens < 4 * EVERY or min(args.batch, args.context, args.repeats) < 1:
        parser.error(f"--tokens must be at least {4 * EVERY}, --batch, --context and --repeats at least 1")
    try:
        servers = named_servers(args.url)
        prompts = prompts_of(args.batch, args.context)
        if args.prepare:
            for name, server in servers.items():
                began = time.perf_counter()
                answers_of(server, prompts, 1, cached=False)
                print(f"{name}: {time.perf_counter() - began:.1f} s to fill its cache", flush=True)
            return 0
        rates = measure(servers, prompts, args.tokens, args.repeats)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    record = {
        "run": run_record(),
        "batch": args.batch,
        "context": args.context,
        "tokens": args.tokens,
        "tokens_per_s": rates,
        "medians": {name: statistics.median(values) for name, values in rates.items()},
        "scatter": {name: scatter_of(values) for name, values in rates.items()},
        "forwards": {name: forwards_of(server) for name, server in servers.items()},
    }
    args.out.write_text(json.dumps(record, indent=1))
    print("\n".join(summary(name, rates, args.batch) for name in rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
