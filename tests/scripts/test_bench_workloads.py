"""The commands of SGLang's benchmark modules and what comes back, against those modules themselves."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from bench_workloads import (
    METRICS,
    DoesNotFitError,
    Load,
    Workload,
    command_of,
    read_result,
    run_command,
    workloads_of,
)
from tests.scripts.bench_server import PAUSE_S, TOKENIZER, BenchServer

LOAD = Load(new_tokens=5, prompts_per_client=3, tokenizer=TOKENIZER)
SERVING = Workload("serving", 96, 2, 0.5)
ONE_BATCH = Workload("one_batch", 96, 2, 0.5)


def measured(workload: Workload, server: BenchServer, folder: Path, load: Load = LOAD) -> dict[str, float]:
    """Through SGLang's real module."""
    log, result = folder / "log", folder / "result.jsonl"
    run_command(command_of(workload, load, server.url, result, seed=7), log, lambda: None)
    return read_result(workload, load, result, log)


def common_prefix(prompts: list[list[int]]) -> int:
    return next(n for n, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1)


def test_serving_parses_the_command(monkeypatch):
    serving = pytest.importorskip("sglang.benchmark.serving")
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(serving, "run_benchmark", seen.append)
    monkeypatch.setattr(sys, "argv", command_of(SERVING, LOAD, "http://h:1", Path("r.jsonl"), seed=7)[2:])
    serving.cli_main()
    args = seen[0]
    assert (args.base_url, args.seed, args.output_file) == ("http://h:1", 7, "r.jsonl")
    assert (args.num_prompts, args.max_concurrency, args.gsp_num_groups, args.gsp_prompts_per_group) == (6, 2, 2, 3)
    assert (args.gsp_system_prompt_len, args.gsp_question_len, args.gsp_output_len) == (48, 48, 5)
    assert args.flush_cache and args.tokenize_prompt and args.request_rate == float("inf")


def test_one_batch_server_parses_the_command():
    module = pytest.importorskip("sglang.benchmark.one_batch_server")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.ServerArgs.add_cli_args(parser)
    module.BenchArgs.add_cli_args(parser)
    args = parser.parse_args(command_of(ONE_BATCH, LOAD, "http://h:1", Path("r.jsonl"), seed=7)[3:])
    bench = module.BenchArgs.from_cli_args(args)
    assert (bench.batch_size, bench.input_len, bench.output_len) == ([2], [96, 96], [5])
    assert (bench.cache_hit_rate, bench.seed, bench.result_filename) == (0.5, 7, "r.jsonl")
    assert bench.local_tokenizer_path == TOKENIZER


def test_serving_against_a_server(tmp_path, monkeypatch):
    pytest.importorskip("sglang.benchmark.serving")
    monkeypatch.setenv("HOME", str(tmp_path))
    with BenchServer() as server:
        values = measured(SERVING, server, tmp_path)
    assert list(values) == [metric.name for metric in METRICS["serving"]]
    assert values["median_ttft_ms"] >= 1e3 * PAUSE_S and values["median_tpot_ms"] >= 1e3 * PAUSE_S
    assert values["median_ttft_ms"] < values["median_e2e_latency_ms"] and values["cache_hit_percent"] == 50
    assert values["total_throughput"] == pytest.approx(values["output_throughput"] * (96 + 5) / 5)
    # A warm-up, a flush, then six prompts of exactly 96 tokens, of which three and three begin with the same 48.
    prompts = [batch[0] for _, batch, new_tokens in server.prompts[1:] if new_tokens == 5]
    assert [len(ids) for ids in prompts] == [96] * 6
    assert server.calls.index("/generate") < server.calls.index("/flush_cache") < len(server.calls) - 6
    groups = {tuple(ids[:48]): [other for other in prompts if other[:48] == ids[:48]] for ids in prompts}
    assert [len(group) for group in groups.values()] == [3, 3]
    assert all(common_prefix(group) < 64 for group in groups.values())
    assert not (tmp_path / ".cache" / "sglang").exists(), "prompts of another tokenizer could be read from there"


