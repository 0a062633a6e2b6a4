"""What runs, and why: every reason is reached from plain values."""

import dataclasses
from dataclasses import replace

import pytest

from indexer_kernels import MODES
from indexer_kernels.stage import MEANS_MODES
from sglang_ext import break_even
from sglang_ext.policy import (
    AUTO_DECODE,
    AUTO_PREFILL,
    BY_CHOICE,
    STATISTICS_MODES,
    UNSUPPORTED,
    BatchView,
    Decision,
    always_native,
    asks,
    choose,
    kernel_modes,
    mode_to_try,
    needs_statistics,
)
from sglang_ext.settings import SERVE_MODES, Settings

LONG = 40960  # the break-even of 64 heads
ROWS = Settings().prefill_min_rows


def prefill(*lengths: int, unsupported: str | None = None) -> BatchView:
    return BatchView("prefill", ROWS, lengths, max(lengths, default=0), unsupported, heads=64)


def decode(unsupported: str | None = None) -> BatchView:
    return BatchView("decode", 4, None, 1 << 17, unsupported)


PAGES = Settings(candidate_unit="page")
TABLE = [
    # auto prefill with pages as candidates
    (PAGES, prefill(LONG), Decision("native", "page_candidates")),
    (replace(PAGES, backend="reference"), prefill(LONG), Decision("native", "page_candidates")),
    (PAGES, prefill(LONG, unsupported="hisparse"), Decision("native", "page_candidates")),
    # auto prefill: the longest request decides, its length counts from the threshold on
    (Settings(), prefill(LONG), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(backend="reference"), prefill(LONG), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(), prefill(LONG - 1), Decision("native", "below_break_even")),
    (Settings(), prefill(1, LONG, 64), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(), prefill(1, LONG - 1, 64), Decision("native", "below_break_even")),
    (Settings(prefill_min_tokens=1), prefill(1), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(prefill_min_tokens=100), prefill(99), Decision("native", "below_break_even")),
    (Settings(mode="native", prefill_mode="auto"), prefill(LONG), Decision(AUTO_PREFILL, "auto_selected")),
    # the break-even is the model's, the largest where its heads are not known
    (Settings(), prefill(57344)._replace(heads=32), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(), prefill(57343)._replace(heads=32), Decision("native", "below_break_even")),
    (Settings(), prefill(57343)._replace(heads=0), Decision("native", "below_break_even")),
    (Settings(prefill_min_tokens=100), prefill(100)._replace(heads=32), Decision(AUTO_PREFILL, "auto_selected")),
    # auto with another mode: what it waits for is the same, and pages are misa_rerank's only
    (Settings(auto_prefill_mode="hisa"), prefill(LONG), Decision("hisa", "auto_selected")),
    (Settings(auto_prefill_mode="hisa"), prefill(LONG - 1), Decision("native", "below_break_even")),
    (replace(PAGES, auto_prefill_mode="hisa"), prefill(LONG), Decision("hisa", "auto_selected")),
    (Settings(auto_prefill_mode="hisa", mode="misa"), prefill(1), Decision("misa", "configured")),
    # few rows
    (Settings(), prefill(LONG)._replace(rows=ROWS - 1), Decision("native", "few_rows")),
    (Settings(prefill_min_rows=1), prefill(LONG)._replace(rows=1), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(mode="misa_rerank"), prefill(LONG)._replace(rows=1), Decision("misa_rerank", "configured")),
    # no lengths known, or none at all: the bound decides
    (Settings(), BatchView("prefill", ROWS, None, LONG, heads=64), Decision(AUTO_PREFILL, "auto_selected")),
    (Settings(), BatchView("prefill", ROWS, None, LONG - 1, heads=64), Decision("native", "below_break_even")),
    (Settings(), prefill(), Decision("native", "below_break_even")),
    # auto decode
    (Settings(), decode(), Decision("native", "auto_decode_native")),
    (PAGES, decode(), Decision("native", "auto_decode_native")),
    (Settings(mode="hisa", decode_mode="auto"), decode(), Decision("native", "auto_decode_native")),
    # `mode` names none for decode: that is auto, unless it is native
    *[(Settings(mode=m), decode(), Decision("native", "auto_decode_native")) for m in MODES if m != "native"],
    (Settings(mode="misa_rerank"), decode("no_statistics"), Decision("native", "auto_decode_native")),
    (
        Settings(mode="misa_rerank", decode_tokens=1 << 17),
        decode()._replace(rows=64),
        Decision("hisa", "auto_selected"),
    ),
    (Settings(mode="hisa", decode_tokens=1 << 17), decode(), Decision("native", "below_break_even")),
    (Settings(mode="native", decode_tokens=1 << 17), decode(), Decision("native", "configured_native")),
    (Settings(mode="misa_rerank", decode_mode="hisa"), decode(), Decision("hisa", "configured")),
    (Settings(mode="native", decode_mode="hisa"), decode(), Decision("hisa", "configured")),
    # a mode set explicitly runs at any length, whatever its candidates are
    (replace(PAGES, mode="misa_rerank"), prefill(LONG), Decision("misa_rerank", "configured")),
    *[(Settings(mode=mode), prefill(1), Decision(mode, "configured")) for mode in MODES if mode != "native"],
    *[(Settings(decode_mode=mode), decode(), Decision(mode, "configured")) for mode in MODES if mode != "native"],
    (Settings(mode="hisa", prefill_mode="misa"), prefill(5), Decision("misa", "configured")),
    # native by choice
    (Settings(mode="native"), prefill(LONG), Decision("native", "configured_native")),
    (Settings(mode="native"), decode(), Decision("native", "configured_native")),
    (Settings(mode="hisa", decode_mode="native"), decode(), Decision("native", "configured_native")),
    (Settings(prefill_mode="native"), prefill(LONG), Decision("native", "configured_native")),
    # what was chosen native needs no support, and is not called unsupported
    (Settings(mode="native"), prefill(LONG, unsupported="hisparse"), Decision("native", "configured_native")),
    (Settings(), decode("hisparse"), Decision("native", "auto_decode_native")),
    # unsupported beats every mode asked for, whatever the length
    *[(Settings(mode="hisa"), prefill(9, unsupported=reason), Decision("native", reason)) for reason in UNSUPPORTED],
    *[(Settings(decode_mode="hisa"), decode(reason), Decision("native", reason)) for reason in UNSUPPORTED],
    (Settings(), prefill(LONG, unsupported="kv_shard"), Decision("native", "kv_shard")),
    (Settings(), prefill(1, unsupported="kv_shard"), Decision("native", "kv_shard")),
]


