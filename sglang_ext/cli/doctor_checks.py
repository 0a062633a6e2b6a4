"""The checks of `sglang-ext doctor`: each looks at one thing and says what it found."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from indexer_kernels import IndexerParams
from sglang_ext import policy
from sglang_ext.cli.serve import check_installed, check_whitelist
from sglang_ext.policy import BatchView, asks, choose
from sglang_ext.settings import Settings

PHASES = ("prefill", "decode")
PROBE_LENGTHS = (8192, 32768, 131072)
PROBE_BATCHES = (1, 8, 64, 256)  # rows of decode, whose lengths the host does not know
PROBE_ROWS = 8192  # a chunk of SGLang's default chunked prefill on large GPUs

Status = Literal["ok", "problem", "skipped"]


class Check(NamedTuple):
    """One finding. A problem keeps the plugin from serving here; skipped could not be looked at, and says why."""

    name: str
    status: Status
    detail: str


def check_torch() -> Check:
    """Python and torch: informative, both are there if this runs."""
    return Check("python", "ok", f"{platform.python_version()}, torch {torch.__version__}")


def check_gpu() -> Check:
    """A CUDA device of compute capability 9.0, the one the kernels are built for."""
    if not torch.cuda.is_available():
        return Check("gpu", "problem", "no CUDA device: nothing can be served here, only `compare` works")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    shown = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability != (9, 0):
        return Check("gpu", "problem", f"{shown}: the kernels need 9.0 (H100, H200), SGLang's own indexer would run")
    return Check("gpu", "ok", shown)


def check_sglang() -> Check:
    """SGLang is installed and sees the plugin."""
    try:
        check_installed()
        check_whitelist(os.environ)
    except ValueError as error:
        return Check("sglang", "problem", str(error))
    return Check("sglang", "ok", f"{importlib.metadata.version('sglang')}, plugin registered")


def check_hooks(runtime_switch: bool = False) -> Check:
    """SGLang has a version that fits, and every hooked method the signature the plugin was written for."""
    if importlib.util.find_spec("sglang") is None:
        return Check("hooks", "skipped", "SGLang is not installed")
    try:
        with warnings.catch_warnings():  # SGLang says at length what it will not do without a GPU
            warnings.simplefilter("ignore")
            from sglang_ext import sglang_hooks
    except Exception as error:  # whatever SGLang's modules and their libraries raise as they are imported
        why = f"{type(error).__name__}: {error}"
        return Check("hooks", "problem", f"this SGLang cannot be imported, or has no plugin support: {why}")
    problems = sglang_hooks.verify(runtime_switch)
    if problems:
        return Check("hooks", "problem", "; ".join(problems))
    return Check("hooks", "ok", "all targets have the expected signatures")


def check_kernels(params: IndexerParams, heads: int) -> Iterator[Check]:
    """Compiles every kernel of these parameters for sm_90a, one finding each."""
    if importlib.util.find_spec("tilelang") is None:
        yield Check("kernels", "skipped", "TileLang is not installed: pip install 'sglang-ext[gpu]'")
        return
    if not torch.cuda.is_available() and shutil.which("nvcc") is None:
        yield Check("kernels", "skipped", "neither a GPU nor nvcc to compile with")
        return
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")  # read when TileLang is imported; it prints to stdout
    from indexer_kernels.gpu.compile_check import compile_all

    for name, error in compile_all(params, heads):
        yield Check(f"kernel {name}", "problem" if error else "ok", error or "compiles for sm_90a")


class Model(NamedTuple):
    """The indexer's shape, from a model config; DeepSeek-V3.2's where it says nothing."""

    heads: int
    top_k: int


def model_of(config: dict[str, Any] | None) -> Model:
    """Raises ValueError naming a value of the config that is no number."""
    values = {"index_n_heads": 64, "index_topk": 2048} | (config or {})
    for name in ("index_n_heads", "index_topk"):
        if type(values[name]) is not int:
            raise ValueError(f"the model config's {name}={values[name]!r} must be an integer")
    return Model(values["index_n_heads"], values["index_topk"])


def check_model(config: dict[str, Any]) -> Check:
    """Whether the model's config names an indexer that the plugin serves; its text part's, where it has parts."""
    part = config.get("text_config")
    fields = config | part if isinstance(part, dict) else config
    if fields.get("index_topk") is None:  # what SGLang tells models of DeepSeek sparse attention by
        return Check("model", "problem", f"{policy.UNSUPPORTED['no_indexer']}: its config has no index_topk")
    if (dim := fields.get("index_head_dim", 128)) != 128:
        return Check("model", "problem", f"{policy.UNSUPPORTED['head_dim']} (index_head_dim={dim})")
    return Check("model", "ok", f"index_topk={fields['index_topk']}")


def check_phase(phase: str, settings: Settings, model: Model) -> Check:
    """What the policy would choose, and why: in prefill for one request of a few lengths, in decode for batch sizes."""
    modes = policy.kernel_modes(phase, settings) if asks(phase, settings) else ()
    refusal = next(filter(None, (kernel_refusal(mode, settings, model) for mode in modes)), None)
    unsupported = "no_kernel" if refusal else None
    if phase == "prefill":
        views = {
            f"{length // 1024}K": BatchView(phase, PROBE_ROWS, (length,), length, unsupported, model.heads)
            for length in PROBE_LENGTHS
        }
    else:
        views = {
            f"{rows} rows": BatchView(phase, rows, None, max(PROBE_LENGTHS), unsupported, model.heads)
            for rows in PROBE_BATCHES
        }
    decisions = {what: choose(view, settings) for what, view in views.items()}
    shown = [f"{what}: {decision.mode} ({decision.reason})" for what, decision in decisions.items()]
    detail = ", ".join(shown) + (f" - {refusal}" if refusal else "")
    if phase == "decode" and settings.decode_mode is None and settings.mode not in ("native", "auto"):
        detail += f" - mode={settings.mode} is prefill's, a mode of decode is named by decode_mode"
    if phase == "decode" and any(decision.mode in policy.STATISTICS_MODES for decision in decisions.values()):
        detail += f" - {policy.BY_BLOCKS}"
    return Check(f"would run in {phase}", "problem" if refusal else "ok", detail)


def check_layers(settings: Settings, model: Model) -> Check:
    """What layers with settings of their own would run, and which of them no kernel serves."""
    shown, refusals = [], []
    for number, _ in settings.layers:
        own = settings.of_layer(number)
        modes = {phase: policy.mode_to_try(phase, own) if asks(phase, own) else "native" for phase in PHASES}
        shown.append(f"{number}: {'/'.join(modes.values())}")
        asked = [phase for phase in PHASES if modes[phase] != "native"]
        for mode in dict.fromkeys(mode for phase in asked for mode in policy.kernel_modes(phase, own)):
            if (refusal := kernel_refusal(mode, own, model)) is not None:
                refusals.append(f"layer {number}, {mode}: {refusal}")
    detail = f"prefill/decode of layers with settings of their own: {', '.join(shown)}"
    return Check("layers", "problem" if refusals else "ok", "; ".join([detail, *refusals]))


def kernel_refusal(mode: str, settings: Settings, model: Model) -> str | None:
    """Why no kernel could run the mode for this model and these settings on any GPU, or None."""
    if settings.backend == "reference":
        return None
    if model.top_k > 2048:
        return f"{policy.UNSUPPORTED['index_topk']} (index_topk={model.top_k})"
    if importlib.util.find_spec("tilelang") is None:
        return "TileLang is not installed: pip install 'sglang-ext[gpu]'"
    from indexer_kernels.gpu import refusals

    if model.heads not in refusals.HEADS:
        return f"{model.heads} indexer heads, kernels are built for {refusals.HEADS}"
    return refusals.mode_refusal(mode, settings.params(model.top_k))
