"""The report and the comparison: well-formed, self-contained, complete, and right about what is better."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bench_modes
from bench_html import line_chart, number
from bench_report import judged, times_better, write_report
from bench_workloads import METRICS

MODES = ["native", "misa<b>", "auto"]
RUN = {"commit": "c0ffee1", "gpu": "NVIDIA H200 & co", "command": "python bench_modes.py --out x", "time": "noon",
       "packages": {"torch": "2.14.1"}}  # fmt: skip


def result(tool: str, context: int, mode: str, first: float) -> dict:
    """Two repeats, 1 % apart, every metric another number."""
    values = {metric.name: [first + place, 1.01 * (first + place)] for place, metric in enumerate(METRICS[tool])}
    workload = {"tool": tool, "context": context, "concurrency": 2, "shared": 0.5}
    return {**workload, "mode": mode, "values": values, "forwards": {f"prefill/{mode} (asked)": 9}, "skipped": None}


@pytest.fixture
def content() -> dict:
    results = [
        result(tool, context, mode, 1000 * context / 16384 + 100 * place + 10 * (tool == "serving"))
        for tool in METRICS
        for context in (16384, 32768)
        for place, mode in enumerate(MODES)
    ]
    results[-1] |= {"values": {}, "skipped": "batch_size=2 does not fit"}
    servers = {mode: {"mode": mode, "server": {"tp_size": 8}, "before": None} for mode in MODES}
    return {"what": "bench_modes", "run": RUN, "settings": {"commit": "c0ffee1", "seed": 5}, "how": "In turns.",
            "unfinished": None, "modes": MODES, "results": results, "servers": servers}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(page: str) -> list[list[str]]:
    """Texts of the cells of all table rows."""
    tree = ElementTree.fromstring(page.partition("\n")[2])
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_well_formed_and_self_contained(content, tmp_path):
    write_report(tmp_path / "r.html", content)
    text = (tmp_path / "r.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    ElementTree.fromstring(text.partition("\n")[2])  # every element closed, every text escaped
    assert not page.names & {"script", "link", "img", "iframe", "object", "b"} and "svg" in page.names
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset", "onload")]
    assert "url(" not in text and "@import" not in text
    for fact in (
        "c0ffee1",
        "NVIDIA H200 & co",
        "python bench_modes.py --out x",
        "torch 2.14.1",
        "In turns.",
        "misa<b>",
    ):
        assert fact in page.text


def test_every_number_is_there(content, tmp_path):
    write_report(tmp_path / "r.html", content)
    rows = rows_of((tmp_path / "r.html").read_text())
    for measured in content["results"]:
        workload = [f"{measured['context'] // 1024}K", "2", "50 %", measured["mode"]]
        if measured["skipped"]:
            assert [*workload, "left out by SGLang: batch_size=2 does not fit"] in rows
            continue
        cells = [f"{number(first)} / {number(second)}" for first, second in measured["values"].values()]
        assert [*workload, *cells] in rows
        assert [measured["tool"], *workload, f"prefill/{measured['mode']} (asked): 9"] in rows


def test_an_unfinished_run_says_so(content, tmp_path):
    write_report(tmp_path / "whole.html", content)
    content["unfinished"] = {"measured": 7, "of": 12}
    write_report(tmp_path / "part.html", content)
    whole, part = (Page((tmp_path / name).read_text()).text for name in ("whole.html", "part.html"))
    assert "Unfinished: 7 of 12 measurements" in part and "Unfinished" not in whole


def test_medians_and_ratios(content, tmp_path):
    for tool, values in (("serving", ([100.0, 120.0], [50.0, 60.0])), ("one_batch", ([100.0, 120.0], [400.0, 480.0]))):
        for name in ("median_ttft_ms", "total_throughput", "last_ttft_ms"):
            for entry in content["results"]:
                if entry["tool"] == tool and name in entry["values"] and entry["context"] == 16384:
                    entry["values"][name] = values[entry["mode"] != "native"]
    shown = write_report(tmp_path / "r.html", content)
    rows = rows_of((tmp_path / "r.html").read_text())
    assert ["16K", "2", "50 %", "110.0", "55.00 (2.00x)", "55.00 (2.00x)"] in rows, "half the time is twice as good"
    assert ["16K", "2", "50 %", "110.0", "55.00 (0.50x)", "55.00 (0.50x)"] in rows, "half the throughput is half"
    assert ["16K", "2", "50 %", "110.0", "440.0 (0.25x)", "440.0 (0.25x)"] in rows
    assert re.search(r"16K +2 +50 % +110\.0 +55\.00 \(2\.00x\)", shown)
    assert len([row for row in rows if row[0] == "32K" and row[-1] == "-"]) == 3, "what was left out shows a dash"
    page = (tmp_path / "r.html").read_text()
    assert '<td class="better">55.00 (2.00x)</td>' in page and '<td class="worse">55.00 (0.50x)</td>' in page


@pytest.mark.parametrize(
    ("new", "old", "better", "css"),
    [
        ([1.0, 2.0], [3.0, 4.0], -1, "better"),
        ([1.0, 2.0], [3.0, 4.0], 1, "worse"),
        ([5.0, 6.0], [3.0, 4.0], -1, "worse"),
        ([1.0, 3.5], [3.0, 4.0], -1, ""),
        ([1.0], [3.0, 4.0], -1, ""),
        ([100.0, 101.0], [101.5, 102.0], -1, ""),
        ([100.0, 101.0], [104.0, 105.0], -1, "better"),
    ],
)
def test_only_what_repeats_agree_on_is_coloured(new, old, better, css):
    assert judged(new, old, better) == css


def test_ratios_say_how_many_times_better():
    assert times_better(50, 100, -1) == 2 and times_better(50, 100, 1) == 0.5 and times_better(0, 1, -1) is None


def test_numbers():
    assert [number(x) for x in (0, 0.012345, 1.5, 123.456, 1234567.8)] == [
        "0",
        "0.01235",
        "1.500",
        "123.5",
        "1,234,568",
    ]


def test_points_of_a_chart():
    chart = line_chart("t", "ms", {"native": [(1024, 0.0), (4096, 4.0)], "misa": [(1024, 2.0)]})
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    (left, zero), (right, four), (middle_left, two) = [(float(x), float(y)) for x, y in circles]
    assert left == middle_left < right and zero > two > four
    assert two == pytest.approx((zero + four) / 2)
    assert "native, 4K: 4.000 ms" in chart


def write(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_comparison(content, tmp_path, capsys):
    new = copy.deepcopy(content)
    new["run"]["commit"] = new["settings"]["commit"] = "beef"
    new["results"][0]["values"]["median_ttft_ms"] = [2 * v for v in content["results"][0]["values"]["median_ttft_ms"]]
    new["results"][0]["values"]["total_throughput"] = [
        v / 4 for v in content["results"][0]["values"]["total_throughput"]
    ]
    del new["results"][1]
    paths = write(tmp_path / "old.json", content), write(tmp_path / "new.json", new)
    assert bench_modes.main(["--compare", *paths, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert 'commit differs: "c0ffee1" / "beef"' in said and "gpu differs" not in said
    assert "only in old: serving, 16K, 2, 50 %, misa<b>" in said
    text = (tmp_path / "out" / "compare.html").read_text()
    rows = rows_of(text)
    assert [
        "serving",
        "16K",
        "2",
        "50 %",
        "native",
        "time to first token, median, ms",
        "1,015",
        "2,030",
        "0.50x",
    ] in rows
    assert ["commit", '"c0ffee1"', '"beef"'] in rows
    ratios = sorted(row[-1] for row in rows if row[0] in METRICS)
    assert ratios[:2] == ["0.25x", "0.50x"] and set(ratios[2:]) == {"1.00x"}
    assert '<td class="worse">0.50x</td>' in text
    assert re.search(r"native +time to first token, median, ms +1,015 +2,030 +0\.50x", said)


def test_an_unfinished_run_is_compared(content, tmp_path, capsys):
    """Also with one of a version that could not be: its record says nothing of it."""
    new = copy.deepcopy(content) | {"unfinished": {"measured": 7, "of": 12}}
    del content["unfinished"]
    paths = write(tmp_path / "old.json", content), write(tmp_path / "new.json", new)
    assert bench_modes.main(["--compare", *paths, "--out", str(tmp_path / "out")]) == 0
    assert 'unfinished differs: null / {"measured": 7, "of": 12}' in capsys.readouterr().out


def test_what_cannot_be_compared(content, tmp_path, capsys):
    good, other = write(tmp_path / "good.json", content), write(tmp_path / "other.json", {"what": "else"})
    assert bench_modes.main(["--compare", good, other, "--out", str(tmp_path)]) == 2
    assert f"--compare {other} is no bench.json" in capsys.readouterr().out
    alien = copy.deepcopy(content)
    for entry in alien["results"]:
        entry["context"] = 7
    assert bench_modes.main(["--compare", good, write(tmp_path / "alien.json", alien), "--out", str(tmp_path)]) == 2
    assert "no workload and mode in common" in capsys.readouterr().out
