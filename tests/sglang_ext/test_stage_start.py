"""The stage outside a forward: start with a model's config, the runtime switch, what /server_info shows."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from sglang_ext import policy
from sglang_ext.settings import SERVE_MODES, Settings, load_settings
from sglang_ext.stage import Stage
from tests.support.inputs import Batch
from tests.support.stage_calls import MISA, Attention, log_lines, prefill, stage_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stage_batch()


# Start


def start(stage: Stage, config: dict[str, Any], layer: int = 0, device: Any = CPU, **model: int) -> None:
    shape = {"num_heads": 64, "head_dim": 128, "top_k": 2048} | model
    stage.start(config, layer, **shape, device=device)


def test_start_reads_the_model_config_once(caplog):
    stage = Stage(Settings(group=2), {"SGLANG_EXT_GROUP": "2"})
    with caplog.at_level(logging.INFO, "sglang_ext"):
        for layer in range(3):
            start(stage, {"sglang_ext": {"mode": "hisa", "group": 8}}, layer)
    assert stage.settings == Settings(mode="hisa", group=2)
    [said] = log_lines(caplog, logging.INFO)
    assert json.loads(said.removeprefix("active: ")) == stage.settings.as_dict()
    start(stage, {"sglang_ext": {"mode": "misa"}}, 3)
    assert stage.settings.mode == "hisa", "the same model's config is read once"


@pytest.mark.parametrize("config", [{"sglang_ext": {"mode": "fast"}}, {"use_misa": True, "use_hisa": True}])
def test_start_refuses_wrong_settings_of_the_model_config(config):
    with pytest.raises(ValueError):
        start(Stage(Settings(), {}), config)


def test_a_draft_model_does_not_change_the_settings():
    stage = Stage(Settings(), {})
    start(stage, {"sglang_ext": {"mode": "hisa"}})
    start(stage, {}, 0, top_k=512)
    assert stage.settings.mode == "hisa"


def test_runtime_switch_comes_from_the_environment_only():
    config = {"sglang_ext": {"runtime_switch": True}}
    with pytest.raises(ValueError, match="SGLANG_EXT_RUNTIME_SWITCH=1"):
        start(Stage(Settings(), {}), config)
    stage = Stage(Settings(runtime_switch=True), {"SGLANG_EXT_RUNTIME_SWITCH": "1"})
    start(stage, config)
    assert stage.settings.runtime_switch


@pytest.mark.parametrize("asked", [{}, {"mode": "hisa"}, {"prefill_mode": "native", "decode_mode": "misa"}])
def test_refuse_model(asked, caplog):
    stage = Stage(Settings(**asked), {})
    stage.refuse_model("kpool")
    assert [policy.UNSUPPORTED["kpool"] in line for line in log_lines(caplog, logging.WARNING)] == [True]
    assert len(stage.status()["refused"]) == 1
    with pytest.raises(RuntimeError, match="kpool"):
        Stage(Settings(**asked, strict=True), {}).refuse_model("kpool")


def test_refuse_model_that_nothing_is_asked_of():
    for asked in ({"mode": "native"}, {"candidate_unit": "page"}):
        stage = Stage(Settings(**asked, strict=True), {})
        stage.refuse_model("kpool")
        assert stage.status()["refused"] == []


def test_top_k_is_the_largest_of_the_models():
    stage = Stage(Settings(), {})
    assert stage.settings_top_k() == 2048
    start(stage, {}, top_k=512)
    assert stage.settings_top_k() == 512
    start(stage, {}, top_k=1024)
    assert stage.settings_top_k() == 1024


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for `start`: what was asked of the backend is noted, `refusal` and `failures` are its answers."""
    seen = SimpleNamespace(refusal={}, failures={}, asked=[], compiled=[], prepared=[], calls=0)

    def gpu_refusal(mode: str, q: torch.Tensor, params: Any) -> str | None:
        seen.asked.append((mode, tuple(q.shape), params.top_k))
        return seen.refusal.get(mode)

    def compile_each(wanted: list[tuple[str, Any]], num_heads: int) -> Iterator[list[tuple[str, str | None]]]:
        seen.calls += 1
        for mode, params in wanted:
            seen.compiled.append((params.top_k, num_heads, mode))
            yield [("scan", None), ("pack", seen.failures.get("pack"))]

    compile_check = ModuleType("compile_check")
    compile_check.compile_each = compile_each
    monkeypatch.setitem(sys.modules, "indexer_kernels.gpu.compile_check", compile_check)
    monkeypatch.setattr("sglang_ext.support.gpu_refusal", gpu_refusal)
    monkeypatch.setattr("sglang_ext.stage.Counters.prepare_device", lambda _self, device: seen.prepared.append(device))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **kw: empty(*a, **kw))
    seen.device = torch.device("cuda")
    return seen


