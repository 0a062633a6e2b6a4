"""The scheduler-aware stage: settings, one decision and plan per forward, counters. One per process."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from indexer_kernels.params import MODES
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
)
from sglang_ext.policy import BatchView, Decision, choose
from sglang_ext.runner import OutputForm, run
from sglang_ext.settings import SERVE_MODES, Settings, load_settings
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
        self.counters = Counters()
        self.shadow = Shadow.of(settings)
        self._environ = environ
        self._top_k_kernel = top_k_kernel
        self._models: set[Model] = set()
        self._layers: set[int] = set()
        self._prompts: Prompts | None = None
        self._traces: TraceWriter | None = None
        self._support = Support()
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
        """Called as each indexer is built: read the model config's settings, compile its kernels once.

        The first model is the served one; a draft model that follows has the same settings. Raises ValueError for a
        wrong setting, RuntimeError under strict for a mode that no forward could run.
        """
        self._layers.add(layer_id)
        model = Model(num_heads, head_dim, top_k)
        if model in self._models:
            return
        if not self._models:
            self._read_model_config(model_config)
            for phase, reason in policy.always_native(self.settings).items():
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
        modes: list[str] = []
        for phase in ("prefill", "decode"):
            if not policy.asks(phase, self.settings):
                continue
            refusal = self._support.phase_refusal(self.settings, phase, q, top_k)
            if refusal is not None:
                self._reject(f"{phase} mode {self.settings.phase_mode(phase)!r}: {refusal}")
            else:
                modes += [mode for mode in policy.kernel_modes(phase, self.settings) if mode not in modes]
        if self.settings.runtime_switch:  # any of them may be asked for later
            modes += [mode for mode in MODES if mode not in modes and self._refusal(mode, q, top_k) is None]
        if self.settings.backend != "reference":
            self._support.compile(self.settings, modes, num_heads, top_k)
        served = len(self._models) == 1  # a draft model that is refused has its reason in its own forwards
        if served and policy.needs_statistics(self.settings):
            refused = self._support.phase_refusal(self.settings, "decode", q, top_k) is not None
            self._no_statistics = "no_kernel" if refused else None

    def refuse_model(self, reason: str) -> None:
        """A model whose indexer is not hooked: the end of the server under strict, if any mode was asked for."""
        if any(policy.asks(phase, self.settings) for phase in ("prefill", "decode")):
            self._reject(f"{policy.UNSUPPORTED[reason]} ({reason})")

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
        unsupported: Callable[[], str | None],
    ) -> Forward:
        """The forward's decision and plan, made at its first layer. lengths() is SGLang's CPU copy: no device read."""
        forward = kept_forward(attention)
        if forward is not None:
            return forward
        seen = tuple(int(length) for length in lengths().tolist())
        extend = [int(length) for length in extend_lengths]
        rows = sum(extend)
        view = BatchView("prefill", rows, seen, max(seen, default=0), heads=q.shape[1])
        if policy.asks("prefill", self.settings):
            view = self._supported(view._replace(unsupported=unsupported()), q)
            if view.unsupported is None and not (
                len(seen) == len(extend) == page_table.shape[0] and rows <= q.shape[0]
            ):
                view = view._replace(unsupported="rows_mismatch")
        forward = Forward("prefill", self._decide(view), rows)
        if forward.decision.mode != "native":
            whole = prompt_lengths(self._prompts, seen, extend)
            plan_prefill(forward, seen, extend, self.settings.native_tail_rows, whole, q.device)
        if self._traces is not None:
            fits = len(seen) == len(extend) == page_table.shape[0] and rows <= q.shape[0]
            obstacle = "graph_capture" if capturing(q.device) else unsupported() if fits else "rows_mismatch"
            self._plan_trace(self._traces, forward, seen, extend, obstacle)
        keep_forward(attention, forward)
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
        kept = kept_forward(attention)
        if kept is not None and kept.planned_from((lengths, page_table), num_rows):
            kept.enter(layer_id)
            return kept
        view = BatchView("decode", num_rows, None, page_table.shape[1] * 64)
        if policy.asks("decode", self.settings):
            view = self._supported(view._replace(unsupported=unsupported()), q)
            if view.unsupported is None and not lengths.shape[0] == page_table.shape[0] == num_rows <= q.shape[0]:
                view = view._replace(unsupported="rows_mismatch")
        decision = self._decide(view)
        forward = Forward("decode", decision, num_rows, made_of=(lengths, page_table), layer=layer_id)
        if decision.mode == "native" or plan_decode_rows(forward, lengths, page_table):
            keep_forward(attention, forward)
        return forward

    def takes(self, forward: Forward, layer_id: int) -> bool:
        """Whether this layer runs the forward's mode. Counts the call either way."""
        mode, reason = forward.decision
        if layer_id == min(self._layers, default=layer_id):
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
            if layer_id == self._counting_layer():
                self.counters.step_device(forward.phase, forward.decision.mode, q.device)
        params = self.settings.params(out.shape[1])
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
                self.settings.backend,
                self._top_k_kernel if q.device.type == "cuda" else None,
                out,
                page_means if mode in policy.STATISTICS_MODES else None,
                update_means and mode in policy.STATISTICS_MODES,
            )

    def wants_statistics(self) -> bool:
        """Whether decode may read stored block statistics: asked once the model is built, where pools are sized."""
        return policy.needs_statistics(self.settings) and self._no_statistics is None

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
        self._reject(f"decode mode {self.settings.phase_mode('decode')!r}: {policy.UNSUPPORTED[reason]} ({reason})")

    def statistics_obstacle(self, kept: PoolStatistics | str | None) -> str | None:
        """The policy's reason why decode cannot read these statistics, if its mode reads any."""
        if not policy.needs_statistics(self.settings):
            return None
        if self._no_statistics is not None:
            return self._no_statistics
        if self.settings.block_size % 64 or self.settings.route_block % 64:
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
        """`statistics.step` of a layer. Rows that have no page table end the use of statistics: they would go stale."""
        if row_lengths.shape[0] != page_table.shape[0]:
            self._no_statistics = "statistics_lost"
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
            "mode_numbers": _mode_numbers() if self.settings.runtime_switch else {},
            "indexer_layers": len(self._layers),
            "refused": sorted(self._support.rejected),
            "statistics": self.statistics.status(),
            **self.counters.snapshot(),
            **({"shadow": self.shadow.status()} if self.shadow is not None else {}),
        }

    def prefill_mode_number(self, value: float) -> str:
        """The mode that a number of `mode_numbers` names; ValueError for another value. (The route carries numbers
        only.)
        """
        if not self.settings.runtime_switch:
            raise ValueError("the prefill mode cannot be switched: the setting runtime_switch is off")
        if value not in range(len(SERVE_MODES)):
            raise ValueError(f"sglang_ext_prefill_mode={value} must be one of {_mode_numbers()}")
        return SERVE_MODES[int(value)]

    def switch_prefill(self, value: float) -> None:
        """Prefill is never captured, so its mode may change between forwards."""
        mode = self.prefill_mode_number(value)
        logger.info("prefill mode switched from %s to %s", self.settings.phase_mode("prefill"), mode)
        self.settings = replace(self.settings, prefill_mode=mode)

    def _decide(self, view: BatchView) -> Decision:
        decision = choose(view, self.settings)
        if decision.reason in policy.UNSUPPORTED:
            self._support.reject(
                self.settings, f"{view.phase}: {policy.UNSUPPORTED[decision.reason]} ({decision.reason})"
            )
        return decision

    def _supported(self, view: BatchView, q: torch.Tensor) -> BatchView:
        return self._support.narrow(self.settings, view, q, self.settings_top_k())

    def _refusal(self, mode: str, q: torch.Tensor, top_k: int) -> str | None:
        return self._support.refusal(self.settings, mode, q, top_k)

    def _reject(self, sentence: str) -> None:
        self._support.reject(self.settings, sentence)

    def _counting_layer(self) -> int:
        """The layer whose runs are counted on the device: the first that may run a mode."""
        return min((layer for layer in self._layers if layer not in self.settings.native_layers), default=-1)

    def settings_top_k(self) -> int:
        """Tokens the served model selects (the largest, where a draft model differs)."""
        return max((model.top_k for model in self._models), default=2048)

    def _read_model_config(self, model_config: Mapping[str, Any]) -> None:
        settings = load_settings(model_config, self._environ)
        if settings.runtime_switch and not self.settings.runtime_switch:
            raise ValueError("runtime_switch is read before the model is: set SGLANG_EXT_RUNTIME_SWITCH=1")
        if settings != self.settings:
            self.settings, self.shadow = settings, Shadow.of(settings)
            logger.info("settings with the model config's: %s", settings.as_dict())

    def _plan_trace(
        self, traces: TraceWriter, forward: Forward, seen: tuple[int, ...], extend: list[int], obstacle: str | None
    ) -> None:
        plan = obstacle or traces.plan(seen, extend, prompt_lengths(self._prompts, seen, extend), self.settings_top_k())
        if isinstance(plan, TracePlan):
            forward.trace = plan
        elif self.counters.skip_trace(plan):
            logger.info("no trace of this forward: %s", plan)


def _mode_numbers() -> dict[str, int]:
    return {mode: number for number, mode in enumerate(SERVE_MODES)}
