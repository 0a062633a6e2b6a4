"""scripts/capture_traces.py over a stand-in of a server, scripts/eval_recall.py over tiny traces."""

import contextlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # scripts import their neighbours by name

import capture_traces
import eval_recall
import server_process
from indexer_kernels import IndexerParams
from indexer_kernels.synthetic import make_case
from indexer_kernels.traces import Trace, load_traces, save_traces

FLAGS = ["--top-k", "64", "--candidates", "384", "--block-size", "64", "--top-blocks", "4", "--route-block", "128"]
FLAGS += ["--local-tokens", "64", "--active-heads", "2", "--backend", "reference", "--quiet"]


def trace(context: int, layer: int, prompt: Any = "made up") -> Trace:
    case = make_case(context, 8, 8, seed=layer)
    return Trace("tiny-dsa", layer, context, case.q, case.weights, case.k, case.k_scale, case.ke.long() - 1, prompt)


class FakeServer(server_process.Server):
    """Writes traces of two layers for each prompt of more than 64 tokens, as the plugin does."""

    def __init__(self, folder: Path | None, url: str = "http://here") -> None:
        super().__init__(url, 0.0)
        self.folder, self.log, self.written = folder, [], 0
        self.skipped = {"several_requests": 4}
        self.full_disk_from: int | None = None  # files written until the disk is full

    def flush(self) -> None:
        self.log.append("flush")

    def status(self) -> dict[str, Any]:
        settings = {"trace_dir": None if self.folder is None else str(self.folder)}
        return {"settings": settings, "traces_written": self.written, "traces_skipped": self.skipped}

    def call(self, path: str, body: Any = None, timeout: float = 600) -> Any:
        assert path == "/generate" and body["sampling_params"]["max_new_tokens"] == 1
        self.log.append(body.get("text") or body["input_ids"])
        tokens = len(body.get("text") or body["input_ids"])
        for layer in (0, 1) if tokens > 64 else ():
            if self.written == self.full_disk_from:
                self.skipped["write_error"] = self.skipped.get("write_error", 0) + 1
                continue
            self.written += 1
            name = f"trace_{self.written:05d}_layer{layer:02d}_{tokens}.npz"
            save_traces(self.folder / name, [trace(tokens, layer, {"number": 1, "cached_tokens": 7})])


@pytest.fixture
def served(tmp_path, monkeypatch) -> FakeServer:
    """The server that --url finds, which writes to tmp_path/traces."""
    folder = tmp_path / "traces"
    folder.mkdir()
    save_traces(folder / "trace_00000_layer00_999.npz", [trace(999, 0)])  # of an earlier prompt
    server = FakeServer(folder)
    monkeypatch.setattr(capture_traces, "Server", lambda url, start_s: server)
    return server


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"text": "x" * 300, "task": "needle"}, {"text": "short"}, {"input_ids": [5] * 1000, "seed": 3}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def capture(served: FakeServer, prompts: Path, out: Path, *more: str) -> int:
    base = ["--url", "http://here/", "--trace-dir", str(served.folder), "--prompts", str(prompts), "--out", str(out)]
    return capture_traces.main([*base, *more])


# Capture


def test_prompts_are_sent_alone_and_gathered(served, prompts, tmp_path, capsys):
    assert capture(served, prompts, tmp_path / "out.npz") == 0
    assert served.log == ["flush", "x" * 300, "flush", "short", "flush", [5] * 1000]
    traces = load_traces(tmp_path / "out.npz")
    assert [(one.layer, one.context) for one in traces] == [(0, 300), (1, 300), (0, 1000), (1, 1000)]
    assert traces[0].prompt == {"task": "needle", "source": "prompts.jsonl:1", "cached_tokens": 7}
    assert traces[3].prompt == {"seed": 3, "source": "prompts.jsonl:3", "cached_tokens": 7}
    out = capsys.readouterr().out
    assert "no trace of prompts.jsonl:2" in out and "several_requests 4" in out
    assert "4 traces of tiny-dsa" in out
    assert [line.split() for line in out.splitlines() if line.startswith("prompts.jsonl:")] == [
        ["prompts.jsonl:1", "300", "2", "8", "8"],
        ["prompts.jsonl:3", "1000", "2", "8", "8"],
    ]


