"""`sglang-ext tune` from traces to a file that a server takes: on made-up traces, and on the package's."""

import json
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from indexer_kernels.synthetic import make_case
from indexer_kernels.traces import Trace, save_traces
from sglang_ext.cli import tune, tune_compile, tune_cost
from sglang_ext.cli.main import main
from sglang_ext.cli.tune_choice import Cost
from sglang_ext.settings import load_settings
from sglang_ext.settings_file import read_settings_file

# A grid small enough for seconds: contexts of 6000 tokens, of which rows select 2048.
SMALL = ["--active-heads", "4,8", "--candidates", "2560,3072", "--top-blocks", "20,24", "--quiet"]
CHEAP = ["--modes", "misa_rerank,hisa", *SMALL]
KERNELS_SERVE = tune_compile.kernels_serve


def trace(layer: int, context: int = 6000, model: str = "tiny-dsa", heads: int = 32) -> Trace:
    case = make_case(context, 4, heads, seed=layer)
    return Trace(model, layer, context, case.q, case.weights, case.k, case.k_scale, case.ke.long() - 1, "made up")


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("traces")
    for layer in (0, 2):
        save_traces(folder / f"layer{layer}.npz", [trace(layer)])
    return str(folder)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "tuned.json"


def tuned(out, traces: str, *flags: str, code: int = 0) -> dict[str, Any]:
    assert main(["tune", "--traces", traces, "--out", str(out), *flags]) == code
    return json.loads(out.read_text()) if code == 0 else {}


def test_a_file_that_a_server_takes(traces, out, capsys):
    record = out.with_name("all.json")
    content = tuned(out, traces, *CHEAP, "--recall-target", "0.5", "--recall-min", "0", "--json", str(record))
    settings = load_settings(None, {"SGLANG_EXT_SETTINGS_FILE": str(out)})
    facts = content["tuned_on"]
    assert (facts["model"], facts["num_layers"], facts["heads"], facts["top_k"]) == ("tiny-dsa", 3, 32, 2048)
    assert facts["recall_target"] == {"mean": 0.5, "row": 0.0} and facts["contexts"] == [6144]
    assert facts["cost"] == tune_cost.FORMULA and facts["gpu"] is None and facts["date"] and facts["command"]
    assert "prefill_min_tokens" not in str(content["layers"]), "auto's own break-even holds: nothing was timed"
    read_settings_file(str(out)).check_model(3, 32, 2048)
    for layer in (0, 2):
        own, entry = settings.of_layer(layer), content["layers"][str(layer)]
        assert own.phase_mode("prefill") == "auto" and own.auto_prefill_mode == entry["prefill_mode"] != "native"
        assert own.phase_mode("decode") == "auto"
        assert all(getattr(own, name) == entry[name] for name in ("active_heads", "candidates") if name in entry)
        assert f"{entry['prefill_mode']} " in entry["why"] and "worst row" in entry["why"]
    untraced = content["layers"]["1"]
    assert untraced == {"prefill_mode": "native", "why": "no trace shows this layer"}
    assert settings.of_layer(1).phase_mode("prefill") == "native"
    said = capsys.readouterr().out
    assert "layer   0" in said and f"wrote {out}" in said
    # the record holds every option of the grid, and the choice is its cheapest that meets the target
    options = [one for one in json.loads(record.read_text())["options"] if one["layer"] == 0]
    assert len(options) == 2 * 2 + 2
    able = [one for one in options if one["contexts"]["6144"]["recall_mean"] >= 0.5]
    cheapest = min(able, key=lambda one: one["contexts"]["6144"]["cost"]["option"])
    assert cheapest["mode"] == content["layers"]["0"]["prefill_mode"]


def test_layers_that_nothing_is_good_enough_for_are_native(traces, out):
    content = tuned(out, traces, *CHEAP, "--recall-target", "1", "--recall-min", "1")
    assert all(entry["prefill_mode"] == "native" for entry in content["layers"].values())
    assert content["layers"]["0"]["why"].startswith("nothing meets recall 1 (worst row 1): the most has ")
    assert content["tuned_on"]["share_of_native"] == 1.0


