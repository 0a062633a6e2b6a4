"""Traces on disk: what comes back, what is refused, which rows are sampled."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from indexer_kernels import select_ragged
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.traces import (
    DESCRIPTION,
    TENSORS,
    VERSION,
    Trace,
    embedded_traces,
    load_traces,
    sample_rows,
    save_traces,
)
from tests.support.inputs import make_batch
from tests.support.small import SMALL

ROOT = Path(__file__).resolve().parents[2]


def trace(layer: int = 0, context: int = 300, rows: int = 6, **changes: object) -> Trace:
    """The last rows of one request of random values."""
    batch = make_batch([context], [rows], num_heads=8, seed=layer)
    q, weights, k, k_scale, _ks, ke = batch.ragged
    made = Trace("tiny", layer, context, q, weights, k, k_scale, ke.long() - 1, {"seed": layer, "text": "ä"})
    return replace(made, **changes)


def assert_equal(got: Trace, want: Trace) -> None:
    for name in DESCRIPTION:
        assert getattr(got, name) == getattr(want, name), name
    for name in TENSORS:
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_round_trip(tmp_path):
    traces = [trace(0), trace(2, context=65, rows=1), trace(1, prompt="a sentence")]
    path = tmp_path / "some.npz"
    assert save_traces(path, traces) == path.stat().st_size
    loaded = load_traces(path)
    assert len(loaded) == 3
    for got, want in zip(loaded, traces):
        assert_equal(got, want)
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.npz"], "no temporary file is left"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, layer in (("b", 1), ("a", 0), ("c", 2)):
        save_traces(tmp_path / f"{name}.npz", [trace(layer)])
    assert [one.layer for one in load_traces(tmp_path)] == [0, 1, 2]


def test_bytes_survive_that_are_no_numbers(tmp_path):
    """Keys are bytes of a cache: NaN must come back as it was."""
    odd = torch.arange(300 * 128).to(torch.uint8).view(300, 128).view(torch.float8_e4m3fn)
    save_traces(tmp_path / "a.npz", [trace(k=odd)])
    assert torch.equal(load_traces(tmp_path / "a.npz")[0].k.view(torch.uint8), odd.view(torch.uint8))


def test_case_is_what_select_ragged_takes():
    batch = make_batch([300], [6], num_heads=8, seed=0)
    case = trace(0).case()
    assert case[4].tolist() == [0] * 6 and case[5].tolist() == batch.ke.tolist() and case[5].dtype == torch.int32
    for mode in ("native", "hisa"):
        want = select_ragged(mode, *batch.ragged, SMALL, backend="reference")
        assert torch.equal(select_ragged(mode, *case, SMALL, backend="reference"), want)
    assert token_scores(*case[:4]).shape == (6, 300)


def test_thinned_keeps_rows_together():
    whole = trace(rows=9)
    thin = whole.thinned(4)
    assert thin.positions.tolist() == [whole.positions[row] for row in sample_rows(9, 4)]
    row = (whole.positions == thin.positions[0]).nonzero().item()
    assert torch.equal(thin.q[0].float(), whole.q[row].float()) and torch.equal(thin.weights[0], whole.weights[row])
    assert len(whole.thinned(100).positions) == 9


@pytest.mark.parametrize(
    ("count", "rows", "first", "want"),
    [
        (100, 4, 0, [24, 73, 98, 99]),  # middles of the two halves of rows 0 .. 97
        (100, 4, 60, [69, 88, 98, 99]),
        (100, 5, 0, [24, 72, 97, 98, 99]),  # an odd one goes to the end
        (100, 1, 0, [99]),
        (3, 16, 0, [0, 1, 2]),
        (8, 8, 5, [0, 1, 2, 3, 4, 5, 6, 7]),
        (100, 4, 97, [24, 73, 98, 99]),  # no two rows are left from there on
        (100, 4, 96, [96, 97, 98, 99]),
        (0, 4, 0, []),
    ],
)
def test_sampled_rows(count, rows, first, want):
    assert sample_rows(count, rows, first) == want


@pytest.mark.parametrize("count", [1, 2, 17, 64, 8192])
@pytest.mark.parametrize("rows", [1, 2, 15, 16])
@pytest.mark.parametrize("first", [0, 3, 2048, 10**6])
def test_sampled_rows_are_distinct_and_ascending(count, rows, first):
    picked = sample_rows(count, rows, first)
    assert len(picked) == min(count, rows) and picked == sorted(set(picked)) and picked[-1] == count - 1
    assert picked[0] >= 0


@pytest.mark.parametrize(
    ("context", "want"),
    [(8192, 8192), (8000, 8192), (8300, 8192), (11000, 12288), (32760, 32768), (40000, 32768), (41500, 49152), (3, 3)],
)
def test_nominal_context(context, want):
    assert trace(context=context, rows=1).nominal_context == want


# Refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"context": 301}, "k has shape"),
        ({"k_scale": torch.zeros(299)}, "k_scale"),
        ({"weights": torch.zeros(6, 7)}, "weights"),
        ({"positions": torch.tensor([0, 1, 2, 3, 4, 300])}, "positions=.*0 .. 299"),
        ({"positions": torch.tensor([0, 1, 2, 3, 4, -1])}, "positions"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, "positions"),
    ],
)
def test_a_trace_that_does_not_fit(changes, named):
    whole = trace()
    with pytest.raises(ValueError, match=named):
        replace(whole, **changes)


def test_a_trace_of_another_dtype():
    with pytest.raises(TypeError, match="positions has dtype torch.int32"):
        trace(positions=torch.zeros(6, dtype=torch.int32))


def test_too_large_a_file_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a.npz would have 0.0 MiB, at most 0.000953674 are allowed"):
        save_traces(tmp_path / "a.npz", [trace()], max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    save_traces(path, [trace()])

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(numpy, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        save_traces(path, [trace(1)])
    assert [one.layer for one in load_traces(path)] == [0] and len(list(tmp_path.iterdir())) == 1


def test_the_name_must_end_in_npz(tmp_path):
    with pytest.raises(ValueError, match=r"a.npy must end in .npz"):
        save_traces(tmp_path / "a.npy", [trace()])


def rewritten(path: Path, drop: str = "", **changes: object) -> Path:
    """A saved trace with fields changed or dropped."""
    save_traces(path, [trace()])
    with numpy.load(path) as content:
        fields = {name: content[name] for name in content.files if name != drop}
    numpy.savez(path, **fields | changes)
    return path


def described(**changes: object) -> numpy.ndarray:
    own = {"model": "tiny", "layer": 0, "context": 300, "prompt": "p"} | changes
    return numpy.array(json.dumps([{name: value for name, value in own.items() if value is not None}]))


@pytest.mark.parametrize(
    ("drop", "changes", "named"),
    [
        ("version", {}, "field version is missing"),
        ("traces", {}, "field traces is missing"),
        ("0.k_scale", {}, "field 0.k_scale is missing"),
        ("", {"version": numpy.array(VERSION + 1)}, f"version {VERSION + 1}, this package reads {VERSION}"),
        ("", {"traces": described(layer=None)}, "field layer of trace 0 is missing"),
        ("", {"traces": described(context=299)}, "trace 0: k has shape"),
        ("", {"traces": numpy.array("{")}, "a.npz"),
        ("", {"0.q": numpy.zeros((6, 8, 128), dtype=numpy.float32)}, "0.q has dtype"),
        ("", {"0.weights": numpy.zeros((6, 8))}, "trace 0: weights has dtype"),
        ("", {"0.k": numpy.array([{}], dtype=object)}, "allow_pickle"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, drop, changes, named):
    path = rewritten(tmp_path / "a.npz", drop, **changes)
    with pytest.raises(ValueError, match=named) as error:
        load_traces(path)
    assert "a.npz" in str(error.value)


def test_no_npz_file(tmp_path):
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(ValueError, match="a.npz is no .npz file"):
        load_traces(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="b.npz does not exist"):
        load_traces(tmp_path / "b.npz")


# What the package ships


def test_traces_travel_with_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[tool.setuptools.package-data]\nindexer_kernels = ["data/*.npz"]' in text


def test_embedded_traces():
    folder = embedded_traces()
    if folder is None:
        assert not list((ROOT / "indexer_kernels").glob("data/*.npz"))
        return
    assert sum(path.stat().st_size for path in folder.glob("*.npz")) <= 12 * 2**20
    traces = load_traces(folder)
    assert traces and all(one.model and one.prompt and one.q.shape[0] for one in traces)


def test_embedded_traces_are_those_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("indexer_kernels.traces.resources.files", lambda package: tmp_path)
    assert embedded_traces() is None
    (tmp_path / "data").mkdir()
    assert embedded_traces() is None
    save_traces(tmp_path / "data" / "a.npz", [trace()])
    assert embedded_traces() == tmp_path / "data"
