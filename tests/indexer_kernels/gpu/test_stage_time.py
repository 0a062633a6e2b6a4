"""What `sglang-ext tune` times and writes on a GPU: the right selections, and a file of measured costs."""

import json

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_ragged
from indexer_kernels.traces import embedded_traces, load_traces
from sglang_ext.cli.main import main
from sglang_ext.cli.recall import trace_samples
from sglang_ext.cli.stage_time import StageCase, stage_milliseconds
from tests.support.compare import overlap

pytestmark = pytest.mark.gpu

PARAMS = IndexerParams()


@pytest.fixture(scope="module")
def sample():
    """Layer 1 of the package's prompt of 8031 tokens: not whole pages."""
    found = trace_samples(load_traces(embedded_traces()), [8192])
    return found[0].to("cuda")


def test_native_is_the_same_selection_from_contiguous_keys_and_from_pages(sample):
    case = StageCase(sample, 512, None)
    q, weights, k, k_scale = sample.tensors[:4]
    ke = torch.arange(8031 - 511, 8032, dtype=torch.int32, device="cuda")
    want = select_ragged(
        "native", case.q, case.weights, k, k_scale, torch.zeros_like(ke), ke, PARAMS, backend="reference"
    )
    assert overlap(case.native(PARAMS.top_k), want) > 0.998
    assert overlap(case.mode("native", PARAMS, output="position"), want) > 0.998


def test_every_option_has_a_time(sample):
    choices = {name: (name, PARAMS) for name in ("misa", "misa_rerank", "hisa", "group_rerank")}
    native, spent = stage_milliseconds(StageCase(sample, 2048, None), choices, PARAMS.top_k, rounds=3)
    assert native > 0 and set(spent) == set(choices) and all(value > 0 for value in spent.values())


def test_tune_measures_and_says_so(tmp_path):
    out, record = tmp_path / "tuned.json", tmp_path / "all.json"
    flags = ["--active-heads", "8", "--candidates", "6144,10240", "--top-blocks", "64", "--rows", "4096", "--quiet"]
    assert main(["tune", "--out", str(out), "--json", str(record), "--recall-target", "0.9", *flags]) == 0
    content = json.loads(out.read_text())
    facts = content["tuned_on"]
    assert facts["gpu"] == torch.cuda.get_device_name() and facts["cost"].startswith("device milliseconds of 4096 rows")
    chosen = [entry for entry in content["layers"].values() if entry["prefill_mode"] != "native"]
    assert all(entry["prefill_min_tokens"] in (8031, 32186) for entry in chosen)
    timed = [
        context["cost"]
        for option in json.loads(record.read_text())["options"]
        for context in option["contexts"].values()
        if context["cost"]
    ]
    assert timed and all(cost["native"] > 0 and cost["option"] > 0 for cost in timed)