def test_start_compiles_before_the_first_request(gpu):
    stage = Stage(Settings(mode="hisa", decode_mode="native"), {})
    for layer in range(2):
        start(stage, {"sglang_ext": {"mode": "hisa", "decode_mode": "native"}}, layer, gpu.device)
    assert gpu.asked == [("hisa", (0, 64, 128), 2048)]
    assert gpu.compiled == [(2048, 64, "hisa")] and gpu.prepared == [gpu.device]


def test_start_compiles_what_native_tail_rows_run(gpu):
    """They run this package's native, whose schedulers DeepGEMM would compile during the first prompt."""
    own = {"mode": "misa", "decode_mode": "native", "native_tail_rows": 64}
    start(Stage(Settings(**own), {}), {"sglang_ext": own}, device=gpu.device)
    assert gpu.compiled == [(2048, 64, "misa"), (2048, 64, "native")]


def test_start_says_how_long_the_kernels_took(gpu, caplog):
    own = {"mode": "misa", "decode_mode": "hisa"}
    with caplog.at_level(logging.INFO, "sglang_ext"):
        start(Stage(Settings(**own), {}), {"sglang_ext": own}, device=gpu.device)
    assert [line for line in log_lines(caplog, logging.INFO) if line.startswith("kernels of misa, hisa ")]


def test_start_asks_for_what_auto_would_run(gpu):
    start(Stage(Settings(), {}), {}, device=gpu.device)
    assert [mode for mode, _, _ in gpu.asked] == [policy.AUTO_PREFILL]
    assert gpu.compiled == [(2048, 64, policy.AUTO_PREFILL)]


def test_start_asks_for_nothing_where_auto_stays_native(gpu):
    own = {"candidate_unit": "page"}
    start(Stage(Settings(**own), {}), {"sglang_ext": own}, device=gpu.device)
    assert gpu.asked == [] and gpu.compiled == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["decode mode auto is SGLang's own indexer with these settings: auto_decode_native"]),
        (
            {"candidate_unit": "page"},
            ["prefill mode auto is SGLang's own indexer with these settings: page_candidates", "auto_decode_native"],
        ),
        ({"decode_mode": "native"}, []),
        ({"prefill_mode": "misa_rerank"}, ["decode mode auto is SGLang's own indexer"]),
        ({"mode": "native"}, []),
        ({"mode": "misa_rerank"}, ["decode mode auto is SGLang's own indexer"]),
        ({"mode": "misa_rerank", "decode_mode": "hisa"}, []),
        ({"mode": "misa_rerank", "decode_tokens": 32768}, []),
    ],
    ids=str,
)
def test_auto_that_never_leaves_native_says_so(settings, said, caplog):
    start(Stage(Settings(**settings), {}), {"sglang_ext": settings})
    lines = [line for line in log_lines(caplog, logging.WARNING) if "mode auto" in line]
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines))


def test_start_compiles_nothing_for_native(gpu):
    start(Stage(Settings(mode="native"), {}), {"sglang_ext": {"mode": "native"}}, device=gpu.device)
    assert gpu.asked == [] and gpu.compiled == []


