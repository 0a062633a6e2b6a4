"""The least work a selection stage has to do, and what of the chip's limits a measured time reaches.

    python scripts/stage_roofline.py stage.json --plot stage.png

Reads the JSON of `scripts/bench_stage.py`, prints its table with achieved TFLOP/s, GB/s and the share of the roofline,
and draws the times against native. The limits default to one H200: 1979 TFLOP/s of dense fp8, 4800 GB/s. Drawing needs
matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval_report import table

PEAK_FLOPS = 1979e12  # dense fp8 of an H200 (NVIDIA's data sheet)
PEAK_BYTES = 4.8e12  # a second, its HBM3e
HEAD_DIM, KEY_BYTES, TOP_K = 128, 132, 2048
SAMPLE = 16  # misa and misa_rerank score one key of these before all


class Work(NamedTuple):
    """Operations, and bytes to and from device memory."""

    flops: float
    bytes: float


def least_work(mode: str, rows: int, keys: int, heads: int, params: Mapping[str, Any]) -> Work:
    """What `mode` cannot do without for the last `rows` rows of a prompt of `keys` tokens.

    Two operations for each of the 128 channels, heads and (row, token or block) pairs that are scored; every key,
    query and gate read once, every index written once. native also writes each score as float32 and reads it again.
    Statistics, thresholds and choices count nothing. ValueError for a mode it does not know.
    """
    pairs = rows * (keys - (rows - 1) / 2)
    product = 2.0 * HEAD_DIM
    ranked = rows * min(params["candidates"], keys) * heads
    routed = pairs * (heads / params["route_block"] + params["active_heads"] * (1 + 1 / SAMPLE))
    moved = keys * KEY_BYTES + rows * (heads * (HEAD_DIM + 4) + TOP_K * 4.0)
    if mode == "native":
        return Work(product * heads * pairs, moved + 8.0 * pairs)
    if mode == "misa":
        return Work(product * routed, moved)
    if mode in ("misa_rerank", "misa_rerank_pages"):
        return Work(product * (routed + ranked), moved)
    if mode == "hisa":
        blocks = heads * (pairs / params["block_size"] + rows * min(params["top_blocks"] * params["block_size"], keys))
        return Work(product * blocks, moved)
    if mode == "group_rerank":
        return Work(product * (heads * pairs / params["group"] + ranked), moved)
    raise ValueError(f"mode={mode!r} must be native, misa, misa_rerank, misa_rerank_pages, hisa or group_rerank")


def reached(result: Mapping[str, Any], params: Mapping[str, Any], flops: float, bandwidth: float) -> dict[str, float]:
    """TFLOP/s, GB/s and share of the roofline of one result of bench_stage: the least time over the measured one."""
    work = least_work(result["mode"], result["rows"], result["keys"], result["heads"], params)
    seconds = result["ms"] / 1e3
    return {
        "tflops": work.flops / seconds / 1e12,
        "gb_s": work.bytes / seconds / 1e9,
        "roofline": max(work.flops / flops, work.bytes / bandwidth) / seconds,
    }


def report(results: Iterable[Mapping[str, Any]], params: Mapping[str, Any], flops: float, bandwidth: float) -> str:
    """A table, one line a case and mode."""
    rows: list[list[float | str | None]] = []
    for one in results:
        got = reached(one, params, flops, bandwidth)
        case = f"{one['heads']} x {one['rows']} x {one['keys']}"
        times = [f"{one['ms']:.3f}", f"{one['times_native']:.2f}x", f"{one['scratch_gib']:.2f}"]
        rows.append([case, one["mode"], *times, f"{got['tflops']:.0f}", f"{got['gb_s']:.0f}", f"{got['roofline']:.0%}"])
    return table(["H x rows x keys", "mode", "ms", "native", "GiB", "TFLOP/s", "GB/s", "roofline"], rows)


def draw(path: Path, results: list[Mapping[str, Any]], title: str) -> None:
    """Time against native by context, a panel for each number of heads and rows, a line for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((one["heads"], one["rows"]) for one in results))
    modes = list(dict.fromkeys(one["mode"] for one in results if one["mode"] != "native"))
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(3.6 * len(cases), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (heads, rows) in zip(axes[0], cases):
        for mode in modes:
            points = sorted(
                (one["keys"], one["times_native"])
                for one in results
                if (one["heads"], one["rows"], one["mode"]) == (heads, rows, mode)
            )
            axis.plot([keys / 1024 for keys, _ in points], [gain for _, gain in points], marker="o", label=mode)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"H={heads}, {rows} rows", xlabel="context (1024 tokens)", xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({one["keys"] / 1024 for one in results}), [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(gains := [0.5, 1, 2, 3, 5, 10], [f"{gain:g}x" for gain in gains])
    axes[0][0].set(ylabel="times native")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="what bench_stage.py wrote")
    parser.add_argument("--plot", type=Path, help="draw the times here (PNG)")
    parser.add_argument("--tflops", type=float, default=PEAK_FLOPS / 1e12, help="peak fp8 (default: %(default)s)")
    parser.add_argument("--gb-s", type=float, default=PEAK_BYTES / 1e9, help="memory (default: %(default)s)")
    args = parser.parse_args()
    try:
        record = json.loads(args.stage.read_text())
        print(report(record["results"], record["params"], args.tflops * 1e12, args.gb_s * 1e9))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.stage} is not what bench_stage.py writes: {error!r}", file=sys.stderr)
        return 2
    if args.plot:
        run = record["run"]
        draw(args.plot, record["results"], f"selection stage, {run['gpu']}, commit {(run['commit'] or 'unknown')[:8]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