@pytest.mark.parametrize(("settings", "batch", "want"), TABLE)
def test_choose(settings, batch, want):
    assert choose(batch, settings) == want


def test_the_table_reaches_every_reason():
    reached = {want.reason for _, _, want in TABLE}
    # A layer kept native, or taken back by the guard, and a prompt's end nobody knows, come after the forward's
    # decision (test_stage.py, test_guard.py).
    assert reached == set(UNSUPPORTED) | BY_CHOICE - {"native_layer", "guard", "prompt_unknown"}


def test_the_reasons_are_told_apart():
    assert not set(UNSUPPORTED) & BY_CHOICE
    assert all(UNSUPPORTED.values())


@pytest.mark.parametrize("unit", ["token", "page"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mode", SERVE_MODES)
def test_asks_is_false_exactly_where_nothing_but_native_can_come_out(phase, mode, unit):
    settings = Settings(**{f"{phase}_mode": mode}, candidate_unit=unit)
    longest = BatchView(phase, ROWS, (1 << 20,) if phase == "prefill" else None, 1 << 20)
    outcome = choose(longest, settings).mode
    assert asks(phase, settings) == (outcome != "native")
    if asks(phase, settings):
        assert mode_to_try(phase, settings) == outcome


# Decode: {rows: tokens}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(break_even, "DECODE_MIN_TOKENS", {8: 1 << 16, 32: 1 << 15})


@pytest.mark.parametrize(
    ("rows", "tokens", "limit", "want"),
    [
        (7, 1 << 20, 1 << 20, Decision("native", "below_break_even")),
        (8, 1 << 16, 1 << 20, Decision("hisa", "auto_selected")),
        (31, (1 << 16) - 1, 1 << 20, Decision("native", "below_break_even")),
        (32, 1 << 15, 1 << 20, Decision("hisa", "auto_selected")),
        (512, 1 << 15, 1 << 20, Decision("hisa", "auto_selected")),
        (512, (1 << 15) - 1, 1 << 20, Decision("native", "below_break_even")),
        (512, 1 << 20, (1 << 15) - 64, Decision("native", "below_break_even")),
    ],
)
def test_auto_decode_goes_by_rows_and_usual_contexts(measured, rows, tokens, limit, want):
    view, settings = BatchView("decode", rows, None, limit), Settings(decode_tokens=tokens)
    assert choose(view, settings) == want
    assert choose(view._replace(unsupported="no_statistics"), settings) == Decision("native", "no_statistics")
    assert choose(view, Settings()) == Decision("native", "auto_decode_native"), "nobody said how long contexts are"
    assert choose(view, Settings(decode_mode="hisa")) == Decision("hisa", "configured")


def test_auto_decode_asks_once_contexts_are_known():
    settings = Settings(decode_tokens=1 << 16)
    assert asks("decode", settings) and mode_to_try("decode", settings) == AUTO_DECODE
    assert needs_statistics(settings) and not always_native(settings)
    assert not asks("decode", Settings()) and not needs_statistics(Settings())


def test_one_row_never_decodes_by_blocks():
    assert choose(BatchView("decode", 1, None, 1 << 20), Settings(decode_tokens=1 << 20)).mode == "native"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "native"])
def test_kernel_modes(mode, phase):
    want = ("misa_rerank", "hisa") if (mode, phase) == ("misa_rerank", "decode") else (mode,)
    assert kernel_modes(phase, Settings(**{f"{phase}_mode": mode})) == want


@pytest.mark.parametrize(
    ("phase", "mode", "want"),
    [("prefill", "misa", ("misa", "native")), ("decode", "misa", ("misa",)), ("prefill", "native", ("native",))],
)
def test_kernel_modes_of_native_tail_rows(phase, mode, want):
    assert kernel_modes(phase, Settings(**{f"{phase}_mode": mode}, native_tail_rows=4)) == want


def test_statistics_modes_are_those_that_the_kernels_take_means_for():
    assert set(STATISTICS_MODES) == set(MEANS_MODES)


@pytest.mark.parametrize("mode", SERVE_MODES)
def test_statistics_are_for_decode_modes_that_read_them(mode):
    assert needs_statistics(Settings(decode_mode=mode)) == (mode in ("hisa", "misa_rerank"))
    assert not needs_statistics(Settings(prefill_mode=mode, decode_mode="native"))
    assert not needs_statistics(Settings(mode=mode)), "a mode of prefill allocates nothing for decode"
    assert needs_statistics(Settings(mode=mode, decode_tokens=1 << 17)) == (mode != "native")
    assert needs_statistics(Settings(mode=mode, decode_mode="hisa"))


def test_the_same_question_has_the_same_answer():
    batch, settings = prefill(LONG, 3), Settings()
    before = (batch, dataclasses.astuple(settings))
    assert choose(batch, settings) == choose(batch, settings)
    assert (batch, dataclasses.astuple(settings)) == before
