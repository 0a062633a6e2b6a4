"""What is hooked in SGLang, and what each hook does. Only this file and its neighbours sglang_*.py know SGLang."""

import functools
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_ext.forwards import Forward
from sglang_ext.overlap import Key
from sglang_ext.sglang_conflicts import other_hooks
from sglang_ext.sglang_hook import Hook
from sglang_ext.sglang_metrics import COLLECTOR, after_collector_init, after_log_stats, has_collector
from sglang_ext.sglang_objects import (
    current_pool,
    indexer_device,
    layer_tensors,
    output_form,
    rows_are_close,
    unsupported_reason,
)
from sglang_ext.sglang_ranks import check_ranks
from sglang_ext.sglang_shadow import (
    agree_among_attention_ranks,
    check_guard,
    native_prefill_rows,
    plan_decode,
    plan_prefill,
)
from sglang_ext.sglang_statistics import refresh_extend, refresh_step, statistics_hooks, statistics_of
from sglang_ext.stage import Stage
from sglang_ext.statistics import PoolStatistics, beside

SGLANG_SUPPORTED = "0.5.23"
SGLANG_ACCEPTED = tuple(f"0.5.{minor}" for minor in range(18, 24))

INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer"
FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
KPOOL_INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer_kpool.IndexerKPool"
STATE_CONTROLLER = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"

SELECTING = (f"{INDEXER}._get_topk_ragged", f"{INDEXER}._get_topk_paged")
RUNTIME_SWITCH_KEY = "sglang_ext_prefill_mode"


def hooks() -> tuple[Hook, ...]:
    """Everything the plugin touches in SGLang."""
    return (
        Hook(
            f"{INDEXER}.__init__",
            HookType.AFTER,
            ("self", "hidden_size", "index_n_heads", "index_head_dim", "rope_head_dim", "index_topk"),
            "read the model config's settings, compile kernels before the first request",
            _after_indexer_init,
        ),
        Hook(
            SELECTING[0],
            HookType.AROUND,
            ("self", "enable_dual_stream", "forward_batch", "layer_id", "q_fp8", "weights", "metadata", "topk_result"),
            "prefill, chunked prefill, mixed batches: select tokens",
            _around_ragged,
        ),
        Hook(
            SELECTING[1],
            HookType.AROUND,
            ("self", "forward_batch", "layer_id", "q_fp8", "weights", "metadata"),
            "decode, target-verify, draft-extend: select tokens",
            _around_paged,
        ),
        Hook(
            f"{FORWARD_BATCH}.init_new",
            HookType.AFTER,
            ("batch", "model_runner"),
            "note prompt lengths for native_tail_rows and traces; ask the guard; refuse a model without an indexer",
            _after_forward_batch,
        ),
        Hook(
            f"{SCHEDULER}.get_internal_state",
            HookType.AFTER,
            ("self", "recv_req"),
            "show version, settings and counters at /server_info",
            _after_get_internal_state,
        ),
        *statistics_hooks(),
    )


def wanted_hooks(runtime_switch: bool) -> list[Hook]:
    """`hooks`, and those that only some SGLang versions or settings call for."""
    wanted = list(hooks())
    if importlib.util.find_spec(KPOOL_INDEXER.rpartition(".")[0]) is not None:  # from 0.5.20 on
        why = "refuse models whose indexer is another class, which no hook reaches"
        target, parameters = f"{KPOOL_INDEXER}.__init__", ("self", "hidden_size", "index_n_heads")
        wanted.append(Hook(target, HookType.AFTER, parameters, why, _after_kpool_init))
    if has_collector():
        why = "show counters and overlap at /metrics"
        wanted.append(Hook(f"{COLLECTOR}.__init__", HookType.AFTER, ("self", "labels"), why, after_collector_init))
        wanted.append(Hook(f"{COLLECTOR}.log_stats", HookType.AFTER, ("self", "stats"), why, after_log_stats))
    if runtime_switch:
        why = "let POST /set_internal_state change the prefill mode (runtime_switch)"
        wanted.append(
            Hook(f"{STATE_CONTROLLER}._update_handlers", HookType.AFTER, ("self",), why, _after_update_handlers)
        )
    return wanted


def verify(runtime_switch: bool = False) -> list[str]:
    """What keeps the hooks from being installed in this SGLang: one sentence each, none if all fits."""
    version = importlib.metadata.version("sglang")
    if ".".join(version.split(".")[:3]) not in SGLANG_ACCEPTED:
        return [f"sglang {version} does not fit: made for {SGLANG_SUPPORTED}, accepts {SGLANG_ACCEPTED[0]} and later"]
    problems = []
    for hook in wanted_hooks(runtime_switch):
        try:
            found = tuple(inspect.signature(pkgutil.resolve_name(hook.target)).parameters)
        except Exception as error:
            # Importing SGLang's modules runs their code, which can fail in any way; what it was is reported.
            problems.append(f"{hook.target} is not there ({type(error).__name__}: {error})")
            continue
        exact = hook.kind is HookType.AROUND
        if (found if exact else found[: len(hook.parameters)]) != hook.parameters:
            wanted = "" if exact else "them to begin with "
            problems.append(f"{hook.target} has parameters {found}, expected {wanted}{hook.parameters}")
    return problems


