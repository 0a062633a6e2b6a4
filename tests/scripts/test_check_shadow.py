"""scripts/check_shadow.py over a stand-in of a server: the two recalls agree, and a wrong one is found."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # scripts import their neighbours by name

import check_shadow
from indexer_kernels import IndexerParams, select_ragged
from indexer_kernels.synthetic import make_case
from indexer_kernels.traces import Trace
from sglang_ext.overlap import row_overlap

PARAMS = IndexerParams(top_k=64, active_heads=2, route_block=64)
ROWS = 32


def trace(layer: int, context: int = 600, rows: int = ROWS, **prompt: Any) -> Trace:
    case = make_case(context, rows, 8, seed=layer)
    return Trace("tiny", layer, context, case.q, case.weights, case.k, case.k_scale, case.ke.long() - 1, prompt)


def shadow_of(traces: list[Trace]) -> dict[int, tuple[int, float]]:
    """What shadow sampling of the traces' rows sums up, by its own code."""
    totals = {}
    for one in traces:
        ours, native = (select_ragged(mode, *one.case(), PARAMS, "reference") for mode in ("misa", "native"))
        shares = row_overlap(ours, native)
        totals[one.layer] = (len(shares), float(shares.sum()))
    return totals


def exposition(shadow: dict[int, tuple[int, float]], mode: str = "misa") -> str:
    lines = ["# HELP sglang_ext:shadow_rows_total Rows", "sglang:num_running_reqs 3.0"]
    for layer, (rows, overlap) in shadow.items():
        labels = f'engine_type="unified",layer="{layer}",mode="{mode}",model_name="m",phase="prefill",tp_rank="0"'
        lines.append(f"sglang_ext:shadow_rows_total{{{labels}}} {float(rows)}")
        lines.append(f"sglang_ext:shadow_overlap_total{{{labels}}} {overlap!r}")
        lines.append(f'sglang_ext:shadow_rows_at_most_total{{{labels},le="0.5"}} 1.0')
    return "\n".join(lines) + "\n"


def test_the_exposition_is_read():
    text = exposition({3: (40, 30.25), 11: (8, 8.0)}) + exposition({3: (5, 1.0)}, mode="hisa")
    assert check_shadow.overlap_of(text, "misa") == {3: (40, 30.25), 11: (8, 8.0)}
    assert check_shadow.overlap_of(text + exposition({3: (2, 1.0)}), "misa")[3] == (42, 31.25), "ranks add up"


def test_the_same_rows_agree_exactly():
    traces = [trace(0), trace(4)]
    lines = check_shadow.compare(shadow_of(traces), traces, "misa", PARAMS, "reference")
    assert [(line.layer, line.shadow_rows, line.trace_rows) for line in lines] == [(0, ROWS, ROWS), (4, ROWS, ROWS)]
    assert all(line.difference == pytest.approx(0, abs=1e-9) and line.recall < 1 for line in lines)
    assert "FAIL" not in check_shadow.format_table(lines, 0.001)


def test_a_layer_that_differs_is_found():
    traces = [trace(0), trace(4)]
    shadow = shadow_of(traces)
    shadow[4] = (shadow[4][0], shadow[4][1] - 0.02 * ROWS)
    shown = check_shadow.format_table(check_shadow.compare(shadow, traces, "misa", PARAMS, "reference"), 0.01)
    assert [line.split()[0] for line in shown.splitlines() if "FAIL" in line] == ["4"]


@pytest.mark.parametrize("layers", [{}, {0: (1, 1.0)}, {0: (1, 1.0), 4: (1, 1.0), 5: (1, 1.0)}])
def test_other_layers_are_an_error(layers):
    with pytest.raises(ValueError, match="traces hold layers \\[0, 4\\]"):
        check_shadow.compare(layers, [trace(0), trace(4)], "misa", PARAMS, "reference")


