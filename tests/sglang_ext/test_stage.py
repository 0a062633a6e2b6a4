"""The stage in a forward: one decision for all layers, what runs, layers kept native, strict."""

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from indexer_kernels import select_ragged
from sglang_ext import policy
from sglang_ext.runner import OutputForm
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.support.compare import assert_same_selection
from tests.support.inputs import Batch
from tests.support.stage_calls import MISA, Asked, Attention, calls, decode, log_lines, prefill, stage_batch

TOP_K = 64


@pytest.fixture(scope="module")
def batch() -> Batch:
    return stage_batch()


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
    stage, attention = Stage(replace(MISA, mode="auto", decode_mode="auto"), {}), Attention()
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
    stage = Stage(Settings(backend="reference", prefill_min_tokens=300, prefill_min_rows=1), {})
    assert prefill(stage, batch).decision == (policy.AUTO_PREFILL, "auto_selected")
    stage = Stage(Settings(backend="reference", prefill_min_tokens=301, prefill_min_rows=1), {})
    assert prefill(stage, batch).decision == ("native", "below_break_even")


def test_decode_keeps_a_plan_that_follows_the_lengths(batch):
    """SGLang refreshes a graph's metadata in place: the plan must be over its buffer, and must read nothing back."""
    stage, attention, asked = Stage(MISA, {}), Attention(), Asked()
    lengths, table = torch.tensor([130, 7], dtype=torch.int32), torch.zeros((2, 3), dtype=torch.int32)
    same = {"attention": attention, "lengths": lengths, "page_table": table, "unsupported": asked}
    first = decode(stage, **same)
    assert first.decision == ("misa", "configured") and decode(stage, **same) is first and asked.times == 1
    lengths.copy_(torch.tensor([131, 8]))
    plan = decode(stage, **same).parts[0][1].plan
    assert plan.row_lengths.tolist() == plan.tile_length.tolist() == plan.request_lengths.tolist() == [131, 8]
    assert plan.max_length == 3 * 64


@pytest.mark.parametrize("name", ["attention", "lengths", "page_table", "num_rows"])
def test_decode_decides_anew_for_other_tensors(name):
    stage = Stage(MISA, {})
    same = {
        "attention": Attention(),
        "lengths": torch.tensor([130, 7], dtype=torch.int32),
        "page_table": torch.zeros((2, 3), dtype=torch.int32),
        "num_rows": 2,
    }
    first = decode(stage, **same)
    other = Attention() if name == "attention" else 3 if name == "num_rows" else same[name].clone()
    assert decode(stage, **same | {name: other}) is not first


def test_decode_keeps_no_plan_of_a_copy():
    """A plan over copied lengths would not follow the next replay."""
    stage, attention = Stage(MISA, {}), Attention()
    strided = torch.tensor([130, 0, 7, 0], dtype=torch.int32)[::2]
    table = torch.zeros((2, 3), dtype=torch.int32)
    first = decode(stage, attention=attention, lengths=strided, page_table=table)
    strided.copy_(torch.tensor([131, 8]))
    second = decode(stage, attention=attention, lengths=strided, page_table=table)
    assert second is not first and second.parts[0][1].plan.row_lengths.tolist() == [131, 8]


def test_decode_keeps_no_plan_made_inside_a_capture(monkeypatch):
    """It would live in that graph's memory."""
    stage, attention = Stage(MISA, {}), Attention()
    same = {"lengths": torch.tensor([130, 7], dtype=torch.int32), "page_table": table(2)}
    monkeypatch.setattr("sglang_ext.forwards.capturing", lambda device: True)
    captured = decode(stage, attention=attention, **same)
    assert captured.parts and decode(stage, attention=attention, **same) is not captured


def test_what_layers_derive_from_lengths_lives_for_one_forward():
    """Layers ascend: one that is not above the last begins another forward, whose lengths may be new."""
    stage, attention = Stage(MISA, {}), Attention()
    same = {"lengths": torch.tensor([130, 7], dtype=torch.int32), "page_table": table(2)}

    def made(layer: int) -> object:
        forward = decode(stage, attention=attention, layer_id=layer, **same)
        return forward.parts[0][1].plan.kept("lengths", object)

    first = made(3)
    assert made(5) is first and made(60) is first
    second = made(3)
    assert second is not first and made(5) is second
    assert made(5) is not second, "a draft model's only layer begins a forward each time"


def test_decode_reads_no_length_back():
    meta = decode(Stage(MISA, {}), lengths=torch.empty(2, dtype=torch.int32, device="meta"))
    assert meta.decision == ("misa", "configured"), "a meta tensor has no values to read"


# What runs


