"""Two results of `bench_modes.py` side by side: a table on the console and an HTML page."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_html import Cell, number, page, table, tag
from bench_report import (
    HEADLINES,
    WORKLOAD,
    Result,
    WorkloadKey,
    judged,
    metric_of,
    times_better,
    workload_cells,
    workload_key,
)
from eval_report import table as text_table

HEAD = ("tool", *WORKLOAD, "mode", "metric", "old", "new", "times better")


def read_bench(path: Path) -> dict[str, Any]:
    """A bench.json; ValueError naming the file where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path} cannot be read as a bench.json: {error}") from error
    if not isinstance(content, dict) or content.get("what") != "bench_modes":
        raise ValueError(f"--compare {path} is no bench.json of bench_modes.py")
    return content


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[list[str]]:
    """[name, old, new] of what the two runs did not share: commit, machine, versions, settings, servers."""
    sides = [
        {**{name: run[name] for name in ("commit", "gpu", "packages", "command")}, **content["settings"]}
        | {"how": content["how"], "unfinished": content.get("unfinished")}
        | {f"server of {mode}": entry["server"] for mode, entry in content["servers"].items()}
        for content in (old, new)
        for run in [content["run"]]
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [
        [name, *(json.dumps(side.get(name)) for side in sides)]
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[list[Cell]], list[str]]:
    """(rows of HEAD for what both measured, what only one did). ValueError where they share nothing."""
    sides: list[dict[tuple[WorkloadKey, str], Result]]
    sides = [{(workload_key(r), r["mode"]): r for r in content["results"] if r["values"]} for content in (old, new)]
    rows = []
    for key in (key for key in sides[0] if key in sides[1]):
        workload, mode = key
        for name in HEADLINES[workload[0]]:
            metric = metric_of(workload[0], name)
            before, after = (side[key]["values"][name] for side in sides)
            medians = statistics.median(before), statistics.median(after)
            ratio = times_better(medians[1], medians[0], metric.better)
            shown = Cell("-" if ratio is None else f"{ratio:.2f}x", judged(after, before, metric.better))
            texts = [
                workload[0],
                *workload_cells(workload),
                mode,
                f"{metric.title}, {metric.unit}",
                *map(number, medians),
            ]
            rows.append([*map(Cell, texts), shown])
    if not rows:
        raise ValueError("--compare: the two results have no workload and mode in common")
    single = [
        f"only in {side}: {workload[0]}, {', '.join(workload_cells(workload))}, {mode}"
        for side, mine, other in (("old", sides[0], sides[1]), ("new", sides[1], sides[0]))
        for workload, mode in mine
        if (workload, mode) not in other
    ]
    return rows, single


def write_comparison(old: Path, new: Path, out: Path) -> str:
    """Write OUT/compare.html; the same as text. ValueError for files that are no results or share nothing."""
    contents = read_bench(old), read_bench(new)
    rows, single = compared(*contents)
    differ = differing(*contents)
    parts = [
        tag("p", f"Old: {old}. New: {new}. Medians over the repeats."),
        tag("p", "Times better: 2.00x is half the time or twice the throughput; below 1.00x the new run is worse. "
            "Coloured where no repeat of one run lies within those of the other and medians are at least 2 % apart."),
        "<h2>What the runs do not share</h2>",
        table(["", "old", "new"], differ, css="facts") if differ else tag("p", "Nothing: the same in both."),
        "<h2>Measurements</h2>",
        table(HEAD, rows),
        *(tag("p", line, "note") for line in single),
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.html").write_text(page("Two benchmarks of sglang-ext compared", parts))
    notes = [f"{name} differs: {before} / {after}" for name, before, after in differ]
    text = text_table(HEAD, [[cell.text for cell in row] for row in rows])
    return "\n".join([*notes, *single, text, f"wrote {out / 'compare.html'}"])
