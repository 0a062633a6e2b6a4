"""Tokens per second of decoding alone, on servers that run already, at one batch and context.

    python scripts/bench_decode_rate.py --url native=http://127.0.0.1:30000 hisa=http://127.0.0.1:30001
                                        --out rate.json [--batch 32] [--context 65536] [--tokens 192] [--repeats 3]
                                        [--prepare]

Every server is given the same prompts, whose keys stay in its prefix cache: a measurement in which they were not there
fails. (--prepare fills the caches and measures nothing.) A measurement asks all prompts at once for --tokens tokens,
then for a quarter as many; the difference is decoding at the full batch, without prefill and without the start. Servers
take turns; medians. A server must decode in the mode of its name, and unless that is `native` or `auto` its device
counter must rise by the steps taken, and by few more: more mean that the batch was not decoded at once. `auto` at a
batch below its break-even shows what keeping block statistics costs native decode.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from indexer_kernels.page_layout import PAGE_TOKENS
from openai_client import Client
from run_record import run_record
from server_checks import prompt, runs

MOST_STEPS = 1.25  # device runs for each step asked for: requests of a batch do not begin in the same step


def prompts_of(batch: int, context: int) -> list[list[int]]:
    """Token ids; no two prompts begin alike."""
    return [prompt(context, seed) for seed in range(batch)]


def seconds_of(server: Client, prompts: list[list[int]], tokens: int, cached: bool = True) -> float:
    """Until every prompt has its tokens. RuntimeError where they did not come, or where prompts were not `cached`."""

    def ask(ids: list[int]) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return server.call("/generate", {"input_ids": ids, "sampling_params": sampling})

    with ThreadPoolExecutor(len(prompts)) as pool:
        began = time.perf_counter()
        replies = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - began
    short = [len(reply["output_ids"]) for reply in replies if len(reply["output_ids"]) != tokens]
    if short:
        raise RuntimeError(f"{server.url}: answers of {short} tokens where {tokens} were asked")
    computed = [len(ids) - reply["meta_info"]["cached_tokens"] for ids, reply in zip(prompts, replies)]
    if cached and max(computed) > PAGE_TOKENS:  # the last page is computed anew
        raise RuntimeError(
            f"{server.url}: {max(computed)} tokens of a prompt were not in the prefix cache: the server needs room for "
            f"--batch times --context tokens and their answers (--max-total-tokens)"
        )
    return seconds


def rate_of(server: Client, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second between a quarter of the tokens and all of them."""
    part = tokens // 4
    less, all_of_them = (seconds_of(server, prompts, count) for count in (part, tokens))
    if all_of_them <= less:
        raise RuntimeError(f"{server.url}: {tokens} tokens took {all_of_them:.2f} s, {part} took {less:.2f} s")
    return len(prompts) * (tokens - part) / (all_of_them - less)


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
        seconds_of(server, prompts, 1, cached=False)
    for _ in range(repeats):
        for name, server in servers.items():
            before = runs(server, f"decode/{name}")
            rates[name].append(rate_of(server, prompts, tokens))
            ran, steps = runs(server, f"decode/{name}") - before, tokens - 1 + tokens // 4 - 1
            if name not in ("native", "auto") and ran < steps:
                raise RuntimeError(f"{name}: {ran} runs on the device for {steps} decode steps")
            if ran > MOST_STEPS * steps + len(prompts):
                raise RuntimeError(f"{name}: {ran} runs for {steps} decode steps: the batch was not decoded at once")
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", nargs="+", required=True, metavar="NAME=URL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="fill the prefix caches and measure nothing")
    args = parser.parse_args()
    if args.tokens < 8 or min(args.batch, args.context, args.repeats) < 1:
        parser.error("--tokens must be at least 8, --batch, --context and --repeats at least 1")
    try:
        servers = named_servers(args.url)
        prompts = prompts_of(args.batch, args.context)
        if args.prepare:
            for name, server in servers.items():
                print(f"{name}: {seconds_of(server, prompts, 1, cached=False):.1f} s to fill its cache", flush=True)
            return 0
        rates = measure(servers, prompts, args.tokens, args.repeats)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    medians = {name: statistics.median(values) for name, values in rates.items()}
    record = {
        "run": run_record(),
        "batch": args.batch,
        "context": args.context,
        "tokens": args.tokens,
        "tokens_per_s": rates,
        "medians": medians,
        "forwards": {name: forwards_of(server) for name, server in servers.items()},
    }
    args.out.write_text(json.dumps(record, indent=1))
    for name, rate in medians.items():
        against = f", {rate / medians['native']:.2f}x native" if "native" in medians else ""
        print(f"{name}: {rate:.0f} tokens/s, {1e3 * args.batch / rate:.2f} ms a step{against}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
