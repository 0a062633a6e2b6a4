"""What `compare` shows of its results: a table, a JSON file, a PNG."""

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from indexer_kernels import IndexerParams


class Layer(NamedTuple):
    """Means over the rows of one layer of a model."""

    layer: int
    recall_mean: float
    mass_mean: float


@dataclass(frozen=True, slots=True)
class Result:
    """One mode on one context. Recall: share of native's tokens that were selected; mass: share of the attention that
    the indexer predicts for them; counts are means per row.
    """

    context: int
    mode: str
    rows: int
    recall_mean: float
    recall_min: float
    mass_mean: float
    mass_min: float
    layers: tuple[Layer, ...]  # none for synthetic data
    needles_kept: float | None  # share of the wanted needle tokens native selects; None where native selects none
    tokens_all_heads: float
    tokens_routed: float
    head_products: float
    key_bytes: float
    seconds: float


COLUMNS = (
    "context",
    "mode",
    "recall",
    "min",
    "mass",
    "min",
    "{}",
    "tokens x all",
    "x routed",
    "products",
    "KiB read",
    "ms",
)


def format_table(results: Sequence[Result]) -> str:
    """Columns: mean and worst recall and mass, the layer with the worst recall (synthetic: needles kept), tokens scored
    by all and by routed heads, their products.
    """
    layers = any(result.layers for result in results)
    rows = [tuple(name.format("worst layer" if layers else "needles") for name in COLUMNS)] + [
        (
            f"{result.context}",
            result.mode,
            f"{result.recall_mean:.3f}",
            f"{result.recall_min:.3f}",
            f"{result.mass_mean:.3f}",
            f"{result.mass_min:.3f}",
            _worst_layer(result) if layers else _share(result.needles_kept),
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


def _worst_layer(result: Result) -> str:
    worst = min(result.layers, key=lambda layer: layer.recall_mean)
    return f"{worst.recall_mean:.3f} ({worst.layer})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_json(
    path: Path, results: Sequence[Result], params: IndexerParams, arguments: Mapping[str, Any], device: str, note: str
) -> None:
    """Everything needed to repeat the run, and its rows."""
    content = {
        "what": "sglang-ext compare",
        "note": note,
        "argv": sys.argv[1:],
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "params": asdict(params),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": [asdict(result) | {"layers": [layer._asdict() for layer in result.layers]} for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_plot(path: Path, results: Sequence[Result], note: str) -> None:
    """Three panels over the context length: recall, mass (synthetic: needles kept), products of heads and tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = sorted({result.context for result in results})
    modes = list(dict.fromkeys(result.mode for result in results))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    second: tuple[str, Callable[[Result], float | None]] = (
        ("attention mass of native's tokens, mean over rows", lambda result: result.mass_mean)
        if any(result.layers for result in results)
        else ("needles kept, of those native selects", lambda result: result.needles_kept)
    )
    panels: tuple[tuple[str, Callable[[Result], float | None]], ...] = (
        ("recall of native's tokens, mean over rows", lambda result: result.recall_mean),
        second,
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
    figure.suptitle(note, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
