"""Timing without a GPU: which call runs when, what counts, and that what is timed is a selection of the right rows."""

import pytest
import torch

from indexer_kernels import IndexerParams, select_ragged
from sglang_ext.cli.recall import synthetic_sample
from sglang_ext.cli.stage_time import WARM_UPS, StageCase, Timing, interleaved_medians
from tests.support.compare import assert_same_selection

PARAMS = IndexerParams(top_k=64, candidates=128, block_size=64, top_blocks=4, route_block=64, local_tokens=16)


def test_calls_take_turns_and_the_median_counts():
    order, clock = [], iter(range(100))

    def timer(call):
        call()
        return Timing(float(next(clock)), 0.0)

    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = interleaved_medians(calls, 3, timer)
    assert order == ["a", "b"] * (WARM_UPS + 3)
    # a's turns are 0, 2, 4, ...: those after the warm-up are 4, 6, 8
    assert medians == {"a": 2.0 * WARM_UPS + 2, "b": 2.0 * WARM_UPS + 3}


@pytest.mark.parametrize("rows", [10, 1000])
def test_the_timed_rows_are_the_last_of_the_prompt(rows):
    """300 tokens, not whole pages; queries are the trace's four, over and over."""
    sample = synthetic_sample(300, 4, 8, seed=1)
    case, count = StageCase(sample, rows, None), min(rows, 300)
    q, weights, k, k_scale = sample.tensors[:4]
    picked = [i % 4 for i in range(count)]
    lengths = list(range(300 - count + 1, 301))
    assert case.plan.row_lengths.tolist() == lengths
    ks, ke = torch.zeros(count, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    again = q.view(torch.uint8)[picked].view(torch.float8_e4m3fn)
    for mode in ("native", "hisa"):
        got = case.mode(mode, PARAMS, backend="reference", output="position")
        want = select_ragged(mode, again, weights[picked], k, k_scale, ks, ke, PARAMS, "reference")
        assert_same_selection(got, [set(row) - {-1} for row in want.tolist()], lengths, 64)


def test_native_hands_deep_gemm_every_row_and_all_keys(monkeypatch):
    """Its arguments; its result needs a GPU (scripts/bench_stage.py times the same call)."""
    logits = pytest.importorskip("indexer_kernels.gpu.deep_gemm_logits")
    seen = []

    def fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits):
        seen.append((q, kv, weights, ks, ke, clean_logits))
        return torch.arange(320.0).expand(len(q), 320)

    monkeypatch.setattr(logits.deep_gemm, "fp8_mqa_logits", fp8_mqa_logits)
    case = StageCase(synthetic_sample(300, 4, 8, seed=1), 10, None)
    out = case.native(64)
    [(q, (k, k_scale), weights, ks, ke, clean)] = seen
    assert (q.shape, k.shape, k_scale.shape, weights.shape) == ((10, 8, 128), (320, 128), (320,), (10, 8))
    assert ks.tolist() == [0] * 10 and ke.tolist() == list(range(291, 301)) and clean is False
    assert_same_selection(out, [set(range(n - 64, n)) for n in range(291, 301)], list(range(291, 301)), 64)