def install(stage: Stage) -> None:
    """Register every hook; verify() must have found nothing. SGLang applies them once all plugins are loaded."""
    for hook in wanted_hooks(stage.settings.runtime_switch):
        HookRegistry.register(hook.target, hook.make(stage), hook.kind)


def unapplied(stage: Stage) -> list[str]:
    """Targets that SGLang failed to patch: it logs such failures and serves on without the hook."""
    return [
        hook.target for hook in wanted_hooks(stage.settings.runtime_switch) if hook.target not in HookRegistry._patched
    ]


class _SglangTopK:
    """`indexer_kernels.top_k.PlannedTopK` by SGLang's own kernel: float32 scores, at most 2048 columns of out."""

    def plan(self, lengths: torch.Tensor) -> torch.Tensor:
        from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2

        return plan_topk_v2(lengths)

    def __call__(
        self,
        scores: torch.Tensor,
        lengths: torch.Tensor,
        page_table: torch.Tensor | None,
        out: torch.Tensor,
        page_tokens: int = 64,
        plan: torch.Tensor | None = None,
    ) -> None:
        from sglang.kernels.ops.attention.dsv4.topk import topk_transform_paged_v2

        plan = self.plan(lengths) if plan is None else plan
        topk_transform_paged_v2(scores, lengths, page_table, out, page_tokens, plan)


sglang_top_k = _SglangTopK()


def _after_indexer_init(stage: Stage) -> Callable[..., None]:
    parameters = _indexer_parameters()

    def hook(_result: None, indexer: Any, *args: Any, **kwargs: Any) -> None:
        if missing := unapplied(stage):
            raise RuntimeError(f"sglang-ext: SGLang did not apply the hooks on {', '.join(missing)}; see its log")
        first = not stage.knows_model()
        config = {**dict(zip(parameters[1:], args)), **kwargs}.get("config")
        fields = vars(config) if config is not None else {}
        stage.start(
            fields, indexer.layer_id, indexer.n_heads, indexer.head_dim, indexer.index_topk, indexer_device(indexer)
        )
        if first and (others := other_hooks(SELECTING)):  # after the model's own settings are read: they may ask for it
            stage.refuse_model("other_plugin", "; ".join(others))
        if first:
            check_ranks(stage)
        if stage.shadow is not None and stage.shadow.guard is not None:
            check_guard()

    return hook


def _around_ragged(stage: Stage) -> Callable[..., torch.Tensor]:
    def hook(
        original: Callable[..., torch.Tensor],
        indexer: Any,
        enable_dual_stream: bool,
        forward_batch: Any,
        layer_id: int,
        q_fp8: torch.Tensor,
        weights: torch.Tensor,
        metadata: Any,
        topk_result: torch.Tensor | None = None,
    ) -> torch.Tensor:
        native = functools.partial(
            original, indexer, enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata, topk_result
        )
        pool = current_pool()
        attention = metadata.attn_metadata
        refresh_extend(stage, pool, layer_id, metadata)
        forward = stage.prefill(
            attention,
            extend_lengths=metadata.get_dsa_extend_len_cpu(),
            lengths=metadata.get_indexer_seq_len_cpu,
            page_table=metadata.get_page_table_64(),
            q=q_fp8,
            layer_id=layer_id,
            unsupported=lambda: unsupported_reason(indexer, attention, pool) or _split_prompts(stage, forward_batch),
        )
        if forward.trace is not None:
            stage.write_trace(forward, layer_id, *layer_tensors(layer_id, q_fp8, weights, metadata, pool))
        if not stage.takes(forward, layer_id):
            return native()
        select = functools.partial(
            _select, stage, forward, indexer, layer_id, q_fp8, weights, metadata, pool, topk_result
        )
        if (shadow := stage.shadow) is None:
            return select()
        given = (original, indexer, enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata)
        return shadow.watch(
            attention,
            Key(forward.phase, forward.decision.mode, layer_id),
            q_fp8.device,
            plan=lambda: plan_prefill(stage, shadow, metadata, q_fp8.device),
            select=select,
            native=lambda sample: native_prefill_rows(*given, sample),
        )

    return hook


