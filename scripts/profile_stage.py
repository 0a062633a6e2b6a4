"""Kernel times of each mode's selection stage, from torch's profiler, one kernel a line.

    python scripts/profile_stage.py --rows 8192 --keys 131072 --json profile.json

The cases are those of `scripts/bench_stage.py`: the last rows of one prompt. For counters run it under Nsight Compute,
with --runs 0, for two profilers do not go together:

    ncu --clock-control none --set full -k regex:routed_mask python scripts/profile_stage.py --modes misa --runs 0

Needs an sm_90 GPU and SGLang.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench_stage import MODES, Case
from run_record import run_record


def kernel_times(work: Callable[[], object], runs: int) -> list[dict]:
    """Milliseconds and launches of each kernel of one call, the longest first."""
    work()  # compiled and loaded before it is watched
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            work()
        torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key, "ms": event.device_time_total / 1e3 / runs, "launches": event.count / runs}
        for event in profiler.key_averages()
        if event.device_time_total > 0
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--modes", nargs="+", choices=("native", *MODES), default=["native", *MODES])
    parser.add_argument("--runs", type=int, default=5, help="0: one call of each mode, without torch's profiler")
    parser.add_argument("--json", help="write the raw results here")
    args = parser.parse_args()
    case = Case(args.rows, args.keys, args.heads, seed=2)
    results = []
    for mode in args.modes:
        work = functools.partial(case.native, 0) if mode == "native" else functools.partial(case.mode, mode, 0)
        if not args.runs:
            work()
            torch.cuda.synchronize()
            continue
        kernels = kernel_times(work, args.runs)
        results.append({"mode": mode, "heads": args.heads, "rows": args.rows, "keys": args.keys, "kernels": kernels})
        print(f"{mode}: {sum(kernel['ms'] for kernel in kernels):.3f} ms in kernels")
        for kernel in kernels[:16]:
            print(f"  {kernel['ms']:8.3f} ms  {kernel['launches']:5.1f} launches  {kernel['kernel'][:100]}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"run": run_record(), "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
