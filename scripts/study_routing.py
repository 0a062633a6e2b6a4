"""Which cheap statistic of a block of keys routes heads best? On traces, against the same number of candidates.

    python scripts/study_routing.py [--traces FILE] [--heads 8] [--candidates 8192 12288] [--json OUT.json]

For each statistic the routed heads of every row score all tokens, the best `candidates` are kept, and the share of
native's tokens among them is what misa_rerank would find (all heads keep native's tokens in any set that holds them).
Block statistics over full blocks, r[h] = the largest value of a block unless the name says sum:

    mean       | w relu(q . mean) |, what the kernels have
    signed       w relu(q . mean): heads with a negative gate are never routed
    spread     | w relu(q . mean + sqrt(sum_d q_d^2 var_d)) |
    bounds     | w relu(sum_d max(q_d high_d, q_d low_d)) |, per-channel extremes (Quest, arXiv 2406.10774)
    keys       | w relu(q . key) | of one key of every 16, no block at all
    oracle     sum over native's tokens of w relu(q . key): knows the answer, a limit for any routing
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from indexer_kernels.reference.routing import route_heads
from indexer_kernels.traces import Trace, embedded_traces, load_traces
from run_record import run_record

TOP_K = 2048
FORCED = (64, 128)  # tokens at the beginning and the end of a row that are candidates anyway


class Row:
    """One query row: q [H, 128], gates w [H], keys [L, 128] with their scales folded in, and each head's scores."""

    def __init__(self, trace: Trace, row: int) -> None:
        length = int(trace.positions[row]) + 1
        self.q, self.w = trace.q[row].float(), trace.weights[row]
        self.keys = trace.k[:length].float() * trace.k_scale[:length, None]
        self.by_head = torch.relu(self.q @ self.keys.T) * self.w[:, None]
        self.native = self.by_head.sum(0).topk(min(TOP_K, length)).indices

    def blocks(self, size: int) -> torch.Tensor:
        count = len(self.keys) // size
        return self.keys[: count * size].view(count, size, -1)


def by_mean(size: int, reduce: str = "max", signed: bool = False) -> Callable[[Row], torch.Tensor]:
    def routing(row: Row) -> torch.Tensor:
        strength = torch.relu(row.q @ row.blocks(size).mean(1).T) * row.w[:, None]
        strength = strength if signed else strength.abs()
        return strength.sum(1) if reduce == "sum" else strength.amax(1)

    return routing


def by_spread(size: int) -> Callable[[Row], torch.Tensor]:
    def routing(row: Row) -> torch.Tensor:
        blocks = row.blocks(size)
        reach = row.q @ blocks.mean(1).T + (row.q.square() @ blocks.var(1, correction=0).T).sqrt()
        return (torch.relu(reach) * row.w.abs()[:, None]).amax(1)

    return routing


def by_bounds(size: int) -> Callable[[Row], torch.Tensor]:
    def routing(row: Row) -> torch.Tensor:
        blocks = row.blocks(size)
        high, low = blocks.amax(1), blocks.amin(1)
        reach = row.q.clamp_min(0) @ high.T + row.q.clamp_max(0) @ low.T
        return (torch.relu(reach) * row.w.abs()[:, None]).amax(1)

    return routing


STATISTICS: dict[str, Callable[[Row], torch.Tensor]] = {
    "mean, sum, 1024": by_mean(1024, "sum"),
    "mean, sum, 128": by_mean(128, "sum"),
    "mean, 1024": by_mean(1024),
    "mean, 256": by_mean(256),
    "mean, 128": by_mean(128),
    "mean, 64": by_mean(64),
    "signed, 128": by_mean(128, signed=True),
    "spread, 128": by_spread(128),
    "spread, 1024": by_spread(1024),
    "bounds, 128": by_bounds(128),
    "keys, 1 of 16": lambda row: row.by_head[:, ::16].abs().amax(1),
    "oracle": lambda row: row.by_head[:, row.native].sum(1),
}


def found(row: Row, routing: torch.Tensor, heads: int, candidates: int) -> float:
    """Share of native's tokens among the candidates that the best `heads` heads by `routing` choose."""
    routed = route_heads(routing[None], heads)[0]
    scores = row.by_head[routed].sum(0)
    scores[: FORCED[0]] = float("inf")
    scores[-FORCED[1] :] = float("inf")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.topk(min(candidates, len(scores))).indices] = True
    return float(kept[row.native].float().mean())


def study(traces: list[Trace], heads: list[int], candidates: list[int]) -> list[dict]:
    """One entry per statistic, heads, candidates, context and layer: the mean share over the trace's rows."""
    entries = []
    for trace in traces:
        rows = [Row(trace, row) for row in range(trace.q.shape[0]) if int(trace.positions[row]) >= max(candidates)]
        if not rows:
            continue
        for name, statistic in STATISTICS.items():
            routings = [statistic(row) for row in rows]
            for number in heads:
                for budget in candidates:
                    shares = [found(row, routing, number, budget) for row, routing in zip(rows, routings)]
                    entries.append(
                        {
                            "statistic": name,
                            "heads": number,
                            "candidates": budget,
                            "context": trace.nominal_context,
                            "layer": trace.layer,
                            "recall": sum(shares) / len(shares),
                            "worst": min(shares),
                        }
                    )
    return entries


def table(entries: list[dict]) -> str:
    """A line per statistic, heads and candidates: recall by layer, then the mean."""
    lines: dict[tuple, list[dict]] = {}
    for entry in entries:
        lines.setdefault((entry["statistic"], entry["heads"], entry["candidates"]), []).append(entry)
    shown = []
    for (name, heads, candidates), group in lines.items():
        layers = "  ".join(f"{entry['recall']:.4f}" for entry in group)
        mean = sum(entry["recall"] for entry in group) / len(group)
        shown.append(f"{name:16s} {heads:3d} heads {candidates:6d} candidates  {layers}  mean {mean:.4f}")
    return "\n".join(shown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=embedded_traces(), help="default: the package's")
    parser.add_argument("--heads", type=int, nargs="+", default=[8])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8192, 12288])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    entries = study(load_traces(args.traces), args.heads, args.candidates)
    if not entries:
        print(
            f"study_routing: error: no row of {args.traces} sees more than {max(args.candidates)} tokens",
            file=sys.stderr,
        )
        return 2
    print(table(entries))
    if args.json:
        args.json.write_text(json.dumps({"run": run_record(), "entries": entries}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