def test_the_last_rows_of_a_trace_are_left_out():
    kept = check_shadow.spread_rows(trace(0), 10)
    assert kept.positions.tolist() == list(range(600 - ROWS, 595)) and len(kept.q) == len(kept.weights) == ROWS - 5
    assert torch.equal(kept.q.view(torch.uint8), trace(0).q.view(torch.uint8)[: ROWS - 5])
    assert check_shadow.spread_rows(trace(0, rows=4), 10) is None
    with pytest.raises(ValueError, match="prompt a:1 was served in chunks"):
        check_shadow.spread_rows(trace(0, cached_tokens=64, source="a:1"), 10)


class FakeServer:
    """Serves what was captured; /metrics is one look behind /server_info."""

    def __init__(self, shadow: dict[int, tuple[int, float]], errors: int = 0) -> None:
        self.shadow, self.errors, self.looks = shadow, errors, 0

    def status(self) -> dict[str, Any]:
        overlap = [
            {"phase": "prefill", "mode": "misa", "layer": layer, "rows": rows, "mean": overlap / rows}
            for layer, (rows, overlap) in self.shadow.items()
        ]
        settings = {"active_heads": 2, "route_block": 64, "native_layers": []}
        return {
            "settings": settings,
            "shadow": {"overlap": overlap, "forwards": {"prefill/sampled": 1, "prefill/error": self.errors}},
        }

    def call(self, path: str) -> str:
        assert path == "/metrics/"
        self.looks += 1
        return exposition({0: (1, 1.0)} if self.looks == 1 else self.shadow)


@pytest.mark.parametrize(("off", "errors", "code"), [(0.0, 0, 0), (0.5, 0, 1), (0.0, 1, 2)])
def test_a_whole_run(tmp_path, monkeypatch, capsys, off, errors, code):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [1, 2, 3]}\n')
    # of 2 * 2048 + 200 tokens, so that rows have something to choose with the model's own top_k
    traces = [replace(trace(layer, context=4300, rows=6), prompt={"cached_tokens": 0}) for layer in (0, 1)]
    monkeypatch.setattr(sys.modules[__name__], "PARAMS", IndexerParams(active_heads=2, route_block=64))
    shadow = {layer: (rows, overlap - off * rows) for layer, (rows, overlap) in shadow_of(traces).items()}
    started: dict[str, Any] = {}

    @contextlib.contextmanager
    def launch(model: Path, log: Path, settings: Any, extra: Any, environ: Any, **more: Any) -> Any:
        started.update(model=model, settings=settings, extra=extra)
        yield FakeServer(shadow, errors)

    monkeypatch.setattr(check_shadow, "launch", launch)
    monkeypatch.setattr(check_shadow, "capture", lambda *given: traces)
    monkeypatch.setattr(check_shadow.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(check_shadow, "spread_rows", lambda trace, rows: trace)
    out = tmp_path / "out"
    arguments = ["--model", "m", "--prompts", str(prompts), "--out", str(out), "--mode", "misa", "--tp-size", "2"]
    assert check_shadow.main(arguments) == code
    assert started["settings"]["shadow_rate"] == "1" and started["extra"][-2:] == ["--tp-size", "2"]
    if errors:
        assert "met an error in 1 forwards" in capsys.readouterr().err and not (out / "shadow.json").exists()
        return
    record = json.loads((out / "shadow.json").read_text())
    assert [line["layer"] for line in record["lines"]] == [0, 1] and record["failed"] == ([0, 1] if code else [])


@pytest.mark.parametrize("wrong", [["--rows", "1"], ["--tolerance", "0"], ["--prompts", "missing.jsonl"]])
def test_wrong_arguments(tmp_path, wrong, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "x"}\n')
    arguments = ["--model", "m", "--prompts", str(prompts), "--out", str(tmp_path), *wrong]
    assert check_shadow.main(arguments) == 2
    assert "check_shadow: error:" in capsys.readouterr().err