def test_run_fills_out_with_the_modes_selection(batch):
    stage = Stage(MISA, {})
    forward = prefill(stage, batch)
    out = torch.full((15, TOP_K), -1, dtype=torch.int32)
    stage.run(forward, 0, batch.q, batch.weights, batch.k_pages, batch.page_table, OutputForm("position"), out)
    want = select_ragged("misa", *batch.ragged, MISA.params(TOP_K), backend="reference")
    native = select_ragged("native", *batch.ragged, MISA.params(TOP_K), backend="reference")
    assert not torch.equal(want.sort(dim=1).values, native.sort(dim=1).values)
    assert_same_selection(out[:13], [set(row) - {-1} for row in want.tolist()], batch.lengths, TOP_K)
    assert (out[13:] == -1).all()


def test_native_tail_rows_run_native(batch):
    stage = Stage(replace(MISA, native_tail_rows=4), {})
    # the first prompt goes on, the second ends here, the third decodes
    stage.note_prompts([300, 40, 70], [9, 3, 1], [302, 40, 1 << 40])
    forward = prefill(stage, batch)
    tail = [7, 8, 9, 10, 11]
    assert [(mode, rows.picked.tolist()) for mode, rows in forward.parts] == [
        ("misa", [0, 1, 2, 3, 4, 5, 6, 12]),
        ("native", tail),
    ]
    out = torch.full((13, TOP_K), -1, dtype=torch.int32)
    stage.run(forward, 0, batch.q, batch.weights, batch.k_pages, batch.page_table, OutputForm("position"), out)
    misa, native = (
        select_ragged(mode, *batch.ragged, MISA.params(TOP_K), backend="reference").tolist()
        for mode in ("misa", "native")
    )
    want = [set(native[row] if row in tail else misa[row]) - {-1} for row in range(13)]
    assert want != [set(row) - {-1} for row in misa]
    assert_same_selection(out, want, batch.lengths, TOP_K)


@pytest.mark.parametrize("noted", [None, ([300, 40, 71], [9, 3, 1]), ([300, 40, 70], [9, 3, 2]), ([300], [9])])
@pytest.mark.parametrize("strict", [False, True])
def test_native_tail_rows_of_unknown_prompts(batch, noted, strict):
    """A warm-up forward serves no request, and another batch's prompts say nothing of this one."""
    stage = Stage(replace(MISA, native_tail_rows=4, strict=strict), {})
    if noted is not None:
        stage.note_prompts(*noted, [400] * len(noted[0]))
    forward = prefill(stage, batch)
    assert forward.decision == ("native", "prompt_unknown") and forward.parts == ()
    assert not stage.takes(forward, 0)


def test_the_prompts_of_the_batch_made_last_count(batch):
    stage = Stage(replace(MISA, native_tail_rows=4), {})
    for end in (400, 40):
        stage.note_prompts([300, 40, 70], [9, 3, 1], [400, end, 400])
    (_, body), (_, tail) = prefill(stage, batch).parts
    assert tail.picked.tolist() == [9, 10, 11] and body.plan.num_rows == 10


def test_native_layers(batch):
    stage = Stage(replace(MISA, native_layers=(0, 2)), {})
    forward = prefill(stage, batch)
    assert [stage.takes(forward, layer) for layer in (0, 1, 2, 3)] == [False, True, False, True]
    assert calls(stage) == {
        ("prefill", "misa", "configured"): (2, 26),
        ("prefill", "native", "native_layer"): (2, 26),
    }


def test_a_native_forward_is_counted_by_its_own_reason_in_every_layer(batch):
    stage = Stage(replace(MISA, mode="native", decode_mode="native", native_layers=(0,)), {})
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
    said = log_lines(caplog, logging.WARNING)
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


@pytest.mark.parametrize("mode", ["misa", "misa_rerank", "hisa", "group_rerank"])
def test_strict_lets_a_decode_pass_that_nobody_named_a_mode_for(mode):
    """`mode` is prefill's: decode is native by choice, and whether its mode could run is not even asked."""
    stage, asked = Stage(Settings(strict=True, backend="reference", mode=mode), {}), Asked("no_statistics")
    forward = decode(stage, unsupported=asked)
    assert forward.decision == ("native", "auto_decode_native") and asked.times == 0
    assert not stage.takes(forward, 0) and stage.status()["refused"] == []
    with pytest.raises(RuntimeError, match="strict.*decode.*no_statistics"):
        decode(Stage(replace(stage.settings, decode_mode="hisa"), {}), unsupported=asked)


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
    monkeypatch.setattr("sglang_ext.support.gpu_refusal", lambda mode, q, params: None)
    stage = Stage(replace(MISA, backend="gpu"), {})
    assert prefill(stage, batch).decision.reason == want
    # decode is bounded by its page table: 3 pages
    assert decode(stage).decision.reason == "configured"
