"""The metrics: what SGLang's real /metrics says of them, and that dashboard and documentation ask for what is there."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")
prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from sglang_ext.metrics import COUNTERS, GAUGES, PREFIX, Metrics, counted
from sglang_ext.overlap import BOUNDS, Key
from sglang_ext.policy import BY_CHOICE
from sglang_ext.settings import Settings
from sglang_ext.sglang_metrics import after_log_stats
from sglang_ext.stage import Stage
from tests.sglang_ext.exposition import LABELS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docker/grafana/sglang-ext.json").read_text())
SCRAPED = {"instance", "job"}  # labels that Prometheus adds

Series = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Name -> (labels, value) of every sample of /metrics."""
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("prometheus"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang_ext.exposition"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    series: Series = {}
    for family in text_string_to_metric_families(done.stdout):
        for sample in family.samples:
            series.setdefault(sample.name, []).append((sample.labels, sample.value))
    return series


def value(series: Series, name: str, **labels: str) -> float:
    [found] = [value for own, value in series[PREFIX + name] if labels.items() <= own.items()]
    return found


def test_every_metric_is_exposed_with_sglangs_labels(exposed):
    assert "sglang:num_running_reqs" in exposed, "SGLang's own are there too"
    ours = {name for name in exposed if name.startswith(PREFIX)}
    assert ours == {PREFIX + name for name in (*COUNTERS, *GAUGES)}
    for name, (labels, _) in {**COUNTERS, **GAUGES}.items():
        for own, _ in exposed[PREFIX + name]:
            assert set(own) == {*LABELS, *labels}, name
            assert own["model_name"] == "tiny" and own["tp_rank"] == "0"


def test_values_after_three_updates(exposed):
    """Each update adds what has come since the one before: nothing is counted twice."""
    misa = {"phase": "prefill", "mode": "misa"}
    assert value(exposed, "forwards_total", **misa, reason="configured") == 3
    assert value(exposed, "calls_total", **misa, reason="configured") == 3
    assert value(exposed, "rows_total", **misa, reason="configured") == 300
    assert value(exposed, "fallbacks_total", phase="prefill", reason="hisparse") == 3
    assert value(exposed, "device_runs_total", **misa) == 3
    assert value(exposed, "integrity_pages_total") == 60 and value(exposed, "integrity_mismatches_total") == 3
    assert value(exposed, "shadow_forwards_total", phase="prefill", outcome="sampled") == 3
    assert value(exposed, "shadow_rows_total", **misa, layer="3") == 4
    assert value(exposed, "shadow_overlap_total", **misa, layer="3") == pytest.approx(3.2)
    assert value(exposed, "shadow_rows_total", **misa, layer="4") == 2
    assert value(exposed, "stage_timed_total", **misa, part="shadow") == 3
    assert value(exposed, "stage_seconds_total", **misa, part="selection") > 0
    assert value(exposed, "configured_mode", **misa) == value(exposed, "guarded_layer", **misa, layer="9") == 1


def test_the_histogram_is_cumulative(exposed):
    """As histogram_quantile takes it: a series per bound, `+Inf` among them, each with the rows of those before."""
    rows = {own["le"]: value for own, value in exposed[PREFIX + "shadow_rows_at_most_total"] if own["layer"] == "3"}
    empty = {"0.25": 0, "0.5": 0}
    assert rows == empty | {"0.7": 2, "0.8": 2, "0.9": 2, "0.95": 2, "0.99": 2, "0.999": 2, "+Inf": 4}
    assert {str(bound) for bound in BOUNDS} == set(rows) - {"+Inf"}


# In this process


def local() -> tuple[Metrics, Any]:
    """Metrics in a registry of their own, and a reader of one series."""
    registry = prometheus_client.CollectorRegistry()
    make = [functools.partial(kind, registry=registry) for kind in (prometheus_client.Counter, prometheus_client.Gauge)]
    metrics = Metrics({"tp_rank": 0}, *make)

    def read(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(PREFIX + name, {"tp_rank": "0", **labels})

    return metrics, read


def test_a_mode_that_is_no_longer_configured():
    stage = Stage(Settings(mode="misa", decode_mode="misa", runtime_switch=True), {})
    metrics, read = local()
    metrics.update(stage.settings, stage.counters, stage.shadow)
    stage.switch_prefill(0)
    metrics.update(stage.settings, stage.counters, stage.shadow)
    modes = [read("configured_mode", phase="prefill", mode=mode) for mode in ("misa", "native")]
    assert modes == [0, 1] and read("configured_mode", phase="decode", mode="misa") == 1


def test_guarded_calls_are_fallbacks_and_configured_ones_are_not():
    stage = Stage(Settings(), {})
    for reason in ("guard", "hisparse", "too_long", "configured_native", "below_break_even", "native_layer"):
        stage.counters.count("prefill", "native", reason, 1)
    fallbacks = [reading for reading in counted(stage.counters, None) if reading.name == "fallbacks_total"]
    assert {(*reading.labels, reading.value) for reading in fallbacks if reading.value} == {
        ("prefill", "guard", 1), ("prefill", "hisparse", 1), ("prefill", "too_long", 1)
    }  # fmt: skip
    # the others stand at 0 from the start, or the first fallback would be no increase
    assert {reading.labels for reading in fallbacks} >= {("decode", "no_statistics"), ("prefill", "no_kernel")}
    assert not {reading.labels[1] for reading in fallbacks} & BY_CHOICE - {"guard"}


def test_an_update_waits_for_no_device(monkeypatch):
    """Of memory on a device only copies that have arrived are read."""
    stage = Stage(Settings(shadow_rate=1.0), {})
    stage.counters.step_device("prefill", "misa", torch.device("cpu"))
    stage.shadow.overlaps.add(Key("prefill", "misa", 0), torch.ones(1, dtype=torch.float64))
    memory = {stage.counters._device_runs.data_ptr(), stage.shadow.overlaps._cells.data_ptr()}
    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)

        def watched(tensor: torch.Tensor, *given: Any, _real: Any = real, **named: Any) -> Any:
            assert tensor.data_ptr() not in memory, "read from the device"
            return _real(tensor, *given, **named)

        monkeypatch.setattr(torch.Tensor, name, watched)
    metrics, read = local()
    metrics.update(stage.settings, stage.counters, stage.shadow)
    assert read("device_runs_total", phase="prefill", mode="misa") == 1
    with pytest.raises(AssertionError, match="read from the device"):
        stage.status()


def test_an_error_ends_the_metrics_only(caplog):
    def fails(*_given: Any) -> None:
        raise OSError("no space left for a counter")

    collector = SimpleNamespace(sglang_ext_metrics=SimpleNamespace(update=fails))
    hook = after_log_stats(Stage(Settings(), {}))
    for _ in range(3):
        hook(None, collector, None)
    [record] = caplog.records
    assert "no longer updated" in record.getMessage() and record.exc_info


# Who asks for them

METRIC = re.compile(r"sglang(?:_ext)?:\w+")
SELECTOR = re.compile(r"(sglang(?:_ext)?:\w+)(?:\{([^}]*)\})?")


def expressions() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    alerts = re.findall(r"^sum by .*$", (ROOT / "docs/monitoring.md").read_text(), flags=re.MULTILINE)
    assert len(found) >= 12 and len(variables) == 2 and len(alerts) == 1
    return found + variables + alerts


@pytest.mark.parametrize("expression", expressions())
def test_queries_name_what_is_exposed(exposed, expression):
    names = METRIC.findall(expression)
    assert names
    for name, matchers in SELECTOR.findall(expression):
        assert name in exposed, f"{name} is not exposed"
        labels = {*exposed[name][0][0], *SCRAPED}
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert asked <= labels, f"{name} has no label {asked - labels}"
    for group in re.findall(r"by \(([^)]*)\)", expression):
        for label in group.split(","):
            assert all(label.strip() in exposed[name][0][0] for name in names), f"{label} in {expression}"


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_panels_are_whole(panel):
    assert panel["description"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for target in panel["targets"]:
        assert target["expr"].count("(") == target["expr"].count(")")
        if target["expr"].startswith(("sum by", "max by", "histogram_quantile", "bottomk")):
            grouped = {
                label.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(",")
            }
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown == grouped - {"le"}, "a legend names what tells its series apart"


def test_a_fallback_at_graph_capture_is_shown():
    """It is counted before the first scrape and never again: increase() and rate() of it are 0 for good."""
    shown = [t["expr"] for p in DASHBOARD["panels"] if p["type"] == "stat" for t in p["targets"]]
    (fallbacks,) = [expression for expression in shown if "fallbacks_total" in expression]
    assert not re.search(r"\b(increase|rate|irate|delta)\(", fallbacks)


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_metric_is_documented():
    text = (ROOT / "docs/monitoring.md").read_text()
    assert not [name for name in (*COUNTERS, *GAUGES) if f"`{name}`" not in text]
    listed = re.findall(r"`(\w+_total|configured_mode|guarded_layer)`", text)
    assert set(listed) == {*COUNTERS, *GAUGES}
