"""The scheduler-aware stage: settings, one decision and plan per forward, counters. One per process."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from indexer_kernels.top_k import TopK
from sglang_ext import __version__, policy, statistics
from sglang_ext.counters import Counters
from sglang_ext.forwards import (
    Forward,
    Prompts,
    capturing,
    keep_forward,
    kept_forward,
    plan_decode_rows,
    plan_prefill,
    prompt_lengths,
    share_with_others,
)
from sglang_ext.layer_settings import LayerSettings, Variant
from sglang_ext.model_settings import settings_of_model
from sglang_ext.policy import BatchView, Decision, choose
from sglang_ext.runner import OutputForm, run
from sglang_ext.runtime_switch import MODE_NUMBERS, RuntimeSwitch
from sglang_ext.settings import Settings
from sglang_ext.shadow import Shadow
from sglang_ext.statistics import PoolStatistics, Statistics
from sglang_ext.support import Support
from sglang_ext.trace_capture import TracePlan, TraceWriter

logger = logging.getLogger("sglang_ext")


class Model(NamedTuple):
    """What an indexer says of its model."""

    num_heads: int
    head_dim: int
    top_k: int


class Stage:
    """Decides and runs. `attention` is SGLang's per-forward metadata, on which decision and plan are kept."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], top_k_kernel: TopK | None = None) -> None:
        self.settings = settings
        self._switch = RuntimeSwitch()
        self._layer_settings = LayerSettings()
        self._refused: set[str] = set()  # reasons for which a model was refused as it was built
        self.counters = Counters()
        self.shadow = Shadow.of(settings)
        self._environ = environ
        self._top_k_kernel = top_k_kernel
        self._models: set[Model] = set()
        self._layers: set[int] = set()
        self._prompts: Prompts | None = None
        self._traces: TraceWriter | None = None
        self.support = Support()
        self.statistics = Statistics()
        self._no_statistics: str | None = None  # why there can be none, or none any more

    def start(
        self,
        model_config: Mapping[str, Any],
        layer_id: int,
        num_heads: int,
        head_dim: int,
        top_k: int,
        device: torch.device,
    ) -> None:
        """Called as each indexer is built: read the model config's settings, compile its kernels once. The first model
        is the served one, and a draft model has its settings. Raises ValueError for a wrong setting, RuntimeError under
        strict for a mode that no forward could run.
        """
        self._layers.add(layer_id)
        model = Model(num_heads, head_dim, top_k)
        if model in self._models:
            return
        if not self._models:
            settings = settings_of_model(self.settings, model_config, self._environ, num_heads, top_k)
            if settings is not self.settings:
                self.settings, self.shadow = settings, Shadow.of(settings)
            logger.info("active: %s", self.settings)  # not before: SGLang sets up its log after plugins
            for phase, reason in policy.always_native(self.settings).items():
                if not self._asks(phase):
                    logger.warning("%s mode auto is SGLang's own indexer with these settings: %s", phase, reason)
            if self.settings.trace_dir is not None:
                self._traces = TraceWriter(self.settings.trace_dir, self.settings.trace_rows, model_config)
        self._models.add(model)
        if device.type != "cuda" or head_dim != 128 or top_k > 2048:
            return
        self.counters.prepare_device(device)
        if self.shadow is not None:
            self.shadow.overlaps.prepare(device)
        q = torch.empty((0, num_heads, head_dim), dtype=torch.float8_e4m3fn, device=device)
        variants = [one.settings for one in self._layer_settings.all(self.settings)]
        self.support.prepare(variants, q, top_k)
        reading = [settings for settings in variants if policy.needs_statistics(settings)]
        if reading and len(self._models) == 1:  # a draft model that is refused has its reason in its own forwards
            refused = all(self.support.phase_refusal(settings, "decode", q, top_k) for settings in reading)
            self._no_statistics = "no_kernel" if refused else None

    def refuse_model(self, reason: str, because: str = "") -> None:
        """A model whose indexer is not hooked, or by others too: the end of the server under strict, if any mode was
        asked for.
        """
        self._refused.add(reason)
        if self._asks("prefill") or self._asks("decode"):
            self._reject(f"{policy.UNSUPPORTED[reason]}{because and ': '}{because} ({reason})")

    def knows_model(self) -> bool:
        """Whether an indexer was built, hooked or refused."""
        return bool(self._models or self._layers or self._refused)

    def _obstacle(self) -> str | None:
        return "other_plugin" if "other_plugin" in self._refused else None

    def _asks(self, phase: str) -> bool:
        return any(policy.asks(phase, one.settings) for one in self._layer_settings.all(self.settings))

    def wants_prompts(self) -> bool:
        """Whether anything needs to know how long each prompt is."""
        return self.settings.native_tail_rows > 0 or self._traces is not None

    def note_prompts(self, seen: Sequence[int], extend: Sequence[int], whole: list[int]) -> None:
        """The requests of the batch whose forward comes next, for native_tail_rows and traces."""
        self._prompts = Prompts(tuple(seen), tuple(extend), whole)

    def tail_starts(self, seen: Sequence[int], extend: Sequence[int]) -> Sequence[int]:
        """Per request of a prefill the first position that native_tail_rows keeps native, or one that it never sees."""
        tail, whole = self.settings.native_tail_rows, prompt_lengths(self._prompts, tuple(seen), extend)
        return [length - tail for length in whole] if tail and whole else seen

    def prefill(
        self,
        attention: object,
        extend_lengths: Sequence[int],
        lengths: Callable[[], torch.Tensor],
        page_table: torch.Tensor,
        q: torch.Tensor,
        layer_id: int,
        unsupported: Callable[[], str | None],
    ) -> Forward:
        """The forward's decision and plan, made at the first layer of those that share their settings. lengths() is
        SGLang's CPU copy: no device read.
        """
        variant = self._variant(layer_id)
        forward = kept_forward(attention, variant.number)
        if forward is not None:
            return forward
        seen = tuple(int(length) for length in lengths().tolist())
        extend = [int(length) for length in extend_lengths]
        rows = sum(extend)
        view = BatchView("prefill", rows, seen, max(seen, default=0), heads=q.shape[1])
        settings = variant.settings
        if policy.asks("prefill", settings):
            view = self._supported(settings, view._replace(unsupported=self._obstacle() or unsupported()), q)
            if view.unsupported is None and not (
                len(seen) == len(extend) == page_table.shape[0] and rows <= q.shape[0]
            ):
                view = view._replace(unsupported="rows_mismatch")
        forward = Forward("prefill", self._decide(view, variant), rows)
        shared = share_with_others(attention, forward)
        if forward.decision.mode != "native" and not forward.parts:
            whole = prompt_lengths(self._prompts, seen, extend)
            plan_prefill(forward, seen, extend, settings.native_tail_rows, whole, q.device)
        if self._traces is not None and not shared:
            fits = len(seen) == len(extend) == page_table.shape[0] and rows <= q.shape[0]
            obstacle = "graph_capture" if capturing(q.device) else unsupported() if fits else "rows_mismatch"
            self._plan_trace(self._traces, forward, seen, extend, obstacle)
        keep_forward(attention, forward, variant.number)
        return forward

    def decode(
        self,
        attention: object,
        lengths: torch.Tensor,
        page_table: torch.Tensor,
        num_rows: int,
        q: torch.Tensor,
        layer_id: int,
        unsupported: Callable[[], str | None],
    ) -> Forward:
        """Like `prefill`, from device lengths, which are never read back: this may run inside graph capture.

        A plan is made in the eager runs before a capture, and then kept.
        """
        variant = self._variant(layer_id)
        kept = kept_forward(attention, variant.number)
        if kept is not None and kept.planned_from((lengths, page_table), num_rows):
            kept.enter(layer_id)
            return kept
        view = BatchView("decode", num_rows, None, page_table.shape[1] * 64)
        if policy.asks("decode", variant.settings):
            view = self._supported(variant.settings, view._replace(unsupported=self._obstacle() or unsupported()), q)
            if view.unsupported is None and not lengths.shape[0] == page_table.shape[0] == num_rows <= q.shape[0]:
                view = view._replace(unsupported="rows_mismatch")
        decision = self._decide(view, variant)
        forward = Forward("decode", decision, num_rows, made_of=(lengths, page_table), layer=layer_id)
        if decision.mode == "native" or plan_decode_rows(forward, lengths, page_table):
            keep_forward(attention, forward, variant.number)
        return forward

    def takes(self, forward: Forward, layer_id: int) -> bool:
        """Whether this layer runs the forward's mode. Counts the call either way."""
        mode, reason = forward.decision
        if layer_id in (self._layer_settings.first(self.settings, layer_id, self._layers), -1):
            self.counters.count_forward(forward.phase, mode, reason)
        if mode != "native" and layer_id in self.settings.native_layers:
            mode, reason = "native", policy.NATIVE_LAYER
        elif self.shadow is not None and self.shadow.returned(forward.phase, mode, layer_id):
            mode, reason = "native", policy.GUARD
        self.counters.count(forward.phase, mode, reason, forward.num_rows)
        return mode != "native"

    def write_trace(
        self,
        forward: Forward,
        layer_id: int,
        q: torch.Tensor,
        weights: torch.Tensor,
        k_pages: torch.Tensor,
        page_table: torch.Tensor,
    ) -> None:
        """Keep this layer's part of the forward's trace, if it has one. Waits for the device; never raises."""
        if forward.trace is None or self._traces is None:
            return
        try:
            self._traces.write(forward.trace, layer_id, q, weights, k_pages, page_table)
            self.counters.count_trace()
        except Exception:  # a full disk or an odd tensor must not end a server that only watches
            if self.counters.skip_trace("write_error"):
                logger.exception("a trace could not be written to %s", self.settings.trace_dir)

    def run(
        self,
        forward: Forward,
        layer_id: int,
        q: torch.Tensor,
        weights: torch.Tensor,
        k_pages: torch.Tensor,
        page_table: torch.Tensor,
        form: OutputForm,
        out: torch.Tensor,
        page_means: torch.Tensor | None = None,
        update_means: bool = False,
    ) -> None:
        """Fill out with the selection of this layer's queries. page_means: its stored block statistics, if any;
        update_means: `step_means` is part of the selection.
        """
        if q.device.type == "cuda":
            if capturing(q.device):
                self.counters.count_capture(forward.phase, forward.decision.mode, forward.num_rows)
            back = self.shadow.all_returned(forward.phase, forward.decision.mode) if self.shadow is not None else ()
            if layer_id == self._layer_settings.first(self.settings, layer_id, self._layers, back):
                self.counters.step_device(forward.phase, forward.decision.mode, q.device)
        settings = self._variant(layer_id).settings
        params = settings.params(out.shape[1])
        for mode, rows in forward.parts:
            run(
                mode,
                rows,
                q,
                weights,
                k_pages,
                page_table,
                params,
                form,
                settings.backend,
                self._top_k_kernel if q.device.type == "cuda" else None,
                out,
                page_means if mode in policy.STATISTICS_MODES else None,
                update_means and mode in policy.STATISTICS_MODES,
            )

    def wants_statistics(self) -> bool:
        """Whether decode may read stored block statistics: asked once the model is built, where pools are sized."""
        variants = self._layer_settings.all(self.settings)
        return self._no_statistics is None and any(policy.needs_statistics(one.settings) for one in variants)

    def allocate_statistics(
        self,
        cache: object,
        keys: Sequence[torch.Tensor],
        start_layer: int,
        memory: AbstractContextManager[Any] | None = None,
    ) -> PoolStatistics:
        """Memory for the block statistics of a cache's keys, one buffer a layer, and for what is counted of them.

        memory: where the buffers are allocated; the counters, which outlive what they count, are not.
        """
        for buffer in keys[:1]:
            self.counters.prepare_integrity(buffer.device)
        with memory or nullcontext():
            return self.statistics.allocate(cache, keys, start_layer)

    def refuse_statistics(self, reason: str) -> None:
        """A pool has no block statistics: said at once, and the end of the server under strict."""
        variants = [one.settings for one in self._layer_settings.all(self.settings)]
        reading = next((settings for settings in variants if policy.needs_statistics(settings)), self.settings)
        self._reject(f"decode mode {reading.phase_mode('decode')!r}: {policy.UNSUPPORTED[reason]} ({reason})")

    def statistics_obstacle(self, kept: PoolStatistics | str | None, layer_id: int) -> str | None:
        """The policy's reason why a layer's decode cannot read these statistics, if its mode reads any."""
        settings = self._variant(layer_id).settings
        if not policy.needs_statistics(settings):
            return None
        if self._no_statistics is not None:
            return self._no_statistics
        if not policy.reads_whole_pages(settings):
            return "block_size"
        return None if isinstance(kept, PoolStatistics) else kept or "no_statistics"

    def fill_means(
        self,
        kept: PoolStatistics,
        layer_id: int,
        k_pages: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        trusted: torch.Tensor | None = None,
    ) -> None:
        """`statistics.fill` of a layer, after its keys are stored."""
        checks = self.counters if self.settings.check_integrity else None
        statistics.fill(kept.of_layer(layer_id), k_pages, page_table, lengths, checks, trusted)

    def step_means(
        self,
        kept: PoolStatistics,
        layer_id: int,
        k_pages: torch.Tensor,
        page_table: torch.Tensor,
        row_lengths: torch.Tensor,
    ) -> None:
        """`statistics.step`. Rows without a page table end their use; RuntimeError where captured graphs read them."""
        if row_lengths.shape[0] != page_table.shape[0]:
            self._no_statistics = "statistics_lost"
            statistics.check_no_graph_reads(self.counters.captured("decode", policy.STATISTICS_MODES))
            self.refuse_statistics(self._no_statistics)
            return
        checks = self.counters if self.settings.check_integrity else None
        statistics.step(kept.of_layer(layer_id), k_pages, page_table, row_lengths, checks)

    def status(self) -> dict[str, object]:
        """Plain values for /server_info."""
        return {
            "version": __version__,
            "settings": self.settings.as_dict(),
            "modes": {phase: self.settings.phase_mode(phase) for phase in ("prefill", "decode")},
            "mode_numbers": dict(MODE_NUMBERS) if self.settings.runtime_switch else {},
            "indexer_layers": len(self._layers),
            "refused": sorted(self.support.rejected),
            "statistics": self.statistics.status(),
            **self.counters.snapshot(),
            **({"shadow": self.shadow.status()} if self.shadow is not None else {}),
        }

    def prefill_mode_number(self, value: float) -> str:
        """The mode that a number of `mode_numbers` names; ValueError for another value."""
        return self._switch.mode(self.settings, value)

    def switch_prefill(self, value: float) -> None:
        """Another prefill mode from the next forward on. Raises ValueError as `prefill_mode_number` does."""
        self.settings = self._switch.switched(self.settings, value)

    def _variant(self, layer_id: int) -> Variant:
        return self._layer_settings.of(self.settings, layer_id)

    def _decide(self, view: BatchView, variant: Variant) -> Decision:
        decision = choose(view, variant.settings)
        if decision.reason == policy.CONFIGURED_NATIVE and self.settings.phase_mode(view.phase) != "native":
            return Decision("native", policy.NATIVE_LAYER)  # the layer's own doing
        if decision.reason in policy.UNSUPPORTED:
            self.support.reject(
                self.settings, f"{view.phase}: {policy.UNSUPPORTED[decision.reason]} ({decision.reason})"
            )
        return decision

    def _supported(self, settings: Settings, view: BatchView, q: torch.Tensor) -> BatchView:
        return self.support.narrow(settings, view, q, self.settings_top_k())

    def _reject(self, sentence: str) -> None:
        self.support.reject(self.settings, sentence)

    def settings_top_k(self) -> int:
        """Tokens the served model selects (the largest, where a draft model differs)."""
        return max((model.top_k for model in self._models), default=2048)

    def _plan_trace(
        self, traces: TraceWriter, forward: Forward, seen: tuple[int, ...], extend: list[int], obstacle: str | None
    ) -> None:
        plan = obstacle or traces.plan(seen, extend, prompt_lengths(self._prompts, seen, extend), self.settings_top_k())
        if isinstance(plan, TracePlan):
            forward.trace = plan
        elif self.counters.skip_trace(plan):
            logger.info("no trace of this forward: %s", plan)
