"""The plugin's Prometheus metrics: their names, and the counters they are kept in step with."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sglang_ext import policy
from sglang_ext.counters import Counters
from sglang_ext.overlap import BOUNDS
from sglang_ext.settings import Settings
from sglang_ext.shadow import Shadow

PREFIX = "sglang_ext:"
LAYER = ("phase", "mode", "layer")
REASON = ("phase", "mode", "reason")
FALLBACKS = (*policy.UNSUPPORTED, policy.GUARD)
# name -> (labels besides SGLang's own, meaning). Counters, of which Prometheus takes the rate.
COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "forwards_total": (REASON, "Forwards decided, by mode and reason."),
    "calls_total": (REASON, "Layer calls, by mode and reason. Under a CUDA graph they count at capture."),
    "rows_total": (REASON, "Query rows of the layer calls."),
    "fallbacks_total": (("phase", "reason"), "Layer calls of a requested mode that SGLang's own indexer served."),
    "device_runs_total": (("phase", "mode"), "Forwards that ran a mode, counted by the GPU, graph replays included."),
    "integrity_pages_total": ((), "Pages whose stored block statistics were compared with the keys (check_integrity)."),
    "integrity_mismatches_total": ((), "Pages of them that did not agree."),
    "shadow_forwards_total": (("phase", "outcome"), "Forwards that shadow sampling took, or why it could not."),
    "shadow_rows_total": (LAYER, "Rows that native selected too."),
    "shadow_overlap_total": (LAYER, "Sum of the rows' overlaps, |mode and native| / |native|; over rows: the mean."),
    "shadow_rows_at_most_total": ((*LAYER, "le"), "Rows whose overlap is at most le."),
    "stage_seconds_total": (("phase", "mode", "part"), "Device time of timed layer calls: selection, or shadow."),
    "stage_timed_total": (("phase", "mode", "part"), "Layer calls that were timed."),
}
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "configured_mode": (("phase", "mode"), "1 for the mode that the settings ask for, 0 for those of before."),
    "guarded_layer": (LAYER, "1 for a layer that the guard has taken back to native."),
}


class Reading(NamedTuple):
    """One series: the metric's name without prefix, the values of its labels, its value."""

    name: str
    labels: tuple[str, ...]
    value: float


class Metrics:
    """Metrics of prometheus_client, or of what SGLang uses in its place, under SGLang's own labels."""

    def __init__(
        self, labels: Mapping[str, Any], make_counter: Callable[..., Any], make_gauge: Callable[..., Any]
    ) -> None:
        self._labels = dict(labels)
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._configured: set[tuple[str, ...]] = set()
        self._counters = {
            name: make_counter(name=PREFIX + name, documentation=text, labelnames=[*labels, *own])
            for name, (own, text) in COUNTERS.items()
        }
        self._gauges = {
            name: make_gauge(
                name=PREFIX + name, documentation=text, labelnames=[*labels, *own], multiprocess_mode="mostrecent"
            )
            for name, (own, text) in GAUGES.items()
        }

    def update(self, settings: Settings, counters: Counters, shadow: Shadow | None) -> None:
        """Bring every series to what has been counted. Waits for no device: a value may be that of a moment ago."""
        for name, labels, value in counted(counters, shadow):
            step = value - self._counted.get((name, labels), 0.0)
            if step > 0 or (name, labels) not in self._counted:  # an empty bucket of a histogram is a series too
                self._series(self._counters, COUNTERS, name, labels).inc(step)
                self._counted[(name, labels)] = value
        configured = {(phase, settings.phase_mode(phase)) for phase in ("prefill", "decode")}
        for before in self._configured - configured:
            self._series(self._gauges, GAUGES, "configured_mode", before).set(0)
        for now in configured:
            self._series(self._gauges, GAUGES, "configured_mode", now).set(1)
        self._configured |= configured
        for key in shadow.guard.native if shadow is not None and shadow.guard is not None else ():
            self._series(self._gauges, GAUGES, "guarded_layer", tuple(map(str, key))).set(1)

    def _series(
        self, metrics: dict[str, Any], table: dict[str, tuple[tuple[str, ...], str]], name: str, labels: tuple[str, ...]
    ) -> Any:
        return metrics[name].labels(**self._labels, **dict(zip(table[name][0], labels)))


def counted(counters: Counters, shadow: Shadow | None) -> Iterator[Reading]:
    """What every counter of COUNTERS stands at."""
    snapshot: dict[str, Any] = counters.snapshot(wait=False)
    # All of them from the start: Prometheus sees no increase in a series that begins with its first count.
    fallbacks = {(phase, reason): 0 for phase in ("prefill", "decode") for reason in FALLBACKS}
    for one in snapshot["forwards"]:
        yield Reading("forwards_total", (one["phase"], one["mode"], one["reason"]), one["forwards"])
    for one in snapshot["calls"]:
        labels = (one["phase"], one["mode"], one["reason"])
        yield Reading("calls_total", labels, one["calls"])
        yield Reading("rows_total", labels, one["rows"])
        if one["mode"] == "native" and one["reason"] in FALLBACKS:
            fallbacks[one["phase"], one["reason"]] += one["calls"]
    for key, calls in fallbacks.items():
        yield Reading("fallbacks_total", key, calls)
    for name, runs in snapshot["device_runs"].items():
        yield Reading("device_runs_total", tuple(name.split("/")), runs)
    yield Reading("integrity_pages_total", (), snapshot["integrity_checked"])
    yield Reading("integrity_mismatches_total", (), snapshot["integrity_mismatches"])
    if shadow is not None:
        yield from _shadowed(shadow)


def _shadowed(shadow: Shadow) -> Iterator[Reading]:
    for outcome, forwards in shadow.forwards.items():
        yield Reading("shadow_forwards_total", outcome, forwards)
    for key, total in shadow.overlaps.read().items():
        labels = (key.phase, key.mode, str(key.layer))
        yield Reading("shadow_rows_total", labels, total.rows)
        yield Reading("shadow_overlap_total", labels, total.overlap)
        for bound, rows in zip((*map(str, BOUNDS), "+Inf"), (*total.at_most, total.rows)):
            yield Reading("shadow_rows_at_most_total", (*labels, bound), rows)
    for timed, (number, seconds) in shadow.times.read().items():
        yield Reading("stage_seconds_total", timed, seconds)
        yield Reading("stage_timed_total", timed, number)
