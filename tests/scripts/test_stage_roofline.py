"""Least work against sums over rows written out here; the command on a record of bench_stage's form."""

import json

import pytest

import stage_roofline

PARAMS = {
    "candidates": 30,
    "active_heads": 2,
    "route_block": 10,
    "block_size": 5,
    "top_blocks": 4,
    "group": 4,
}
ROWS, KEYS, HEADS = 3, 100, 8
LENGTHS = (98, 99, 100)  # of the last three rows
RERANKED = HEADS * 30 * ROWS
ROUTED = sum(HEADS * length / 10 + 2 * length + 2 * length / 16 for length in LENGTHS)


@pytest.mark.parametrize(
    ("mode", "products"),
    [
        ("native", HEADS * sum(LENGTHS)),
        ("misa", ROUTED),
        ("misa_rerank", ROUTED + RERANKED),
        ("misa_rerank_pages", ROUTED + RERANKED),
        ("hisa", sum(HEADS * length / 5 + HEADS * 20 for length in LENGTHS)),
        ("group_rerank", HEADS * sum(LENGTHS) / 4 + RERANKED),
    ],
)
def test_operations_are_two_a_channel_of_every_scored_pair(mode, products):
    assert stage_roofline.least_work(mode, ROWS, KEYS, HEADS, PARAMS).flops == pytest.approx(2 * 128 * products)


def test_only_native_moves_scores():
    others = {mode: stage_roofline.least_work(mode, ROWS, KEYS, HEADS, PARAMS).bytes for mode in ("misa", "hisa")}
    inputs_and_output = 100 * 132 + 3 * 8 * (128 + 4) + 3 * 2048 * 4
    assert set(others.values()) == {inputs_and_output}
    native = stage_roofline.least_work("native", ROWS, KEYS, HEADS, PARAMS).bytes
    assert native == inputs_and_output + 2 * 4 * sum(LENGTHS)


def test_a_short_context_is_ranked_whole():
    few = stage_roofline.least_work("group_rerank", 1, 20, HEADS, PARAMS).flops
    assert few == 2 * 128 * HEADS * (20 / 4 + 20)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode='fast' must be native"):
        stage_roofline.least_work("fast", ROWS, KEYS, HEADS, PARAMS)


@pytest.mark.parametrize(("flops", "bandwidth", "share"), [(1e9, 1e18, 0.5), (1e18, 1e9, 0.25)])
def test_the_nearer_limit_makes_the_roofline(monkeypatch, flops, bandwidth, share):
    monkeypatch.setattr(stage_roofline, "least_work", lambda *_: stage_roofline.Work(1e6, 0.5e6))
    got = stage_roofline.reached({"mode": "", "rows": 0, "keys": 0, "heads": 0, "ms": 2.0}, {}, flops, bandwidth)
    assert got == pytest.approx({"tflops": 0.5e-3, "gb_s": 0.25, "roofline": share})


def record():
    times = {"native": 4.0, "misa": 2.0, "hisa": 1.0}
    return {
        "run": {"gpu": "NVIDIA H200", "commit": "0123456789"},
        "params": PARAMS,
        "results": [
            {
                "mode": mode,
                "heads": 64,
                "rows": 8192,
                "keys": keys,
                "ms": ms * keys / 1e4,
                "times_native": 4 / ms,
                "scratch_gib": 0.25,
            }
            for keys in (32768, 131072)
            for mode, ms in times.items()
        ],
    }


def test_command_prints_every_case_and_draws(tmp_path, capsys, monkeypatch):
    path, plot = tmp_path / "stage.json", tmp_path / "stage.png"
    path.write_text(json.dumps(record()))
    monkeypatch.setattr("sys.argv", ["stage_roofline.py", str(path), "--plot", str(plot)])
    assert stage_roofline.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6
    assert "hisa" in lines[-1] and "4.00x" in lines[-1] and lines[-1].rstrip().endswith("%")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{}", "no json", None])
def test_another_file_is_refused_by_name(tmp_path, capsys, monkeypatch, text):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["stage_roofline.py", str(path)])
    assert stage_roofline.main() == 2
    assert "other.json is not what bench_stage.py writes" in capsys.readouterr().err
