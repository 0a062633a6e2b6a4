"""Break-evens from times made up to have them where they are wanted."""

import json
from pathlib import Path

import pytest

import break_even
from sglang_ext.break_even import DECODE_MIN_TOKENS, MIN_TOKENS


def results(*cases):
    """(heads, rows, keys, native, misa_rerank)"""
    return [
        {"heads": heads, "rows": rows, "keys": keys, "mode": mode, "ms": ms}
        for heads, rows, keys, *times in cases
        for mode, ms in zip(("native", "misa_rerank"), times)
    ]


@pytest.mark.parametrize(
    ("points", "want"),
    [
        ([(100, 1.0, 2.0), (200, 3.0, 2.0)], 150),
        ([(200, 3.0, 2.0), (100, 1.0, 2.0)], 150),  # in any order
        ([(100, 1.0, 2.0), (200, 2.0, 2.0)], 200),  # equal is no slower
        ([(100, 2.0, 1.0), (200, 3.0, 1.0)], 100),
        ([(100, 2.0, 1.0), (200, 1.0, 2.0), (300, 3.0, 2.0)], 250),  # the last crossing
        ([(100, 2.0, 1.0), (200, 1.0, 2.0)], None),
        ([(100, 1.0, 2.0)], None),
    ],
)
def test_crossing(points, want):
    assert break_even.crossing(points) == want


def test_the_slowest_rows_decide_for_a_number_of_heads():
    found = break_even.break_evens(
        results((64, 8192, 100, 1, 2), (64, 8192, 20000, 3, 2), (64, 2048, 100, 1, 4), (64, 2048, 20000, 5, 4)),
        "misa_rerank",
    )
    assert found[64, 8192] == 100 + 19900 / 2 and found[64, 2048] == 100 + 19900 * 3 / 4
    assert break_even.min_tokens(found) == {64: 16384}


def test_a_case_that_never_pays_leaves_no_number():
    found = break_even.break_evens(results((32, 8192, 100, 1, 2), (32, 2048, 100, 3, 2)), "misa_rerank")
    assert break_even.min_tokens(found) == {32: None}


def test_command(tmp_path, capsys):
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"results": results((64, 8192, 1000, 1, 2), (64, 8192, 9000, 3, 2))}))
    assert break_even.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "misa_rerank, 64 heads, 8192 rows: from 5000 tokens on",
        "MIN_TOKENS = {64: 8192}",
    ]


def test_what_was_not_measured_is_an_error(tmp_path, capsys):
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"results": results((64, 8192, 1000, 1, 2))}))
    assert break_even.main([str(path), "--mode", "hisa"]) == 2
    assert "--mode hisa" in capsys.readouterr().err
    assert break_even.main([str(tmp_path / "none.json")]) == 2


def test_the_policys_table_is_what_the_record_says():
    """docs/results/prefill_stage/stage.json, of which docs/performance.md reports."""
    record = Path(__file__).parents[2] / "docs/results/prefill_stage/stage.json"
    found = break_even.break_evens(json.loads(record.read_text())["results"], "misa_rerank")
    assert break_even.min_tokens(found) == MIN_TOKENS


def decode_results(*cases):
    """(heads, batch, context, native, hisa)"""
    return [
        {"phase": "decode", "heads": heads, "batch": batch, "context": context, "mode": mode, "us": us}
        for heads, batch, context, *times in cases
        for mode, us in zip(("native", "hisa"), times)
    ]


def test_decode_leaves_out_batches_that_hardly_gain(tmp_path, capsys):
    path = tmp_path / "decode.json"
    found = decode_results(
        (64, 1, 1000, 10, 12), (64, 1, 90000, 21, 20), (64, 8, 1000, 10, 14), (64, 8, 9000, 30, 26),
        (32, 8, 1000, 10, 11), (32, 8, 9000, 30, 20), (64, 64, 1000, 30, 20), (64, 64, 9000, 90, 20),
    )  # fmt: skip
    path.write_text(json.dumps({"results": found}))
    assert break_even.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "hisa, 64 heads, 8 rows: from 5000 tokens on" in lines
    assert lines[-1] == "DECODE_MIN_TOKENS = {8: 8192, 64: 8192}"


def test_the_policys_decode_table_is_what_the_record_says():
    record = Path(__file__).parents[2] / "docs/results/decode_stage/decode.json"
    assert break_even.decode_min_tokens(json.loads(record.read_text())["results"], "hisa") == DECODE_MIN_TOKENS
