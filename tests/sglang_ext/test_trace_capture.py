"""Traces written by the hooks on SGLang's real Indexer methods: what is in them, and when there are none."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="the sglang extra is not installed")

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from indexer_kernels import select_ragged
from indexer_kernels.traces import load_traces, sample_rows
from sglang_ext import sglang_hooks, trace_capture
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from sglang_ext.trace_capture import TraceWriter
from tests.sglang_ext import patched_indexer as sut
from tests.sglang_ext.patched_indexer import TOP_K, Recorder, metadata, ragged
from tests.support.inputs import Batch, make_batch


@pytest.fixture(scope="module")
def installed() -> Iterator[tuple[Stage, Recorder]]:
    stage = Stage(Settings(backend="reference"), {})
    with sut.hooked(stage) as native:
        yield stage, native


@pytest.fixture
def stage(installed, tmp_path) -> Stage:
    sut.use(installed[0], mode="native", trace_dir=str(tmp_path), trace_rows=6)
    stage = installed[0]
    stage._models.clear()
    return stage


@pytest.fixture
def native(installed) -> list[Any]:
    installed[1].calls.clear()
    return installed[1].calls


def serve(stage: Stage, batch: Batch, counts: list[int], prompts: list[int], **forward: Any) -> Any:
    """One forward: SGLang makes its ForwardBatch of requests with these prompts, then a layer asks its indexer."""
    requests = [SimpleNamespace(full_untruncated_fill_ids=range(tokens)) for tokens in prompts]
    seen = [len(keys) for keys in batch.k]
    made = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, seq_lens_cpu=torch.tensor(seen), extend_seq_lens_cpu=list(counts)
    )
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith(".init_new")]
    hook.make(stage)(made, None, SimpleNamespace(reqs=requests, decoding_reqs=None), None)
    return ragged(batch, metadata(batch, counts), **forward)


def skipped(stage: Stage) -> dict[str, int]:
    return stage.status()["traces_skipped"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_trace_holds_what_the_indexer_saw(stage, native, tmp_path):
    """The pool's pages are shuffled, with garbage around them; q and weights have padding rows."""
    batch = make_batch([300], [40], num_heads=8, seed=1)
    result = serve(stage, batch, [40], [300], pad=3)
    assert isinstance(result, Recorder) and len(native) == 1, "SGLang's own method still answers"
    assert names(tmp_path) == ["trace_00001_layer03_300.npz"]
    (trace,) = load_traces(tmp_path)
    assert (trace.model, trace.layer, trace.context) == ("tiny", sut.LAYER, 300)
    assert trace.prompt == {"number": 1, "cached_tokens": 260}
    rows = sample_rows(40, 6)
    assert trace.positions.tolist() == [260 + row for row in rows]
    assert torch.equal(trace.k.view(torch.uint8), batch.k[0].view(torch.uint8))
    assert torch.equal(trace.k_scale, batch.k_scale[0])
    assert torch.equal(trace.q.view(torch.uint8), batch.q.view(torch.uint8)[rows])
    assert torch.equal(trace.weights, batch.weights[rows])
    params = stage.settings.params(TOP_K)
    want = select_ragged("native", *batch.ragged, params, backend="reference")[rows]
    assert torch.equal(select_ragged("native", *trace.case(), params, backend="reference"), want)
    assert stage.status()["traces_written"] == 1 and skipped(stage) == {}


def test_a_prompt_that_sglang_makes_up_is_not_kept(stage, native, tmp_path):
    """An idle data-parallel rank runs one as long as the others', which may be as long as its own last."""
    batch = make_batch([300], [300], num_heads=8, seed=1)
    serve(stage, batch, [300], [300])
    (hook,) = [hook for hook in sglang_hooks.hooks() if hook.target.endswith(".init_new")]
    hook.make(stage)(SimpleNamespace(forward_mode=ForwardMode.IDLE), None, SimpleNamespace())
    ragged(batch, metadata(batch, [300]))
    assert stage.status()["traces_written"] == 1 and skipped(stage) == {"prompt_unknown": 1}


@pytest.mark.parametrize("mode", ["native", "misa", "hisa"])
def test_whatever_mode_runs(stage, tmp_path, mode):
    sut.use(stage, mode=mode, trace_dir=str(tmp_path), trace_rows=4, top_blocks=17)
    batch = make_batch([300], [40], num_heads=8, seed=2)
    got = serve(stage, batch, [40], [300])
    assert isinstance(got, Recorder) == (mode == "native")
    assert load_traces(tmp_path)[0].positions.tolist() == [260 + row for row in sample_rows(40, 4)]


def test_spread_rows_have_something_to_choose(stage, tmp_path):
    """Of a prompt in one chunk, rows that see more than top_k tokens are kept."""
    stage.start({}, sut.LAYER, 8, 128, TOP_K, torch.device("cpu"))
    sut.use(stage, mode="native", trace_dir=str(tmp_path), trace_rows=6)
    batch = make_batch([100], [100], num_heads=8, seed=3)
    serve(stage, batch, [100], [100])
    (trace,) = load_traces(tmp_path)
    assert trace.positions.tolist() == sample_rows(100, 6, first=TOP_K) and int(trace.positions[0]) >= TOP_K