def test_one_batch_against_a_server(tmp_path):
    pytest.importorskip("sglang.benchmark.one_batch_server")
    with BenchServer() as server:
        values = measured(ONE_BATCH, server, tmp_path)
    assert list(values) == [metric.name for metric in METRICS["one_batch"]]
    assert values["last_ttft_ms"] >= 1e3 * PAUSE_S and values["latency_ms"] >= 5e3 * PAUSE_S
    assert values["latency_ms"] == pytest.approx(values["last_ttft_ms"] + 4 * values["tpot_ms"])
    shapes = [([len(ids) for ids in batch], new_tokens) for _, batch, new_tokens in server.prompts]
    assert shapes == [([48, 48], 1), ([96, 96], 5)] * 2, "prefixes that fill the cache, then the batch, twice"
    assert server.prompts[1][1] != server.prompts[3][1], "the measured batch is not the one that warmed up"
    assert common_prefix(server.prompts[3][1]) == 0


def test_a_batch_beyond_the_cache_is_told_apart_from_a_failure(tmp_path):
    pytest.importorskip("sglang.benchmark.one_batch_server")
    with BenchServer(capacity=150) as server, pytest.raises(DoesNotFitError, match="resident_tokens=202 > .*=150"):
        measured(ONE_BATCH, server, tmp_path)


def write_serving(path: Path, **changes: object) -> Path:
    entry = {metric.name: 1.0 for metric in METRICS["serving"]}
    entry |= {"completed": 6, "ttfts": [0.1] * 6, "errors": [""] * 6, "total_output_tokens": 30}
    path.write_text(json.dumps({**entry, "cache_report": {"cache_hit_rate_pct": 0}, **changes}) + "\n")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completed": 5, "errors": ["", "", "no memory", "", "", ""]}, "5 of 6 requests succeeded: no memory"),
        ({"ttfts": [0.1, 0, 0, 0.1, 0.1, 0.1]}, "2 of 6 answers show no text"),
        ({"total_output_tokens": 29}, "29 answer tokens in place of 30"),
    ],
)
def test_measurements_that_are_not_what_was_asked_for(changes, said, tmp_path):
    assert read_result(SERVING, LOAD, write_serving(tmp_path / "good"), tmp_path / "log")["p99_ttft_ms"] == 1
    with pytest.raises(RuntimeError, match=said):
        read_result(SERVING, LOAD, write_serving(tmp_path / "bad", **changes), tmp_path / "log")


def test_a_missing_result_shows_the_log(tmp_path):
    (tmp_path / "log").write_text("all is lost\n")
    with pytest.raises(RuntimeError, match=r"(?s)0 result lines in place of 1.*all is lost"):
        read_result(SERVING, LOAD, tmp_path / "none", tmp_path / "log")


def test_a_failing_command_shows_its_log_and_a_dead_server_ends_it(tmp_path):
    fails = [sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*what went wrong"):
        run_command(fails, tmp_path / "log", lambda: None)

    def dead() -> None:
        raise RuntimeError("the server ended")

    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the server ended"):
        run_command(hangs, tmp_path / "log", dead)
    assert time.monotonic() - began < 30


def test_every_combination_once():
    found = workloads_of(["serving"], [64, 64, 128], [1], [0.0, 0.9])
    assert [workload.name for workload in found] == [
        "serving/64/1/0",
        "serving/64/1/0.9",
        "serving/128/1/0",
        "serving/128/1/0.9",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((["bench"], [64], [1], [0]), "--tools bench must be one of serving, one_batch"),
        ((["serving"], [1], [1], [0]), "--contexts 1 must be between 2 and 9999999"),
        ((["serving"], [64], [0], [0]), "--concurrency 0 must be at least 1"),
        ((["serving"], [64], [1], [1.0]), "--shared 1.0 must be at least 0 and below 1"),
        ((["serving"], [64], [1], [0.999]), "--shared 0.999 leaves no token of its own to prompts of 64"),
    ],
)
def test_workloads_that_cannot_be(given, said):
    with pytest.raises(ValueError) as caught:
        workloads_of(*given)
    assert str(caught.value) == said
