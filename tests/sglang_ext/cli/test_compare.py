"""`sglang-ext compare` on tiny contexts: table, JSON, PNG, work counts, and one-line errors."""

import json

import pytest

from indexer_kernels import MODES, IndexerParams
from sglang_ext.cli.main import main
from sglang_ext.cli.work_counts import count_work, is_covered

TINY = [
    *("--top-k", "64", "--candidates", "384", "--block-size", "64", "--top-blocks", "4", "--route-block", "128"),
    *(
        "--local-tokens",
        "64",
        "--heads",
        "8",
        "--active-heads",
        "2",
        "--rows",
        "8",
        "--backend",
        "reference",
        "--quiet",
    ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--contexts", "256,1024", "--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]
    assert main(["compare", *arguments, *TINY]) == 0
    return folder


def test_json_holds_every_mode_and_what_repeats_the_run(written):
    content = json.loads((written / "a.json").read_text())
    assert [(row["context"], row["mode"]) for row in content["results"]] == [(n, m) for n in (256, 1024) for m in MODES]
    assert content["params"]["top_k"] == 64 and content["arguments"]["seed"] == 0
    assert "no claim about model quality" in content["note"]
    for row in content["results"]:
        assert 0 <= row["recall_min"] <= row["recall_mean"] <= 1 and row["recall_mean"] > 0.3, row
        assert row["seconds"] > 0 and row["key_bytes"] > 0
        if row["mode"] == "native":
            assert row["recall_min"] == row["needles_kept"] == 1
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
    assert main(["compare", "--contexts", "256", "--modes", "native,misa", *TINY]) == 0
    out, err = capsys.readouterr()
    assert "no claim about model quality" in out and "times say nothing about a server" in out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.lstrip().startswith("256")] == ["native", "misa"]
    assert err == "", "no progress bar where stderr is not a terminal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "512", "--contexts", "256"], "--rows 512 is more than the shortest context, 256"),
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

    monkeypatch.setattr("sglang_ext.cli.compare.make_case", interrupt)
    assert main(["compare", "--quiet"]) == 130
    assert capsys.readouterr().err == "sglang-ext compare: interrupted\n"


LENGTH = 131072
PARAMS = IndexerParams()


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