@pytest.mark.parametrize("model", [{"head_dim": 64}, {"top_k": 4096}])
def test_start_of_a_model_that_is_never_served(gpu, model):
    start(Stage(Settings(candidates=8192), {}), {}, device=gpu.device, **model)
    assert gpu.compiled == [] and gpu.prepared == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["refusal", "failures"])
def test_start_without_kernels(gpu, caplog, strict, kind):
    getattr(gpu, kind).update({"hisa": "no such GPU", "pack": "syntax error"})
    own = {"mode": "hisa", "decode_mode": "native", "strict": strict}
    stage = Stage(Settings(**own), {})
    said = "prefill mode 'hisa': no such GPU" if kind == "refusal" else "kernel pack does not compile: syntax error"
    if strict:
        with pytest.raises(RuntimeError, match=said):
            start(stage, {"sglang_ext": own}, device=gpu.device)
        return
    start(stage, {"sglang_ext": own}, device=gpu.device)
    assert [said in line for line in log_lines(caplog, logging.WARNING)] == [True]


def test_a_mode_is_compiled_once_for_both_phases_and_all_modes_for_a_switch(gpu):
    gpu.refusal["group_rerank"] = "no kernels"
    start(Stage(Settings(mode="hisa"), {}), {"sglang_ext": {"mode": "hisa"}}, device=gpu.device)
    assert gpu.compiled == [(2048, 64, "hisa")]
    gpu.compiled.clear()
    switched = {"SGLANG_EXT_PREFILL_MODE": "misa", "SGLANG_EXT_DECODE_MODE": "native", "SGLANG_EXT_RUNTIME_SWITCH": "1"}
    start(Stage(load_settings(None, switched), switched), {}, device=gpu.device)
    assert [mode for _, _, mode in gpu.compiled] == ["misa", "native", "misa_rerank", "hisa"]


@pytest.mark.parametrize("kind", ["refusal", "failures", None])
def test_no_statistics_for_a_mode_without_kernels(gpu, kind):
    """They would take memory for a decode that stays native."""
    if kind is not None:
        getattr(gpu, kind).update({"hisa": "no such GPU", "pack": "syntax error"})
    own = {"prefill_mode": "native", "decode_mode": "hisa"}
    stage = Stage(Settings(**own), {})
    assert stage.wants_statistics()
    start(stage, {"sglang_ext": own}, device=gpu.device)
    assert stage.wants_statistics() == (kind is None)


def test_a_draft_model_without_kernels_leaves_the_served_models_statistics(gpu):
    own = {"prefill_mode": "native", "decode_mode": "hisa"}
    stage = Stage(Settings(**own), {})
    start(stage, {"sglang_ext": own}, device=gpu.device)
    gpu.refusal["hisa"] = "no such heads"
    stage.start({"sglang_ext": own}, 0, 8, 128, 2048, gpu.device)
    assert len(stage.status()["refused"]) == 1 and stage.wants_statistics()


def test_decode_misa_rerank_needs_hisas_kernels_too(gpu, caplog):
    """From stored statistics it chooses blocks as hisa does."""
    own = {"prefill_mode": "native", "decode_mode": "misa_rerank"}
    start(Stage(Settings(**own), {}), {"sglang_ext": own}, device=gpu.device)
    assert gpu.compiled == [(2048, 64, "misa_rerank"), (2048, 64, "hisa")]
    assert gpu.calls == 1, "all that a start needs is compiled at once"
    gpu.refusal["hisa"] = "no blocks"
    stage = Stage(Settings(**own), {})
    start(stage, {"sglang_ext": own}, device=gpu.device)
    assert not stage.wants_statistics()
    assert "decode mode 'misa_rerank': no blocks" in log_lines(caplog, logging.WARNING)[-1]