def test_one_file_per_layer_and_prompt(stage, tmp_path):
    batch, found = make_batch([300], [40], num_heads=8), None
    serve(stage, batch, [40], [300])
    found = metadata(batch, [40])
    for _ in range(2):  # the same forward, a later layer; then the same one again
        ragged(batch, found)
    assert names(tmp_path) == ["trace_00001_layer03_300.npz", "trace_00002_layer03_300.npz"]
    assert stage.status()["traces_written"] == 3
    # a restarted server goes on
    assert TraceWriter(str(tmp_path), 4, {})._next == 3


def test_only_the_last_chunk(stage, native, tmp_path):
    batch = make_batch([300], [40], num_heads=8)
    serve(stage, batch, [40], [301])
    assert names(tmp_path) == [] and skipped(stage) == {"not_last_chunk": 1} and len(native) == 1
    serve(stage, batch, [40], [300])
    assert len(names(tmp_path)) == 1 and skipped(stage) == {"not_last_chunk": 1}


def test_several_requests_are_skipped_and_counted(stage, native, tmp_path):
    batch = make_batch([300, 200], [40, 10], num_heads=8)
    for _ in range(2):
        serve(stage, batch, [40, 10], [300, 200])
    assert names(tmp_path) == [] and skipped(stage) == {"several_requests": 2} and len(native) == 2


def test_a_forward_without_requests_is_skipped(stage, tmp_path):
    """SGLang's warm-up, and a forward after another batch was made."""
    batch = make_batch([300], [40], num_heads=8)
    ragged(batch, metadata(batch, [40]))
    serve(stage, make_batch([200], [40], num_heads=8), [40], [200])
    ragged(batch, metadata(batch, [40]))
    assert skipped(stage) == {"prompt_unknown": 2} and len(names(tmp_path)) == 1


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("context_parallel", {"of": sut.indexer(dsa_enable_prefill_cp=True)}),
        ("head_dim", {"of": sut.indexer(head_dim=64)}),
        ("rows_mismatch", {}),
    ],
)
def test_what_cannot_be_read_is_skipped_even_in_native_mode(stage, native, tmp_path, reason, changes):
    batch = make_batch([300], [40], num_heads=8)
    if reason == "rows_mismatch":
        ragged(batch, metadata(batch, [40], dsa_extend_seq_lens_list=[20, 20]))
    else:
        serve(stage, batch, [40], [300], **changes)
    assert skipped(stage) == {reason: 1} and names(tmp_path) == [] and len(native) == 1


def test_never_while_a_graph_is_captured(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_ext.stage.capturing", lambda device: True)
    serve(stage, make_batch([300], [40], num_heads=8), [40], [300])
    assert skipped(stage) == {"graph_capture": 1} and names(tmp_path) == []


def test_other_ranks_write_nothing(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(trace_capture, "_rank", lambda: 1)
    serve(stage, make_batch([300], [40], num_heads=8), [40], [300])
    assert skipped(stage) == {"other_rank": 1} and names(tmp_path) == []


def test_a_write_error_is_logged_once_and_serving_goes_on(stage, native, tmp_path, monkeypatch, caplog):
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_capture, "save_traces", full)
    batch = make_batch([300], [40], num_heads=8)
    with caplog.at_level(logging.ERROR, "sglang_ext"):
        for _ in range(3):
            assert isinstance(serve(stage, batch, [40], [300]), Recorder)
    assert len(native) == 3 and skipped(stage) == {"write_error": 3} and stage.status()["traces_written"] == 0
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "No space left" in str(record.exc_info[1])


def test_nothing_is_looked_at_while_traces_are_off(stage, native):
    sut.use(stage, mode="native")
    batch = make_batch([300], [40], num_heads=8)
    serve(stage, batch, [40], [300], of=sut.indexer(head_dim=64))
    assert skipped(stage) == {} and stage._prompts is None and len(native) == 1


# Start


def start(stage: Stage, config: dict[str, Any]) -> None:
    stage.start(config, 0, 8, 128, TOP_K, torch.device("cpu"))


def test_start_makes_the_folder_and_says_so_once(tmp_path, caplog):
    folder = tmp_path / "some" / "traces"
    environ = {"SGLANG_EXT_TRACE_DIR": str(folder)}
    environ["SGLANG_EXT_MODE"] = "native"  # auto would add lines of its own
    stage = Stage(Settings(mode="native", trace_dir=str(folder)), environ)
    with caplog.at_level(logging.WARNING, "sglang_ext"):
        for _ in range(2):
            start(stage, {})
    assert folder.is_dir() and [str(folder) in line for line in caplog.messages] == [True]


def test_a_folder_that_cannot_be_made_is_a_wrong_setting(tmp_path):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "traces")
    with pytest.raises(ValueError, match=f"trace_dir='{folder}' cannot be made: Not a directory"):
        start(Stage(Settings(), {}), {"sglang_ext": {"trace_dir": folder}})


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"_name_or_path": "/models/Some-Model/", "model_type": "x"}, "Some-Model"),
        ({"_name_or_path": "org/name"}, "name"),
        ({"_name_or_path": "", "model_type": "deepseek_v32"}, "deepseek_v32"),
        ({}, "unknown"),
    ],
)
def test_model_name(config, want):
    assert trace_capture.model_name(config) == want
