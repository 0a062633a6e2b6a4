"""`sglang-ext compare` on tiny data: traces and synthetic, table, JSON, PNG, work counts, and one-line errors."""

import json

import pytest
import torch

from indexer_kernels import MODES, IndexerParams
from indexer_kernels.synthetic import make_case
from indexer_kernels.traces import Trace, save_traces
from sglang_ext.cli.main import main
from sglang_ext.cli.work_counts import count_work, is_covered

TINY = [
    *("--top-k", "64", "--candidates", "384", "--block-size", "64", "--top-blocks", "4", "--route-block", "128"),
    *(
        "--local-tokens",
        "64",
        "--active-heads",
        "2",
        "--backend",
        "reference",
        "--quiet",
    ),
]
SYNTHETIC = [*TINY, "--data", "synthetic", "--heads", "8", "--rows", "8"]


def trace(context: int, layer: int) -> Trace:
    """The last 8 rows of a synthetic prompt, as if a model had seen them."""
    case = make_case(context, 8, 8, seed=layer)
    return Trace("tiny-dsa", layer, context, case.q, case.weights, case.k, case.k_scale, case.ke.long() - 1, "made up")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "tiny.npz"
    save_traces(path, [trace(context, layer) for context in (256, 1000) for layer in (0, 2)])
    return path


@pytest.fixture
def embedded(monkeypatch, traces):
    monkeypatch.setattr("sglang_ext.cli.compare.embedded_traces", lambda: traces.parent)


@pytest.fixture
def none_embedded(monkeypatch):
    monkeypatch.setattr("sglang_ext.cli.compare.embedded_traces", lambda: None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--contexts", "256,1024", "--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    assert main(["compare", *arguments, *SYNTHETIC]) == 0
    return folder


def test_json_holds_every_mode_and_what_repeats_the_run(written):
    content = json.loads((written / "a.json").read_text())
    assert [(row["context"], row["mode"]) for row in content["results"]] == [(n, m) for n in (256, 1024) for m in MODES]
    assert content["params"]["top_k"] == 64 and content["arguments"]["seed"] == 0
    assert "no claim about model quality" in content["note"]
    for row in content["results"]:
        assert 0 <= row["recall_min"] <= row["recall_mean"] <= 1 and row["recall_mean"] > 0.3, row
        assert 0 <= row["mass_min"] <= row["mass_mean"] <= 1 and row["rows"] == 8 and row["layers"] == []
        assert row["seconds"] > 0 and row["key_bytes"] > 0
        if row["mode"] == "native":
            assert row["recall_min"] == row["mass_min"] == row["needles_kept"] == 1
            assert row["tokens_all_heads"] == row["context"] - 3.5, "8 rows see N-7 ... N tokens"


def test_covered_budget_is_native(written):
    rows = {(row["context"], row["mode"]): row for row in json.loads((written / "a.json").read_text())["results"]}
    for mode in ("misa_rerank", "hisa"):
        assert rows[256, mode]["recall_min"] == 1
    assert rows[1024, "hisa"]["recall_mean"] < 1, "64 of 1024 tokens from 4 of 16 blocks cannot all be native's"


def test_plot_is_a_png(written):
    content = (written / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_table_and_header(capsys):
    assert main(["compare", "--contexts", "256", "--modes", "native,misa", *SYNTHETIC]) == 0
    out, err = capsys.readouterr()
    assert "no claim about model quality" in out and "times say nothing about a server" in out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.lstrip().startswith("256")] == ["native", "misa"]
    assert err == "", "no progress bar where stderr is not a terminal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "synthetic", "--rows", "512", "--contexts", "256"],
            "--rows 512 is more than the shortest context, 256",
        ),
        (["--data", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--plot", "a.jpg"], "must end in .png"),
        (["--json", "no/such/folder/a.json"], "the folder of no/such/folder/a.json does not exist"),
        (["--candidates", "1"], "candidates=1"),
    ],
)
def test_user_errors_are_one_line(arguments, message, capsys):
    assert main(["compare", *TINY, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("sglang-ext compare: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "native,mias"], "unknown mode mias; known: native"),
        (["--contexts", "4k"], "'4k' is not a list of integers"),
        (["--contexts", "0"], "below 1"),
        (["--wat"], "unknown arguments for compare: --wat"),
    ],
)
def test_parser_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", *arguments])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sglang_ext.cli.compare.synthetic_sample", interrupt)
    assert main(["compare", "--quiet", "--data", "synthetic"]) == 130
    assert capsys.readouterr().err == "sglang-ext compare: interrupted\n"


