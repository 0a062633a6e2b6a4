"""Averages of finished samples per mode and cell, as data and as a plain table."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def cell_means(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per mode and cell: number of samples, mean score in percent, its standard error (None for one sample)."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        scores[sample["mode"], sample["cell"]].append(100 * sample["score"])
    return [
        {
            "mode": mode,
            "cell": cell,
            "samples": len(values),
            "score": statistics.fmean(values),
            "standard_error": statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        }
        for (mode, cell), values in scores.items()
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[float | str | None]]) -> str:
    """Aligned columns; numbers with one digit after the point, a dash for None."""

    def shown(value: float | str | None) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:.1f}"

    cells = [list(head), *([shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = (text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths)))
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)
