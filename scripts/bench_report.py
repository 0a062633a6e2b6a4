"""The report of `bench_modes.py`: medians per workload and mode, ratios to native, and all that was measured."""

import html
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_html import Cell, legend, length, line_chart, number, page, table, tag
from bench_workloads import METRICS, MODULES, Metric, Workload
from eval_loop import ResultsFile
from eval_report import table as text_table

HEADLINES = {
    "serving": ("median_ttft_ms", "median_tpot_ms", "total_throughput"),
    "one_batch": ("last_ttft_ms", "tpot_ms", "input_throughput"),
}
READ = (
    "Numbers are medians over the repeats. In brackets: how many times better than native, 2.00x being half the time "
    "or twice the throughput. It is coloured only where all repeats of the mode lie on one side of all of native's and "
    "the medians are 2 % apart or more; with one repeat there is no colour, as nothing says how much runs scatter."
)
SHARED = (
    "Shared: the share of a prompt's tokens with which other prompts begin too (serving), or that are in the prefix "
    "cache before the batch arrives (one_batch). Concurrency: clients that each ask one prompt after the other, or "
    "requests of the batch."
)
UNFINISHED = "Unfinished: {measured} of {of} measurements. Workloads that lack one of them in any mode are left out."
READ_FORWARDS = (
    "Forwards as the host counted them: phase/mode (reason). A mode that was asked for ran at least once in every "
    "measurement, as the GPU counted, or the benchmark would have failed; lines of prefill/native under another mode "
    "say how much of it was native all the same, and why. Replayed CUDA graphs of decode count once, at capture."
)
DIFFERS = 0.02  # three repeats a side lie apart by chance in one of ten comparisons; small differences are not shown
WORKLOAD = ("prompt", "concurrency", "shared")
Result = Mapping[str, Any]
WorkloadKey = tuple[str, int, int, float]  # tool, context, concurrency, shared


def results_of(
    results: ResultsFile, modes: Sequence[str], jobs: Iterable[tuple[Workload, str]]
) -> list[dict[str, Any]]:
    """One entry per workload and mode: its measured values, {metric: [one per repeat]}, what ran, and why it was left
    out, if it was. jobs: workload and key of every measurement.
    """
    keys: dict[Workload, list[str]] = {}
    for workload, key in jobs:
        keys.setdefault(workload, []).append(key)
    found = []
    for workload, of_workload in keys.items():
        for mode in modes:
            samples = [results.samples[mode, key] for key in of_workload]
            measured = [sample["values"] for sample in samples if "values" in sample]
            forwards: Counter[str] = Counter()
            for sample in samples:
                forwards.update(sample["forwards"])
            entry = {name: getattr(workload, name) for name in ("tool", "context", "concurrency", "shared")}
            values = {name: [one[name] for one in measured] for name in (measured[0] if measured else ())}
            skipped = next((sample["skipped"] for sample in samples if "skipped" in sample), None)
            found.append({**entry, "mode": mode, "values": values, "forwards": dict(forwards), "skipped": skipped})
    return found


def workload_key(result: Result) -> WorkloadKey:
    """What two results must share to be compared."""
    return result["tool"], result["context"], result["concurrency"], result["shared"]


def metric_of(tool: str, name: str) -> Metric:
    return next(metric for metric in METRICS[tool] if metric.name == name)


def times_better(new: float, old: float, better: int) -> float | None:
    """How many times better `new` is; None where either is 0. better: as in Metric."""
    return None if not new or not old else new / old if better > 0 else old / new


def judged(new: Sequence[float], old: Sequence[float], better: int) -> str:
    """CSS class: `better` or `worse` where repeats (at least two each) do not overlap and medians differ, else none."""
    apart = abs(statistics.median(new) / (statistics.median(old) or 1) - 1) >= DIFFERS
    if min(len(new), len(old)) < 2 or not apart or not (min(new) > max(old) or max(new) < min(old)):
        return ""
    return "better" if (min(new) > max(old)) == (better > 0) else "worse"


def headline_cells(metric: Metric, row: Mapping[str, Result], modes: Sequence[str]) -> list[Cell]:
    """One cell per mode: median, and how many times better than native."""
    cells = []
    native = row["native"]["values"].get(metric.name)
    for mode in modes:
        values = row[mode]["values"].get(metric.name)
        if not values:
            cells.append(Cell("-", "note"))
            continue
        median = statistics.median(values)
        ratio = times_better(median, statistics.median(native), metric.better) if native else None
        if mode == "native" or ratio is None or native is None:
            cells.append(Cell(number(median)))
        else:
            cells.append(Cell(f"{number(median)} ({ratio:.2f}x)", judged(values, native, metric.better)))
    return cells


