"""Traces of the small model, and the prompts for capturing the same from a server."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers (it comes with SGLang) is not installed")
pytest.importorskip("safetensors", reason="safetensors (it comes with SGLang) is not installed")

import make_small_traces
import retrieval_prompts
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.traces import load_traces
from retrieval_tasks import answer_text, make_case
from small_dsa.examples import tokenizer

CHECKPOINT = Path(__file__).resolve().parents[1] / "data" / "small_dsa"
LENGTH, ROWS = 2600, 12


def run(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    assert module.main() == 0


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Made once: it takes seconds."""
    path = tmp_path_factory.mktemp("traces") / "small.npz"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, make_small_traces, "--model", CHECKPOINT, "--lengths", LENGTH, "--rows", ROWS, "--out", path)
    return load_traces(path)


def prompt_ids() -> list[int]:
    case = make_case("niah_multikey_2", LENGTH, lambda text: len(tokenizer().encode(text).ids), 0)
    answer = tokenizer().encode(answer_text(case.questions[0]), add_special_tokens=False).ids
    return tokenizer().encode(case.prompt()).ids + answer


def test_one_trace_per_layer_with_all_keys(traces):
    context = len(prompt_ids())
    assert 2300 < context <= LENGTH
    assert [trace.layer for trace in traces] == [0, 1, 2]
    for trace in traces:
        assert trace.model == "small-dsa" and trace.context == context
        assert trace.q.shape == (ROWS, 64, 128) and trace.q.dtype == torch.float8_e4m3fn
        assert trace.weights.shape == (ROWS, 64) and trace.weights.dtype == torch.float32
        assert trace.k.shape == (context, 128) and trace.k_scale.shape == (context,)
        wanted = {"task": "niah_multikey_2", "tokens": LENGTH, "seed": 0, "source": "scripts/make_small_traces.py"}
        assert trace.prompt == wanted
        assert not trace.q.float().isnan().any() and (trace.k_scale > 0).all()


def test_rows_see_more_tokens_than_are_selected_and_half_are_the_last(traces):
    context = traces[0].context
    for trace in traces:
        positions = trace.positions.tolist()
        assert positions[ROWS // 2 :] == list(range(context - ROWS // 2, context))
        assert positions == sorted(set(positions)) and positions[0] >= 2048
        assert positions[ROWS // 2 - 1] - positions[0] > 0.5 * (context - 2048)


def test_the_last_rows_look_for_the_needle(traces):
    """Where the answer's number is written, the last layer's best token stands in the needle, of all 2492."""
    tokens = prompt_ids()
    trace = traces[2]
    number = tokens[-3:]  # after the blank: three tokens of a 7-digit number
    places = [n for n in range(len(tokens) - 40) if tokens[n : n + 3] == number]
    assert len(places) == 1
    row = trace.positions.tolist().index(len(tokens) - 4)  # the blank, which must find the first of them
    scores = token_scores(trace.q, trace.weights, trace.k, trace.k_scale)[row, : len(tokens) - 64]
    assert places[0] - 12 <= int(scores.argmax()) < places[0] + 3


def test_layers_differ_and_their_scores_do_not_all_vanish(traces):
    scores = [token_scores(trace.q, trace.weights, trace.k, trace.k_scale) for trace in traces]
    assert all(float(s.std()) > 1e-3 for s in scores)
    assert not torch.equal(traces[0].k.float(), traces[1].k.float())


def test_prompts_for_a_server_are_those_of_the_traces(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="transformers (it comes with SGLang) is not installed")
    out = tmp_path / "prompts.jsonl"
    tasks = ("niah_multikey_2", "vt")
    run(
        monkeypatch,
        retrieval_prompts,
        "--tokenizer",
        CHECKPOINT,
        "--tasks",
        *tasks,
        "--lengths",
        600,
        900,
        "--out",
        out,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["task"], line["tokens"]) for line in lines] == [(t, n) for n in (600, 900) for t in tasks]
    for line in lines:
        case = make_case(line["task"], line["tokens"], lambda text: len(tokenizer().encode(text).ids) - 1, line["seed"])
        assert line["text"] == case.prompt() + answer_text(case.questions[0]) and line["text"].split("Answer:")[
            0
        ].endswith("?\n")
        assert 0.85 * line["tokens"] < len(tokenizer().encode(line["text"]).ids) <= line["tokens"]


@pytest.mark.parametrize("module", [make_small_traces, retrieval_prompts])
def test_tasks_without_a_generator_are_refused(monkeypatch, tmp_path, capsys, module):
    with pytest.raises(SystemExit):
        source = "--model" if module is make_small_traces else "--tokenizer"
        run(monkeypatch, module, source, CHECKPOINT, "--tasks", "qa_1", "--out", tmp_path / "none.npz")
    assert "invalid choice: 'qa_1'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["traces.json", "nowhere/traces.npz"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(make_small_traces, "traces_of", lambda *args: pytest.fail("worked for minutes"))
    monkeypatch.setattr(sys, "argv", ["make_small_traces", "--model", "m", "--out", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        make_small_traces.main()
    assert ended.value.code == 2 and "must end in .npz, in a folder that exists" in capsys.readouterr().err