@pytest.mark.parametrize("mode", ["misa_rerank", "hisa"])
def test_a_mode_of_prefill_needs_nothing_for_decode(gpu, mode):
    """Neither memory for statistics nor kernels of decode; the same of a layer's mode."""
    for own in ({"mode": mode}, {"mode": "native", "layers": {"0": {"mode": mode}}}):
        stage = Stage(load_settings({"sglang_ext": own}, {}), {})
        start(stage, {"sglang_ext": own}, device=gpu.device)
        assert gpu.compiled == [(2048, 64, mode)] and not stage.wants_statistics()
        gpu.compiled.clear()
    stage = Stage(Settings(mode=mode, decode_tokens=32768), {})
    assert stage.wants_statistics(), "auto decode that may choose hisa keeps them"


def test_a_kernel_that_does_not_compile_means_native_with_a_reason(gpu, monkeypatch, batch):
    gpu.failures["pack"] = "syntax error"
    own = {"prefill_mode": "hisa", "decode_mode": "native"}
    stage = Stage(Settings(**own), {})
    start(stage, {"sglang_ext": own}, device=gpu.device)
    assert prefill(stage, batch).decision == ("native", "no_kernel")


# Runtime switch


def test_switch_prefill():
    stage = Stage(Settings(mode="misa", decode_mode="misa", runtime_switch=True), {})
    for number, mode in enumerate(SERVE_MODES):
        stage.switch_prefill(float(number))
        assert stage.settings.phase_mode("prefill") == mode
        assert stage.settings.phase_mode("decode") == "misa"
    assert stage.status()["mode_numbers"] == {mode: number for number, mode in enumerate(SERVE_MODES)}


def test_switched_mode_runs_from_the_next_forward_on(batch):
    stage, attention = Stage(replace(MISA, runtime_switch=True), {}), Attention()
    first = prefill(stage, batch, attention)
    stage.switch_prefill(SERVE_MODES.index("native"))
    assert prefill(stage, batch, attention) is first
    assert prefill(stage, batch).decision == ("native", "configured_native")


@pytest.mark.parametrize("value", [-1, len(SERVE_MODES), 0.5, float("nan")])
def test_switch_to_no_mode(value):
    stage = Stage(Settings(runtime_switch=True), {})
    with pytest.raises(ValueError, match="must be one of.*native"):
        stage.switch_prefill(value)
    assert stage.settings == Settings(runtime_switch=True)


def test_switch_is_off_unless_set():
    stage = Stage(Settings(), {})
    with pytest.raises(ValueError, match="runtime_switch is off"):
        stage.switch_prefill(0)
    assert stage.status()["mode_numbers"] == {}


# Status


def test_forwards_are_counted_once_whatever_the_layers_do(batch):
    stage = Stage(replace(MISA, native_layers=(2,)), {})
    for layer in (2, 5, 7):
        start(stage, {"sglang_ext": MISA.as_dict() | {"native_layers": [2]}}, layer)
    for _ in range(3):
        forward = prefill(stage, batch)
        assert [stage.takes(forward, layer) for layer in (2, 5, 7)] == [False, True, True]
    assert stage.status()["forwards"] == [{"phase": "prefill", "mode": "misa", "reason": "configured", "forwards": 3}]
    assert stage.status()["indexer_layers"] == 3


def test_status_can_be_sent(batch):
    stage = Stage(replace(MISA, native_layers=(1,), decode_mode="hisa", runtime_switch=True), {})
    forward = prefill(stage, batch)
    stage.takes(forward, 0)
    stage.counters.count_capture("decode", "hisa", 4)
    stage.counters.step_device("prefill", "misa", CPU)
    status = stage.status()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(status)) == status
    sent = json.loads(json.dumps(status))
    assert sent["modes"] == {"prefill": "misa", "decode": "hisa"}
    assert sent["settings"]["native_layers"] == [1] and sent["version"]
    assert sent["calls"] == [{"phase": "prefill", "mode": "misa", "reason": "configured", "calls": 1, "rows": 13}]
    assert sent["captured"] == [{"phase": "decode", "mode": "hisa", "rows": 4, "calls": 1}]
    assert sent["device_runs"] == {"prefill/misa": 1}