def by_workload(results: Iterable[Result], tool: str) -> dict[WorkloadKey, dict[str, Result]]:
    """{workload: {mode: result}} of one tool."""
    rows: dict[WorkloadKey, dict[str, Result]] = {}
    for result in results:
        if result["tool"] == tool:
            rows.setdefault(workload_key(result), {})[result["mode"]] = result
    return rows


def write_report(path: Path, content: Mapping[str, Any]) -> str:
    """Write the page of what bench.json holds; the headline tables as text."""
    modes, results = content["modes"], content["results"]
    parts = [tag("p", content["how"]), tag("p", READ), tag("p", SHARED), facts_table(content)]
    if left := content["unfinished"]:
        parts.insert(0, tag("p", UNFINISHED.format(**left), "worse"))
    text = []
    for tool, module in MODULES.items():
        rows = by_workload(results, tool)
        if not rows:
            continue
        parts += [f"<h2>{tool}</h2>", tag("p", f"Measured by {module}.", "note")]
        for name in HEADLINES[tool]:
            metric = metric_of(tool, name)
            title = f"{metric.title}, {metric.unit}"
            shown = [(key, headline_cells(metric, row, modes)) for key, row in rows.items()]
            parts += [f"<h3>{html.escape(title)}</h3>", legend(modes), charts(metric, rows, modes)]
            parts.append(table([*WORKLOAD, *modes], [[*workload_cells(key), *cells] for key, cells in shown]))
            lines = [[*workload_cells(key), *(cell.text for cell in cells)] for key, cells in shown]
            text.append(f"{tool}: {title}\n{text_table([*WORKLOAD, *modes], lines)}")
        parts.append(everything(tool, rows))
    parts += ["<h2>What ran</h2>", what_ran(results), "<h2>Servers</h2>"]
    for mode, entry in content["servers"].items():
        parts += [tag("h3", mode), tag("pre", json.dumps(entry, indent=1))]
    path.write_text(page("SGLang in each mode of sglang-ext", parts))
    return "\n\n".join(text)


def workload_cells(key: WorkloadKey) -> list[str]:
    _, context, concurrency, shared = key
    return [length(context), str(concurrency), f"{100 * shared:g} %"]


def facts_table(content: Mapping[str, Any]) -> str:
    """Commit, machine, versions, command and settings of a bench.json."""
    run = content["run"]
    rows = [
        ["commit", run["commit"] or "not in a git repository"],
        ["GPU of the machine that measured", run["gpu"] or "none seen by nvidia-smi"],
        ["time", run["time"]],
        ["command", run["command"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in run["packages"].items())],
    ]
    said = {name: value for name, value in content["settings"].items() if name not in ("commit", "gpu")}
    rows += [[name, json.dumps(value)] for name, value in said.items() if value not in (None, [])]
    return table([], rows, css="facts")


def charts(metric: Metric, rows: Mapping[WorkloadKey, Mapping[str, Result]], modes: list[str]) -> str:
    """One chart over the context per concurrency and share."""
    drawn = []
    for _, _, concurrency, shared in dict.fromkeys((key[0], 0, *key[2:]) for key in rows):
        series = {
            mode: [
                (key[1], statistics.median(row[mode]["values"][metric.name]))
                for key, row in rows.items()
                if key[2:] == (concurrency, shared) and row[mode]["values"]
            ]
            for mode in modes
        }
        if any(series.values()):
            drawn.append(line_chart(f"concurrency {concurrency}, {100 * shared:g} % shared", metric.unit, series))
    return f'<div class="charts">{"".join(drawn)}</div>'


def everything(tool: str, rows: Mapping[WorkloadKey, Mapping[str, Result]]) -> str:
    """Every measured number: one line per workload and mode, repeats in the order in which they ran."""
    lines = []
    for key, row in rows.items():
        for mode, result in row.items():
            if result["skipped"]:
                lines.append([*workload_cells(key), mode, f"left out by SGLang: {result['skipped']}"])
                continue
            numbers = (" / ".join(number(value) for value in result["values"][m.name]) for m in METRICS[tool])
            lines.append([*workload_cells(key), mode, *numbers])
    head = [*WORKLOAD, "mode", *(f"{metric.title}, {metric.unit}" for metric in METRICS[tool])]
    return f"<details><summary>All measurements of {tool}</summary>\n{table(head, lines)}</details>"


def what_ran(results: Iterable[Result]) -> str:
    """The plugin's decisions during the measurements, warm-up included, per workload and mode."""
    rows = [
        [result["tool"], *workload_cells(workload_key(result)), result["mode"], f"{what}: {count}"]
        for result in results
        for what, count in (result["forwards"] or {"the server runs without the plugin, or counted nothing": 0}).items()
    ]
    return tag("p", READ_FORWARDS, "note") + table(["tool", *WORKLOAD, "mode", "forwards"], rows)