# Traces


@pytest.mark.parametrize("given", [True, False], ids=["named", "embedded"])
def test_traces(traces, embedded, given, capsys, tmp_path):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["compare", *TINY, *files, *(["--data", str(traces)] if given else [])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Traces of tiny-dsa. " if given else "Traces of tiny-dsa, a small model: ")
    assert "Synthetic" not in out and "worst layer" in out and "needles" not in out
    content = json.loads((tmp_path / "a.json").read_text())
    assert "tiny-dsa" in content["note"] and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["context"], row["mode"]) for row in content["results"]] == [(n, m) for n in (256, 1024) for m in MODES]
    for row in content["results"]:
        layers = row["layers"]
        assert [layer["layer"] for layer in layers] == [0, 2] and row["rows"] == 16 and row["needles_kept"] is None
        for name in ("recall_mean", "mass_mean"):
            assert row[name] == pytest.approx(sum(layer[name] for layer in layers) / 2)
            assert row[name] == 1 if row["mode"] == "native" else row[name] > 0.2


def test_contexts_choose_among_traces(traces, capsys):
    assert main(["compare", *TINY, "--data", str(traces), "--contexts", "1024", "--modes", "hisa"]) == 0
    assert "  1024  hisa" in capsys.readouterr().out
    assert main(["compare", *TINY, "--data", str(traces), "--contexts", "4096"]) == 2
    assert "contexts=[4096]; there are [256, 1024]" in capsys.readouterr().err


def test_without_embedded_traces_the_data_is_synthetic_and_says_so(none_embedded, capsys):
    arguments = ["--contexts", "256", "--modes", "misa", "--heads", "8", "--rows", "8"]
    assert main(["compare", *TINY, *arguments]) == 0
    assert "(The package holds no traces.)" in capsys.readouterr().out.splitlines()[0]
    assert main(["compare", *TINY, "--data", "traces"]) == 2
    assert "this version holds none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows", "heads", "seed"])
def test_flags_of_synthetic_data_are_refused_with_traces(traces, name, capsys):
    assert main(["compare", *TINY, "--data", str(traces), f"--{name}", "4"]) == 2
    assert f"--{name} 4 is for --data synthetic" in capsys.readouterr().err


def test_a_mode_that_no_row_can_measure(tmp_path, capsys):
    thin = trace(256, 0).thinned(2)
    alone = Trace(**{n: getattr(thin, n) for n in thin.__slots__} | {"positions": torch.tensor([201, 251])})
    save_traces(tmp_path / "a.npz", [alone])
    assert main(["compare", *TINY, "--data", str(tmp_path / "a.npz"), "--modes", "group_rerank"]) == 2
    assert "no row of the data can measure --modes group_rerank" in capsys.readouterr().err
    assert main(["compare", *TINY, "--data", str(tmp_path / "a.npz"), "--modes", "misa,group_rerank"]) == 0
    assert "not measured, no row of the data can tell: group_rerank\n" in capsys.readouterr().out


LENGTH = 131072
PARAMS = IndexerParams(route_block=1024, candidates=8192)


@pytest.mark.parametrize(
    ("mode", "all_heads", "routed", "products"),
    [
        ("native", LENGTH, 0, LENGTH * 64),
        ("misa", 0, LENGTH, 128 * 64 + LENGTH * 8),
        ("misa_rerank", 8192, LENGTH, 128 * 64 + LENGTH * 8 + 8192 * 64),
        ("hisa", 8192, 0, 1024 * 64 + 8192 * 64),
        ("group_rerank", LENGTH / 4 + 8192, 0, (LENGTH / 4 + 8192) * 64),
    ],
)
def test_work_of_a_long_row(mode, all_heads, routed, products):
    work = count_work(mode, LENGTH, 64, PARAMS)
    assert (work.tokens_all_heads, work.tokens_routed, work.head_products) == (all_heads, routed, products)


@pytest.mark.parametrize("mode", MODES)
def test_covered_rows_cost_what_native_costs(mode):
    assert is_covered(mode, 2048, PARAMS)
    assert count_work(mode, 2048, 64, PARAMS) == count_work("native", 2048, 64, PARAMS)
    assert is_covered(mode, 8192, PARAMS) == (mode != "misa")
    assert is_covered(mode, 8193, PARAMS) == (mode == "native")