def _around_paged(stage: Stage) -> Callable[..., torch.Tensor]:
    def hook(
        original: Callable[..., torch.Tensor],
        indexer: Any,
        forward_batch: Any,
        layer_id: int,
        q_fp8: torch.Tensor,
        weights: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        native = functools.partial(original, indexer, forward_batch, layer_id, q_fp8, weights, metadata)
        pool = current_pool()
        attention = metadata.attn_metadata
        mode = forward_batch.forward_mode
        expanded = mode.is_target_verify() or mode.is_draft_extend_v2()
        lengths = metadata.get_seqlens_expanded() if expanded else metadata.get_seqlens_int32()
        kept = statistics_of(pool)
        refresh = functools.partial(refresh_step, stage, pool, layer_id, metadata, lengths)
        forward = stage.decode(
            attention,
            lengths=lengths,
            page_table=metadata.get_page_table_64(),
            num_rows=sum(metadata.get_dsa_extend_len_cpu()),
            q=q_fp8,
            layer_id=layer_id,
            unsupported=lambda: (
                unsupported_reason(indexer, attention, pool) or stage.statistics_obstacle(kept, layer_id)
            ),
        )
        takes = stage.takes(forward, layer_id)
        statistics = kept if isinstance(kept, PoolStatistics) else None
        if not takes:  # a later forward may read the statistics
            return native() if statistics is None else beside(q_fp8.device, refresh, native)
        means = None if statistics is None else statistics.of_layer(layer_id)
        apart = stage.settings.check_integrity or (expanded and not rows_are_close())
        if means is not None and apart:
            refresh()
        select = functools.partial(
            _select,
            stage,
            forward,
            indexer,
            layer_id,
            q_fp8,
            weights,
            metadata,
            pool,
            page_means=means,
            update_means=means is not None and not apart,
        )
        if (shadow := stage.shadow) is None:
            return select()
        return shadow.watch(
            attention,
            Key(forward.phase, forward.decision.mode, layer_id),
            q_fp8.device,
            plan=lambda: plan_decode(stage, shadow, forward),
            select=select,
            native=lambda sample: native()[sample.rows],
        )

    return hook


def _after_kpool_init(stage: Stage) -> Callable[..., None]:
    def hook(_result: None, *_args: Any, **_kwargs: Any) -> None:
        stage.refuse_model("kpool")

    return hook


def _after_forward_batch(stage: Stage) -> Callable[..., None]:
    def hook(result: Any, _cls: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        if not stage.knows_model():  # the model is built by now
            stage.refuse_model("no_indexer")
        prompts = result.forward_mode.is_extend_without_speculative()
        if stage.shadow is not None:
            stage.shadow.prefill_comes = prompts
            stage.shadow.poll_guard(agree_among_attention_ranks)
        if not stage.wants_prompts():
            return
        if not prompts or result.seq_lens_cpu is None or result.extend_seq_lens_cpu is None:
            stage.note_prompts((), (), [])  # those of before are not what comes next
            return
        decoding = {id(request) for request in (batch.decoding_reqs or ())}
        # A decoding request of a mixed batch has no prompt row left: a length no row can be near.
        whole = [
            1 << 40 if id(request) in decoding else len(request.full_untruncated_fill_ids) for request in batch.reqs
        ]
        # Noted on the stage, not on this batch: a prefill graph replays with a ForwardBatch of its own.
        stage.note_prompts(result.seq_lens_cpu.tolist(), result.extend_seq_lens_cpu, whole)

    return hook


def _after_get_internal_state(stage: Stage) -> Callable[..., None]:
    def hook(result: Any, *_args: Any, **_kwargs: Any) -> None:
        result.internal_state["sglang_ext"] = stage.status()

    return hook


def _after_update_handlers(stage: Stage) -> Callable[..., Any]:
    from sglang.srt.managers.scheduler_components import internal_state

    def validate(_key: str, value: float) -> None:
        try:
            stage.prefill_mode_number(value)
        except ValueError as error:
            raise internal_state.UpdateRejected(str(error)) from None

    def apply(_key: str, value: float) -> None:
        stage.switch_prefill(value)

    def hook(handlers: dict[str, Any], *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        return handlers | {RUNTIME_SWITCH_KEY: internal_state._UpdateHandler(validate, apply)}

    return hook


def _split_prompts(stage: Stage, forward_batch: Any) -> str | None:
    split = getattr(forward_batch, "tbo_parent_token_range", None) is not None
    return "two_batch_overlap" if split and stage.settings.native_tail_rows else None


def _select(
    stage: Stage,
    forward: Forward,
    indexer: Any,
    layer_id: int,
    q_fp8: torch.Tensor,
    weights: torch.Tensor,
    metadata: Any,
    pool: Any,
    out: torch.Tensor | None = None,
    page_means: torch.Tensor | None = None,
    update_means: bool = False,
) -> torch.Tensor:
    """A layer's selection in the form SGLang's metadata asks for; rows that only pad the batch are -1."""
    if out is None:
        out = torch.full((q_fp8.shape[0], indexer.index_topk), -1, dtype=torch.int32, device=q_fp8.device)
    form = output_form(metadata, forward.phase)
    stage.run(
        forward, layer_id, *layer_tensors(layer_id, q_fp8, weights, metadata, pool), form, out, page_means, update_means
    )
    return out


def _indexer_parameters() -> tuple[str, ...]:
    return tuple(inspect.signature(pkgutil.resolve_name(f"{INDEXER}.__init__")).parameters)