def test_parameters_that_recall_was_measured_with_are_in_the_file(traces, out):
    content = tuned(out, traces, *CHEAP, "--route-block", "256", "--recall-target", "0", "--recall-min", "0")
    assert content["route_block"] == 256 and content["route_statistic"] == "max" and "top_k" not in content


@pytest.mark.parametrize("layers", [3, 61])
def test_a_model_folder_counts_the_layers(traces, out, tmp_path, layers):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "index_n_heads": 32}))
    content = tuned(out, traces, *CHEAP, "--model-path", str(tmp_path))
    assert content["tuned_on"]["num_layers"] == layers == len(content["layers"])


def test_timed_costs_decide_and_give_the_shortest_prompt(traces, out, monkeypatch):
    """As on a GPU, with costs made up: hisa is cheap, and only it may be."""

    def time_costs(samples, able, base, how, done):
        assert how.rows == 8192 and done() is not False
        return {
            (layer, option, 6144): Cost(10.0, 2.0 if option.mode == "hisa" else 9.0)
            for layer, options in able.items()
            for option in options
        }

    monkeypatch.setattr(tune, "time_costs", time_costs)
    monkeypatch.setattr(tune, "timing", lambda cost, rows, q: tune_cost.Timed(rows, None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    content = tuned(out, traces, *CHEAP, "--recall-target", "0", "--recall-min", "0")
    assert content["layers"]["0"]["prefill_mode"] == "hisa"
    assert content["layers"]["0"]["prefill_min_tokens"] == 6000, "the shortest prompt measured"
    assert content["tuned_on"]["share_of_native"] == 0.2
    assert "device milliseconds of 8192 rows on one H200" in content["tuned_on"]["cost"]


def test_a_device_that_cannot_time_is_one_line(traces, out, monkeypatch, capsys):
    def too_large(*_args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(tune_cost, "StageCase", lambda *args: None)
    monkeypatch.setattr(tune_cost, "stage_milliseconds", too_large)
    monkeypatch.setattr(tune_cost.Sample, "to", lambda self, device: self)
    monkeypatch.setattr(tune, "timing", lambda cost, rows, q: tune_cost.Timed(rows, None))
    tuned(out, traces, *CHEAP, "--recall-target", "0", "--recall-min", "0", code=2)
    assert "layer 0 at 6144 tokens could not be timed: CUDA out of memory; fewer --rows" in capsys.readouterr().err


def test_modes_without_a_row_to_measure_are_named(out, tmp_path, capsys):
    """Of group_rerank whole groups must be in the trace: these are the second and third of a group."""
    whole = trace(0)
    rows = {name: getattr(whole, name)[1:3] for name in ("q", "weights", "positions")}
    save_traces(tmp_path / "a.npz", [replace(whole, **rows)])
    content = tuned(out, str(tmp_path / "a.npz"), *SMALL, "--modes", "hisa,group_rerank")
    assert "not measured, no row of the traces can tell: group_rerank" in capsys.readouterr().out
    assert {entry["prefill_mode"] for entry in content["layers"].values()} <= {"hisa", "native"}


def test_a_layer_that_was_not_traced_at_every_context_is_native(out, tmp_path):
    """Its mode would run at all prompts from prefill_min_tokens on, the longest included."""
    save_traces(tmp_path / "a.npz", [trace(0, 3000), trace(0, 6000), trace(1, 3000)])
    content = tuned(out, str(tmp_path / "a.npz"), *CHEAP, "--recall-target", "0", "--recall-min", "0")
    assert content["tuned_on"]["contexts"] == [3072, 6144]
    assert content["layers"]["0"]["prefill_mode"] != "native"
    assert content["layers"]["1"]["prefill_mode"] == "native"
    assert "no mode was measured at every context" in content["layers"]["1"]["why"]


def test_options_that_no_server_runs_are_left_out(traces, out, capsys):
    pytest.importorskip("tilelang")
    content = tuned(out, traces, *CHEAP, "--active-heads", "5", "--recall-target", "0", "--recall-min", "0")
    assert "left out, no server runs it: misa_rerank active_heads=5 candidates=2560" in capsys.readouterr().out
    assert {entry["prefill_mode"] for entry in content["layers"].values()} == {"hisa", "native"}


@pytest.fixture
def kernels(monkeypatch):
    """A GPU that serves every mode: `compiled` lists what was asked of the compiler, call by call; `broken` is a mode
    and a number of active heads whose kernels do not compile.
    """
    seen = SimpleNamespace(compiled=[], broken=None)

    def compile_each(wanted, num_heads):
        seen.compiled.append([(num_heads, mode, params) for mode, params in wanted])
        for mode, params in wanted:
            error = "CompileError: no" if (mode, params.active_heads) == seen.broken else None
            yield [("pack", None), ("scan", error), ("list", error)]

    module = ModuleType("compile_check")
    module.compile_each = compile_each
    monkeypatch.setitem(sys.modules, "indexer_kernels.gpu.compile_check", module)
    monkeypatch.setattr(tune_compile, "kernels_serve", lambda mode, q, params: True)
    return seen


def test_the_grid_is_compiled_at_once_before_anything_is_measured(traces, out, kernels, monkeypatch):
    measure, wanted = tune.recalls, []

    def recalls(*args):
        wanted.extend(kernels.compiled)
        return measure(*args)

    monkeypatch.setattr(tune, "recalls", recalls)
    tuned(out, traces, *CHEAP)
    assert wanted == kernels.compiled and len(wanted) == 1
    heads, modes, params = zip(*wanted[0])
    assert set(heads) == {32} and Counter(modes) == {"native": 1, "misa_rerank": 2 * 2, "hisa": 2}
    budgets = {(one.active_heads, one.candidates) for mode, one in zip(modes, params) if mode == "misa_rerank"}
    assert budgets == {(4, 2560), (4, 3072), (8, 2560), (8, 3072)}
    assert {one.top_blocks for mode, one in zip(modes, params) if mode == "hisa"} == {20, 24}


def test_an_option_whose_kernels_do_not_compile_is_left_out(traces, out, kernels, capsys):
    kernels.broken = ("misa_rerank", 4)
    record = out.with_name("all.json")
    tuned(out, traces, *CHEAP, "--recall-target", "0", "--recall-min", "0", "--json", str(record))
    shown = "misa_rerank active_heads=4 candidates=2560: kernel scan does not compile: CompileError: no"
    assert f"left out, no server runs it: {shown}" in capsys.readouterr().out
    content = json.loads(record.read_text())
    options = [(one["mode"], one["params"].get("active_heads")) for one in content["options"] if one["layer"] == 0]
    assert Counter(options) == {("misa_rerank", 8): 2, ("hisa", None): 2}, "not measured either"
    assert list(content["left_out"]) == [f"misa_rerank active_heads=4 candidates={n}" for n in (2560, 3072)]


def test_a_mode_of_which_nothing_compiles_is_left_out_for_that_reason_alone(traces, out, kernels, capsys):
    kernels.broken = ("misa_rerank", 4)
    tuned(out, traces, *CHEAP, "--active-heads", "4")
    said = capsys.readouterr().out
    assert said.count("left out, no server runs it: misa_rerank") == 2 and "no row of the traces can tell" not in said


def test_an_error_of_natives_kernels_is_left_to_the_measurement(traces, out, kernels):
    kernels.broken = ("native", 4)
    content = tuned(out, traces, *CHEAP, "--recall-target", "0", "--recall-min", "0")
    assert content["layers"]["0"]["prefill_mode"] != "native"


def test_what_no_server_runs_is_not_compiled(traces, out, kernels):
    pytest.importorskip("tilelang")
    tuned(out, traces, *CHEAP, "--active-heads", "5")
    assert {mode for _, mode, _ in kernels.compiled[0]} == {"native", "hisa"}


@pytest.mark.parametrize(("cost", "calls"), [("formula", 0), ("measured", 1)])
def test_the_reference_backend_needs_kernels_only_to_be_timed(traces, out, kernels, monkeypatch, cost, calls):
    how = None if cost == "formula" else tune_cost.Timed(8192, None)
    monkeypatch.setattr(tune, "timing", lambda *args: how)
    monkeypatch.setattr(tune, "time_costs", lambda samples, able, *rest: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    tuned(out, traces, *CHEAP, "--backend", "reference", "--cost", cost, "--recall-target", "1", "--recall-min", "1")
    assert len(kernels.compiled) == calls


def test_nothing_is_compiled_without_a_gpu(traces, out, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune_compile, "kernels_serve", KERNELS_SERVE)
    tuned(out, traces, *CHEAP)
    assert kernels.compiled == []


def test_the_packages_traces(out, capsys):
    """On what a small model really looks for, at the shorter of its prompts."""
    flags = ["--contexts", "8192", "--modes", "misa_rerank", "--active-heads", "8", "--candidates", "4096", "--quiet"]
    assert main(["tune", "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert "of small-dsa; the file is for that model only" in said
    entry = json.loads(out.read_text())["layers"]["1"]
    assert (entry["prefill_mode"], entry["candidates"]) == ("misa_rerank", 4096)
    assert float(entry["why"].split("recall ")[1].split(",")[0]) > 0.95


# What goes wrong


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recall-target", "1.5"], "--recall-target 1.5 must be from 0 to 1"),
        (["--recall-min", "-1"], "--recall-min -1.0 must be from 0 to 1"),
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--modes", "native,hisa"], "--modes native is not to be chosen from"),
        (["--candidate-unit", "page"], "--candidate-unit page: auto does not run"),
        (["--candidates", "100"], "candidates=100 must be at least top_k"),
        (["--top-blocks", "4"], "top_blocks=4"),
        (["--contexts", "64"], "no trace has contexts=[64]"),
        (["--model-path", "nowhere"], "--model-path nowhere has no config.json"),
        (["--json", "nowhere/all.json"], "the folder of nowhere/all.json does not exist"),
        (["--cost", "measured"], "--cost measured: there is no GPU here"),
    ],
)
def test_wrong_arguments_are_one_line(traces, out, flags, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuned(out, traces, *CHEAP, *flags, code=2)
    assert said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, traces are of layer 2"),
        ({}, "num_hidden_layers=None"),
        ({"num_hidden_layers": 3, "index_n_heads": 64}, "index_n_heads=64, traces and --top-k have 32"),
        ({"num_hidden_layers": 3, "index_n_heads": 32, "index_topk": 1024}, "index_topk=1024"),
    ],
)
def test_a_config_that_does_not_fit(traces, out, tmp_path, config, said, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    tuned(out, traces, *CHEAP, "--model-path", str(tmp_path), code=2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--out"])
def test_a_folder_is_no_file_to_write(traces, out, tmp_path, flag, capsys, monkeypatch):
    """Told before anything is measured, not after."""
    monkeypatch.setattr(tune, "recalls", lambda *args: pytest.fail("measured"))
    assert main(["tune", "--traces", traces, "--out", str(out), *CHEAP, flag, str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder, it must be the name of a file" in capsys.readouterr().err


def test_the_record_does_not_replace_the_settings(traces, out, capsys, monkeypatch):
    monkeypatch.setattr(tune, "recalls", lambda *args: pytest.fail("measured"))
    monkeypatch.chdir(out.parent)
    assert main(["tune", "--traces", traces, "--out", str(out), *CHEAP, "--json", out.name]) == 2
    assert f"--json {out.name} is the file of --out" in capsys.readouterr().err


def test_traces_of_two_models(out, tmp_path, capsys):
    for other, said in ((trace(0, 2100, "b"), "several models: a, b"), (trace(1, 2100, "a", 64), "numbers of heads")):
        save_traces(tmp_path / "a.npz", [trace(0, 2100, "a"), other])
        tuned(out, str(tmp_path / "a.npz"), *CHEAP, code=2)
        assert said in capsys.readouterr().err


def test_an_empty_folder(out, tmp_path, capsys):
    tuned(out, str(tmp_path), *CHEAP, code=2)
    assert "there is none" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(out, monkeypatch):
    from sglang_ext.cli.tune_file import write_settings_file

    write_settings_file(out, {"format": 1, "mode": "hisa"})
    with pytest.raises(ValueError, match="mode='fast'"):
        write_settings_file(out, {"format": 1, "mode": "fast"})
    assert json.loads(out.read_text())["mode"] == "hisa" and len(list(out.parent.iterdir())) == 1
