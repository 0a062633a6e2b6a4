"""The plugin's metrics on SGLang's /metrics: made beside SGLang's own, brought up to date whenever those are."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from sglang_ext.metrics import Metrics
from sglang_ext.stage import Stage

logger = logging.getLogger("sglang_ext")

COLLECTOR = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"


def has_collector() -> bool:
    """Whether this SGLang keeps its metrics where the hooks look for them; without them the plugin exports none."""
    try:
        return importlib.util.find_spec(COLLECTOR.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


def after_collector_init(_stage: Stage) -> Callable[..., None]:
    """Hook that makes the metrics, with SGLang's labels and library, and keeps them on its collector."""

    def hook(_result: None, collector: Any, *_args: Any, **_kwargs: Any) -> None:
        # Not before: SGLang sets PROMETHEUS_MULTIPROC_DIR, which the library reads as it is imported.
        import prometheus_client

        counter = getattr(collector, "_counter_cls", None) or prometheus_client.Counter
        gauge = getattr(collector, "_gauge_cls", None) or prometheus_client.Gauge
        collector.sglang_ext_metrics = Metrics(collector.labels, counter, gauge)

    return hook


def after_log_stats(stage: Stage) -> Callable[..., None]:
    """Hook on SGLang's own interval: at the log of a prefill, every few decodes, and now and then where idle."""

    def hook(_result: None, collector: Any, *_args: Any, **_kwargs: Any) -> None:
        metrics: Metrics | None = getattr(collector, "sglang_ext_metrics", None)
        if metrics is None:
            return
        try:
            metrics.update(stage.settings, stage.counters, stage.shadow)
        except Exception:  # what only shows a server must not end it
            collector.sglang_ext_metrics = None
            logger.exception("the plugin's metrics are no longer updated after an error")

    return hook
