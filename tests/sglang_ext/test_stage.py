"""The stage: one decision per forward, layers kept native, strict, the runtime switch, the start and the status."""

import json
import logging
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from indexer_kernels import select_ragged
from sglang_ext import policy
from sglang_ext.settings import SERVE_MODES, Settings
from sglang_ext.stage import Forward, Stage
from tests.support.compare import assert_same_selection
from tests.support.inputs import Batch, make_batch

TOP_K = 64
MISA = Settings(mode="misa", backend="reference", route_block=64, active_heads=2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Attention:
    """Frozen like SGLang's metadata."""

    page_size: int = 64


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch([300, 40, 70], [9, 3, 1], num_heads=8, seed=5)


class Asked:
    """An `unsupported` that counts how often it is asked."""

    def __init__(self, answer: str | None = None) -> None:
        self.answer, self.times = answer, 0

    def __call__(self) -> str | None:
        self.times += 1
        return self.answer


def prefill(stage: Stage, batch: Batch, attention: object = None, **changes: Any) -> Forward:
    """stage.prefill of the whole batch."""
    arguments: dict[str, Any] = {
        "attention": Attention() if attention is None else attention,
        "extend_lengths": [9, 3, 1],
        "lengths": lambda: torch.tensor([300, 40, 70]),
        "prompt_lengths": None,
        "page_table": batch.page_table,
        "q": batch.q,
        "unsupported": Asked(),
    }
    return stage.prefill(**arguments | changes)


def decode(stage: Stage, **changes: Any) -> Forward:
    """stage.decode of two requests in a batch padded to four rows."""
    arguments: dict[str, Any] = {
        "lengths": torch.tensor([130, 7], dtype=torch.int32),
        "page_table": torch.zeros((2, 3), dtype=torch.int32),
        "num_rows": 2,
        "q": torch.zeros((4, 8, 128)).to(torch.float8_e4m3fn),
        "unsupported": Asked(),
    }
    return stage.decode(**arguments | changes)


def calls(stage: Stage) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(phase, mode, reason) -> (calls, rows)."""
    listed = stage.counters.snapshot()["calls"]
    return {(one["phase"], one["mode"], one["reason"]): (one["calls"], one["rows"]) for one in listed}


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# One decision per forward


def test_prefill_decides_once_per_forward(batch):
    stage, attention, asked = Stage(MISA, {}), Attention(), Asked()
    first = prefill(stage, batch, attention, unsupported=asked)
    assert (first.decision, first.num_rows) == (("misa", "configured"), 13)

    def lengths() -> torch.Tensor:
        raise AssertionError("later layers must not look at the lengths again")

    assert prefill(stage, batch, attention, unsupported=asked, lengths=lengths) is first
    assert asked.times == 1
    other = prefill(stage, batch, Attention(), unsupported=asked)
    assert other is not first and asked.times == 2


def test_a_native_decision_is_kept_too(batch):
    stage, attention = Stage(replace(MISA, mode="auto"), {}), Attention()
    first = prefill(stage, batch, attention)
    assert first.decision == ("native", "below_break_even") and first.parts == ()
    assert prefill(stage, batch, attention) is first


@pytest.mark.parametrize("mode", ["native", "auto"])
def test_native_is_not_asked_for_support(batch, mode):
    """Nothing of SGLang is looked at where the settings cannot ask for another mode."""
    stage, asked = Stage(Settings(prefill_mode="native", decode_mode=mode), {}), Asked("hisparse")
    reason = "configured_native" if mode == "native" else "auto_decode_native"
    assert prefill(stage, batch, unsupported=asked).decision == ("native", "configured_native")
    assert decode(stage, unsupported=asked).decision == ("native", reason)
    assert asked.times == 0


def test_auto_looks_at_the_longest_request(batch):
    stage = Stage(Settings(backend="reference", prefill_min_tokens=300), {})
    assert prefill(stage, batch).decision == (policy.AUTO_PREFILL, "auto_selected")
    stage = Stage(Settings(backend="reference", prefill_min_tokens=301), {})
    assert prefill(stage, batch).decision == ("native", "below_break_even")


def test_decode_plans_every_layer_and_reads_no_length():
    """A plan made inside a graph capture must not outlive it; a length read back would end the capture."""
    stage = Stage(MISA, {})
    lengths = torch.tensor([130, 7], dtype=torch.int32)
    first, second = decode(stage, lengths=lengths), decode(stage, lengths=lengths)
    assert first is not second and first.parts[0][1].plan is not second.parts[0][1].plan
    lengths.copy_(torch.tensor([131, 8]))
    assert first.parts[0][1].plan.row_lengths.tolist() == [131, 8], "the plan must follow the graph's buffer"
    assert first.parts[0][1].plan.max_length == 3 * 64
    meta = decode(stage, lengths=torch.empty(2, dtype=torch.int32, device="meta"))
    assert meta.decision == ("misa", "configured"), "a meta tensor has no values to read"


# What runs


def test_run_fills_out_with_the_modes_selection(batch):
    stage = Stage(MISA, {})
    forward = prefill(stage, batch)
    out = torch.full((15, TOP_K), -1, dtype=torch.int32)
    stage.run(forward, 0, batch.q, batch.weights, batch.k_pages, batch.page_table, ("position", None), out)
    want = select_ragged("misa", *batch.ragged, MISA.params(TOP_K), backend="reference")
    native = select_ragged("native", *batch.ragged, MISA.params(TOP_K), backend="reference")
    assert not torch.equal(want.sort(dim=1).values, native.sort(dim=1).values)
    assert_same_selection(out[:13], [set(row) - {-1} for row in want.tolist()], batch.lengths, TOP_K)
    assert (out[13:] == -1).all()


def test_native_tail_rows_run_native(batch):
    stage = Stage(replace(MISA, native_tail_rows=4), {})
    # the first prompt goes on, the second ends here, the third decodes
    forward = prefill(stage, batch, prompt_lengths=[302, 40, 1 << 40])
    tail = [7, 8, 9, 10, 11]
    assert [(mode, rows.picked.tolist()) for mode, rows in forward.parts] == [
        ("misa", [0, 1, 2, 3, 4, 5, 6, 12]),
        ("native", tail),
    ]
    out = torch.full((13, TOP_K), -1, dtype=torch.int32)
    stage.run(forward, 0, batch.q, batch.weights, batch.k_pages, batch.page_table, ("position", None), out)
    misa, native = (
        select_ragged(mode, *batch.ragged, MISA.params(TOP_K), backend="reference").tolist()
        for mode in ("misa", "native")
    )
    want = [set(native[row] if row in tail else misa[row]) - {-1} for row in range(13)]
    assert want != [set(row) - {-1} for row in misa]
    assert_same_selection(out, want, batch.lengths, TOP_K)


@pytest.mark.parametrize("prompts", [None, [302, 40]])
def test_native_tail_rows_without_prompt_lengths(batch, prompts):
    with pytest.raises(RuntimeError, match="native_tail_rows needs the prompt lengths of 3 requests"):
        prefill(Stage(replace(MISA, native_tail_rows=4), {}), batch, prompt_lengths=prompts)


def test_native_layers(batch):
    stage = Stage(replace(MISA, native_layers=(0, 2)), {})
    forward = prefill(stage, batch)
    assert [stage.takes(forward, layer) for layer in (0, 1, 2, 3)] == [False, True, False, True]
    assert calls(stage) == {
        ("prefill", "misa", "configured"): (2, 26),
        ("prefill", "native", "native_layer"): (2, 26),
    }


def test_a_native_forward_is_counted_by_its_own_reason_in_every_layer(batch):
    stage = Stage(replace(MISA, mode="native", native_layers=(0,)), {})
    forward = prefill(stage, batch)
    assert not stage.takes(forward, 0) and not stage.takes(forward, 1)
    assert calls(stage) == {("prefill", "native", "configured_native"): (2, 26)}


# What is not supported


@pytest.mark.parametrize("reason", list(policy.UNSUPPORTED))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_unsupported_is_logged_once_and_counted(batch, caplog, phase, reason):
    stage = Stage(MISA, {})
    with caplog.at_level(logging.WARNING, "sglang_ext"):
        for _ in range(3):
            asked = Asked(reason)
            forward = (
                prefill(stage, batch, unsupported=asked) if phase == "prefill" else decode(stage, unsupported=asked)
            )
            assert forward.decision == ("native", reason) and forward.parts == ()
            assert not stage.takes(forward, 1)
    said = lines(caplog, logging.WARNING)
    assert len(said) == 1 and policy.UNSUPPORTED[reason] in said[0] and reason in said[0] and phase in said[0]
    assert calls(stage) == {(phase, "native", reason): (3, 39 if phase == "prefill" else 6)}


@pytest.mark.parametrize("reason", list(policy.UNSUPPORTED))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_strict_ends_the_server(batch, phase, reason):
    stage, asked = Stage(replace(MISA, strict=True), {}), Asked(reason)
    with pytest.raises(RuntimeError, match=f"strict.*{phase}.*{reason}"):
        prefill(stage, batch, unsupported=asked) if phase == "prefill" else decode(stage, unsupported=asked)


def test_strict_lets_native_by_choice_pass(batch):
    for settings in (Settings(strict=True, mode="native"), Settings(strict=True, backend="reference")):
        assert prefill(Stage(settings, {}), batch).decision.mode == "native"
        assert decode(Stage(settings, {})).decision.mode == "native"


def table(rows: int) -> torch.Tensor:
    return torch.zeros((rows, 8), dtype=torch.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {"page_table": table(4)},
        {"page_table": table(2)},
        {"lengths": lambda: torch.tensor([300, 40])},
        {"extend_lengths": [9, 3]},
        {"extend_lengths": [9, 3, 2]},  # one row more than q has
    ],
)
def test_prefill_rows_mismatch(batch, changes):
    assert prefill(Stage(MISA, {}), batch, **changes).decision == ("native", "rows_mismatch")


@pytest.mark.parametrize(
    "changes",
    [
        {"page_table": table(3)},
        {"page_table": table(1)},
        {"lengths": torch.tensor([130, 7, 9], dtype=torch.int32)},
        {"num_rows": 3},
        {"num_rows": 1},
        {"q": torch.zeros((1, 8, 128)).to(torch.float8_e4m3fn)},
    ],
)
def test_decode_rows_mismatch(changes):
    assert decode(Stage(MISA, {}), **changes).decision == ("native", "rows_mismatch")


def test_an_earlier_reason_is_not_hidden_by_a_mismatch(batch):
    asked = Asked("hisparse")
    assert prefill(Stage(MISA, {}), batch, page_table=table(4), unsupported=asked).decision.reason == "hisparse"


@pytest.mark.parametrize("backend", ["auto", "gpu"])
def test_no_kernel_on_this_machine(batch, backend):
    stage = Stage(replace(MISA, backend=backend), {})
    assert prefill(stage, batch).decision == ("native", "no_kernel")
    assert decode(stage).decision == ("native", "no_kernel")


@pytest.mark.parametrize(("limit", "want"), [(299, "too_long"), (300, "configured"), (None, "configured")])
def test_longer_than_the_kernels_hold(batch, monkeypatch, limit, want):
    fake = ModuleType("pipeline")
    fake.max_tokens = lambda mode: {"misa": limit}[mode]
    monkeypatch.setitem(sys.modules, "indexer_kernels.gpu.pipeline", fake)
    monkeypatch.setattr("sglang_ext.stage.gpu_refusal", lambda mode, q, params: None)
    stage = Stage(replace(MISA, backend="gpu"), {})
    assert prefill(stage, batch).decision.reason == want
    # decode is bounded by its page table: 3 pages
    assert decode(stage).decision.reason == "configured"


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
    assert len(lines(caplog, logging.INFO)) == 1
    start(stage, {"sglang_ext": {"mode": "misa"}}, 3)
    assert stage.settings.mode == "hisa", "the same model's config is read once"


@pytest.mark.parametrize("config", [{"sglang_ext": {"mode": "fast"}}, {"use_misa": True, "use_hisa": True}])
def test_start_refuses_wrong_settings_of_the_model_config(config):
    with pytest.raises(ValueError):
        start(Stage(Settings(), {}), config)


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
    seen = SimpleNamespace(refusal={}, failures={}, asked=[], compiled=[], prepared=[])

    def gpu_refusal(mode: str, q: torch.Tensor, params: Any) -> str | None:
        seen.asked.append((mode, tuple(q.shape), params.top_k))
        return seen.refusal.get(mode)

    def compile_all(params: Any, num_heads: int) -> list[tuple[str, str | None]]:
        seen.compiled.append((params.top_k, num_heads))
        return [("scan", None), ("pack", seen.failures.get("pack"))]

    compile_check = ModuleType("compile_check")
    compile_check.compile_all = compile_all
    monkeypatch.setitem(sys.modules, "indexer_kernels.gpu.compile_check", compile_check)
    monkeypatch.setattr("sglang_ext.stage.gpu_refusal", gpu_refusal)
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
    assert gpu.compiled == [(2048, 64)] and gpu.prepared == [gpu.device]


def test_start_asks_for_what_auto_would_run(gpu):
    start(Stage(Settings(), {}), {}, device=gpu.device)
    assert [mode for mode, _, _ in gpu.asked] == [policy.AUTO_PREFILL]


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
    assert [said in line for line in lines(caplog, logging.WARNING)] == [True]


# Runtime switch


def test_switch_prefill():
    stage = Stage(Settings(mode="misa", runtime_switch=True), {})
    for number, mode in enumerate(SERVE_MODES):
        stage.switch_prefill(float(number))
        assert stage.settings.phase_mode("prefill") == mode
        assert stage.settings.phase_mode("decode") == "misa"
    assert stage.status()["mode_numbers"] == dict(enumerate(SERVE_MODES))


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
