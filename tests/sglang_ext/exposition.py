"""Prints what /metrics says of a stage that has counted something of everything, through SGLang's real collector.

A program of its own: prometheus_client chooses its storage as it is imported, by PROMETHEUS_MULTIPROC_DIR, and keeps
every metric for the life of the process. Usage: python -m tests.sglang_ext.exposition
"""

from types import SimpleNamespace

import torch
from sglang.srt.observability import metrics_collector
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_ext import sglang_hooks
from sglang_ext.overlap import Key
from sglang_ext.settings import Settings
from sglang_ext.shadow import SAMPLED
from sglang_ext.stage import Stage
from sglang_ext.stage_times import Mark

LABELS = {"model_name": "tiny", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0, "moe_ep_rank": 0}
SCHEDULE = {
    "prefill_delayer_max_delay_passes": 30,
    "prefill_delayer_forward_passes_buckets": None,
    "prefill_delayer_wait_seconds_buckets": None,
}


def count(stage: Stage, layer: int) -> None:
    """One sampled prefill of two layers, and one that fell back."""
    assert stage.shadow is not None
    cpu = torch.device("cpu")
    stage.counters.count_forward("prefill", "misa", "configured")
    stage.counters.count("prefill", "misa", "configured", 100)
    stage.counters.count("prefill", "native", "hisparse", 7)
    stage.counters.step_device("prefill", "misa", cpu)
    stage.counters.count_integrity(torch.tensor(20), torch.tensor(1))
    stage.shadow.forwards[("prefill", SAMPLED)] += 1
    key = Key("prefill", "misa", layer)
    stage.shadow.overlaps.add(key, torch.tensor([0.6, 1.0], dtype=torch.float64))
    stage.shadow.overlaps.send()
    stage.shadow._time(key, "selection", Mark(cpu))
    stage.shadow._time(key, "shadow", Mark(cpu))


def main() -> None:
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess

    # Of a server's published configuration, what the collector asks for.
    metrics_collector.get_schedule = lambda: SimpleNamespace(**SCHEDULE)
    metrics_collector.exports_expert_balancedness_to_prometheus = lambda: False
    stage = Stage(Settings(mode="misa", backend="reference", shadow_rate=1.0, guard_overlap=0.5), {})
    assert stage.shadow is not None and stage.shadow.guard is not None
    stage.shadow.guard.native.add(Key("prefill", "misa", 9))
    sglang_hooks.install(stage)
    HookRegistry.apply_hooks()
    assert sglang_hooks.unapplied(stage) == []
    collector = metrics_collector.SchedulerMetricsCollector(labels=LABELS, server_args=None)
    for layer in (3, 3, 4):
        count(stage, layer)
        collector.log_stats(metrics_collector.SchedulerStats())
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())


if __name__ == "__main__":
    main()