def test_what_is_kept(served, prompts, tmp_path):
    out = tmp_path / "out.npz"
    kept = ["--layers", "1", "--contexts", "1024", "--rows", "4", "--model-name", "renamed"]
    assert capture(served, prompts, out, *kept) == 0
    (one,) = load_traces(out)
    assert (one.model, one.layer, one.context, len(one.positions)) == ("renamed", 1, 1000, 4)


def test_too_much_is_not_written(served, prompts, tmp_path, capsys):
    assert capture(served, prompts, tmp_path / "out.npz", "--max-mib", "0.01") == 2
    err = capsys.readouterr().err
    assert "out.npz would have 0." in err and "MiB, at most 0.0099" in err and err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_a_model_is_served_with_its_own_weights(prompts, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def launch(model: Path, log: Path, settings: Any, extra: Any, environ: Any, **more: Any) -> Iterator[FakeServer]:
        seen.update(model=model, settings=dict(settings), extra=list(extra), **more)
        yield FakeServer(Path(settings["trace_dir"]))

    monkeypatch.setattr(capture_traces, "launch", launch)
    base = ["--model", "some/model", "--prompts", str(prompts), "--out", str(tmp_path / "out.npz")]
    assert capture_traces.main([*base, "--rows", "5", "--tp-size", "8"]) == 0
    assert seen["extra"] == ["--tp-size", "8"] and seen["dummy_weights"] is False
    assert seen["start_limit_s"] >= 45 * 60, "a model of 700 GB loads for longer than dummy layers"
    assert not [one for one in seen["arguments"] if one.startswith(("--mem-fraction-static", "--context-length"))]
    assert "--chunked-prefill-size=8192" in seen["arguments"]
    assert seen["settings"].items() >= {"mode": "native", "trace_rows": "5"}.items()
    assert not Path(seen["settings"]["trace_dir"]).exists(), "its own traces folder is gone with the server"
    assert len(load_traces(tmp_path / "out.npz")[0].positions) == 5


@pytest.mark.parametrize("dummy", [True, False])
def test_the_command_of_a_launch(tmp_path, monkeypatch, dummy):
    commands: list[list[str]] = []

    class Process:
        pid = 0

        def __init__(self, command: list[str], **_more: Any) -> None:
            commands.append(command)

    for name in ("_wait_until_healthy", "_end"):
        monkeypatch.setattr(server_process, name, lambda *args: None)
    monkeypatch.setattr(server_process.subprocess, "Popen", Process)
    options = {} if dummy else {"dummy_weights": False}
    with server_process.launch(Path("m"), tmp_path / "log", {}, ["--context-length", "9"], {}, **options):
        pass
    assert ("--load-format=dummy" in commands[0]) == dummy
    assert commands[0][-2:] == ["--context-length", "9"], "what a caller adds comes last, and wins"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --model PATH or --url URL"),
        (["--url", "u", "--model", "m"], "give either"),
        (["--model", "m"], "--prompts FILE is missing"),
        (["--url", "u", "--prompts", "nowhere"], "No such file or directory"),
        (["--url", "u", "--prompts", "p", "--tp-size", "8"], "unknown arguments: --tp-size 8"),
        (["--url", "u", "--prompts", "p", "--rows", "0"], "--rows 0 must be at least 1"),
        (["--url", "u", "--prompts", "p", "--out", "a.json"], "--out a.json must end in .npz"),
    ],
)
def test_usage_errors_are_one_line(arguments, said, tmp_path, capsys):
    assert capture_traces.main(["--out", str(tmp_path / "out.npz"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("capture_traces: error: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "prompts.jsonl:1 is not JSON"),
        ('{"txt": "a"}', 'either "text" or "input_ids"'),
        ('{"text": "a", "input_ids": [1]}', "either"),
        ("[1]", "must be an object"),
        ("", "holds no prompt"),
    ],
)
def test_malformed_prompts(served, tmp_path, line, said, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    assert capture(served, path, tmp_path / "out.npz") == 2
    assert said in capsys.readouterr().err


def test_servers_that_write_no_traces(served, prompts, tmp_path, monkeypatch, capsys):
    folder, served.folder = served.folder, None
    monkeypatch.setattr(capture_traces, "running_server", lambda args: served)
    base = ["--url", "http://here", "--trace-dir", str(folder), "--prompts", str(prompts)]
    arguments = [*base, "--out", str(tmp_path / "out.npz")]
    assert capture_traces.main(arguments) == 2
    assert "start it with SGLANG_EXT_TRACE_DIR" in capsys.readouterr().err

    def status() -> dict[str, Any]:
        raise KeyError("sglang_ext")

    monkeypatch.setattr(served, "status", status)
    assert capture_traces.main(arguments) == 2
    assert "runs without the plugin" in capsys.readouterr().err


def test_a_trace_dir_that_is_not_the_servers(served, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capture_traces, "WAIT_S", 0.0)
    (tmp_path / "other").mkdir()
    base = ["--url", "http://here", "--prompts", str(prompts), "--out", str(tmp_path / "out.npz")]
    assert capture_traces.main([*base, "--trace-dir", str(tmp_path / "other")]) == 2
    assert "the server wrote 2 traces, 0 are in --trace-dir" in capsys.readouterr().err
    assert capture_traces.main([*base, "--trace-dir", str(tmp_path / "none")]) == 2
    assert "must be the folder that the server at --url writes traces to" in capsys.readouterr().err


def test_a_layer_that_could_not_be_written_is_an_error(served, prompts, tmp_path, capsys):
    """Its prompt's other layers are there: without it tune would take the layer for one that has no indexer."""
    served.full_disk_from = 3
    assert capture(served, prompts, tmp_path / "out.npz") == 2
    assert "the server could not write 1 layers of prompts.jsonl:3: its log says why" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


# Recall


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    for context in (300, 1000):
        save_traces(folder / f"{context}.npz", [trace(context, layer) for layer in (0, 2)])
    return folder


def recall(*arguments: str) -> int:
    return eval_recall.main([*FLAGS, *arguments])


def test_lines_per_layer_and_context(traces, tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert recall("--traces", str(traces), "--modes", "native,misa,hisa", *files) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 traces of tiny-dsa, backend 'reference' on cpu")
    record = json.loads((tmp_path / "a.json").read_text())
    lines = {(line["context"], line["layer"], line["mode"]): line for line in record["lines"]}
    assert set(lines) == {(c, n, m) for c in (256, 1024) for n in (0, 2, None) for m in ("native", "misa", "hisa")}
    for (context, layer, mode), line in lines.items():
        assert line["rows"] == (16 if layer is None else 8)
        assert 0 <= line["recall_min"] <= line["recall_mean"] <= 1 and 0 <= line["mass_min"] <= line["mass_mean"] <= 1
        if mode == "native":
            assert line["recall_min"] == line["mass_min"] == line["work"] == 1
        elif context == 1024:
            assert line["recall_mean"] < 1 and line["work"] < 1
        if layer is None:
            parts = [lines[context, one, mode]["recall_mean"] for one in (0, 2)]
            assert line["recall_mean"] == pytest.approx(sum(parts) / 2)
    assert record["run"]["packages"]["torch"] and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    crc = f"{zlib.crc32((traces / '300.npz').read_bytes()):08x}"
    assert sorted(record["files"]) == ["1000.npz", "300.npz"] and record["files"]["300.npz"] == crc


def test_filters(traces, tmp_path):
    path = tmp_path / "a.json"
    only = ["--layers", "2", "--contexts", "1024", "--modes", "hisa", "--json", str(path)]
    assert recall("--traces", str(traces / "300.npz"), str(traces / "1000.npz"), *only) == 0
    assert [(line["context"], line["layer"]) for line in json.loads(path.read_text())["lines"]] == [
        (1024, 2),
        (1024, None),
    ]


def test_sweep_is_the_product_of_what_each_mode_depends_on(traces, tmp_path, capsys):
    path = tmp_path / "a.json"
    sweep = ["--sweep", "active_heads=1,2,8", "--sweep", "top-blocks=4,16", "--modes", "misa,hisa", "--plot"]
    assert recall("--traces", str(traces / "1000.npz"), "--json", str(path), *sweep, str(tmp_path / "a.png")) == 0
    lines = [line for line in json.loads(path.read_text())["lines"] if line["layer"] is None]
    by_heads = {line["params"]["active_heads"]: line for line in lines if line["mode"] == "misa"}
    by_blocks = {line["params"]["top_blocks"]: line for line in lines if line["mode"] == "hisa"}
    assert list(by_heads) == [1, 2, 8] and list(by_blocks) == [4, 16]
    assert by_heads[8]["recall_min"] == by_blocks[16]["recall_min"] == 1, "all heads, all blocks: nothing is lost"
    assert by_heads[1]["recall_mean"] < 1 and by_blocks[4]["recall_mean"] < 1
    header = next(line for line in capsys.readouterr().out.splitlines() if "recall" in line)
    assert header.split()[:6] == ["context", "layer", "mode", "active_heads", "top_blocks", "rows"]


def test_recall_of_a_live_server(served, prompts, tmp_path):
    path = tmp_path / "a.json"
    live = ["--url", "http://here", "--trace-dir", str(served.folder), "--prompts", str(prompts)]
    assert recall(*live, "--modes", "misa", "--json", str(path)) == 0
    lines = json.loads(path.read_text())["lines"]
    assert {line["context"] for line in lines} == {256, 1024}, "not the trace that was there before"


def test_sweep_of():
    names, settings = eval_recall.sweep_of(["candidates=4096,8192", "candidate_unit=token,page"], IndexerParams())
    assert names == ["candidates", "candidate_unit"] and len(settings) == 4
    assert settings[1] == IndexerParams(candidates=4096, candidate_unit="page")
    assert eval_recall.sweep_of([], IndexerParams()) == ([], [IndexerParams()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "active_heads"], "write it as FIELD=V1,V2"),
        (["--sweep", "heads=4"], "heads must be one of top_k"),
        (["--sweep", "group=2", "--sweep", "group=4"], "each once"),
        (["--sweep", "group=two"], "'two' is no integer"),
        (["--sweep", "candidate_unit=row"], "'row' must be one of"),
        (["--sweep", "candidates=1"], "candidates=1 must be at least"),
        (["--url", "u"], "--url needs --prompts FILE, and no --traces"),
        (["--traces", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--plot", "a.jpg"], "must end in .png"),
    ],
)
def test_recall_errors_are_one_line(arguments, said, capsys):
    assert recall(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval_recall: error: ") and said in err and err.count("\n") == 1


def test_without_traces(monkeypatch, traces, capsys):
    monkeypatch.setattr(eval_recall, "embedded_traces", lambda: None)
    assert recall() == 2
    assert "this version ships no traces" in capsys.readouterr().err
    monkeypatch.setattr(eval_recall, "embedded_traces", lambda: traces)
    assert recall("--modes", "misa") == 0
    assert recall("--layers", "7") == 2
    assert "no trace is left" in capsys.readouterr().err


def test_a_mode_without_rows_is_named(tmp_path, capsys):
    thin = trace(1000, 0)
    spread = thin.thinned(2)
    scattered = Trace(
        **{name: getattr(spread, name) for name in spread.__slots__} | {"positions": torch.tensor([500, 993])}
    )
    save_traces(tmp_path / "a.npz", [scattered])
    assert recall("--traces", str(tmp_path / "a.npz"), "--modes", "hisa,group_rerank") == 0
    assert "not measured, no row has its whole group in a trace: group_rerank" in capsys.readouterr().out
