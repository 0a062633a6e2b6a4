"""What `compare` shows of its results: a table, a JSON file, a PNG."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from indexer_kernels import IndexerParams

NOTE = (
    "Synthetic data: recall here compares implementations and shows failure modes; it is no claim about model quality."
)


@dataclass(frozen=True, slots=True)
class Result:
    """One mode on one context. Recall: share of native's tokens that were selected; counts are means per row."""

    context: int
    mode: str
    recall_mean: float
    recall_min: float
    needles_kept: float | None  # share of the wanted needle tokens native selects; None where native selects none
    tokens_all_heads: float
    tokens_routed: float
    head_products: float
    key_bytes: float
    seconds: float


COLUMNS = ("context", "mode", "recall", "min", "needles", "tokens x all", "x routed", "products", "KiB read", "ms")


def format_table(results: Sequence[Result]) -> str:
    """Columns: mean and worst recall, needles kept, tokens scored by all and by routed heads, their products."""
    rows = [COLUMNS] + [
        (
            f"{result.context}",
            result.mode,
            f"{result.recall_mean:.3f}",
            f"{result.recall_min:.3f}",
            "-" if result.needles_kept is None else f"{result.needles_kept:.3f}",
            f"{result.tokens_all_heads:,.0f}",
            f"{result.tokens_routed:,.0f}",
            f"{result.head_products:,.0f}",
            f"{result.key_bytes / 1024:,.0f}",
            f"{result.seconds * 1e3:,.1f}",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for number, row in enumerate(rows):
        if number > 1 and row[0] != rows[number - 1][0]:
            lines.append("")
        cells = (
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_json(
    path: Path, results: Sequence[Result], params: IndexerParams, arguments: Mapping[str, Any], device: str
) -> None:
    """Everything needed to repeat the run, and its rows."""
    content = {
        "what": "sglang-ext compare",
        "note": NOTE,
        "argv": sys.argv[1:],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "params": asdict(params),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Three panels over the context length: recall, needles kept, work as a share of native's products."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({result.context for result in results})
    modes = list(dict.fromkeys(result.mode for result in results))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("recall of native's tokens, mean over rows", lambda result: result.recall_mean),
        ("needles kept, of those native selects", lambda result: result.needles_kept),
        ("head-token products per row", lambda result: result.head_products),
    )
    for axis, (title, value) in zip(axes, panels):
        for mode, marker in zip(modes, "osv^Dx"):
            chosen = sorted(
                (result.context, value(result))
                for result in results
                if result.mode == mode and value(result) is not None
            )
            if chosen:
                axis.plot(*zip(*chosen), marker=marker, label=mode, alpha=0.85)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("context, tokens")
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            contexts, [f"{context // 1024}K" if context % 1024 == 0 else str(context) for context in contexts]
        )
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set_ylim(-0.03, 1.03)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=9)
    figure.suptitle(NOTE, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
