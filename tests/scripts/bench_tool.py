"""Stands in for SGLang's benchmark modules where a test is about `bench_modes.py`: their arguments, requests and result
files without the ten seconds in which they import.
"""

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--base-url", "--output-file", "--result-filename"):
        parser.add_argument(flag)
    for flag in ("--num-prompts", "--batch-size", "--gsp-question-len", "--gsp-output-len", "--output-len", "--seed"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--input-len", type=int, nargs="+")
    args, _ = parser.parse_known_args()
    serving = args.output_file is not None
    count = args.num_prompts if serving else args.batch_size
    new_tokens = args.gsp_output_len if serving else args.output_len
    context = args.gsp_question_len if serving else args.input_len[0]
    began = time.perf_counter()
    failed = 0
    for number in range(count):
        sampling = {"max_new_tokens": new_tokens}
        body = json.dumps({"input_ids": [args.seed, number] + [1] * (context - 2), "sampling_params": sampling})
        try:
            urllib.request.urlopen(args.base_url + "/generate", body.encode(), timeout=60).read()
        except OSError:
            failed += 1
    ms = 1e3 * (time.perf_counter() - began)
    tokens = {"total_output_tokens": count * new_tokens, "output_throughput": 1.0, "input_throughput": 1e4 / ms}
    if not serving:
        entry: dict[str, Any] = {**tokens, "latency": ms / 500, "last_ttft": ms / 1000}
        Path(args.result_filename).write_text(f"{json.dumps(entry)}\n" * 2)
        return
    names = ["median_ttft_ms", "mean_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2e_latency_ms"]
    rates = {"total_throughput": 1e6 / ms, "request_throughput": 1e3 / ms}
    details = {"ttfts": [1.0] * count, "errors": [""] * (count - failed) + ["the server hung up"] * failed}
    entry = {**tokens, **dict.fromkeys(names, ms), **rates, **details, "completed": count - failed}
    entry["cache_report"] = {"cache_hit_rate_pct": 0.0}
    Path(args.output_file).write_text(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
