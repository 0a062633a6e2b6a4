"""Recall and mass: against loops, on hand-made cases, and of modes whose answer is known."""

import math

import pytest
import torch

from indexer_kernels import MODES, IndexerParams
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.traces import Trace
from sglang_ext.cli.recall import (
    MODE_FIELDS,
    evaluate,
    measured_rows,
    relevant,
    selected_tokens,
    shares_found,
    synthetic_sample,
    trace_samples,
)
from tests.support.inputs import make_batch
from tests.support.small import SMALL


def trace(context: int, layer: int = 0, rows: int = 8, seed: int = 0) -> Trace:
    batch = make_batch([context], [rows], num_heads=8, seed=seed)
    q, weights, k, k_scale, _ks, ke = batch.ragged
    return Trace("tiny", layer, context, q, weights, k, k_scale, ke.long() - 1, "random")


def flags(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def test_a_case_made_by_hand():
    """p of native's tokens is proportional to 4, 2, 1; the mode finds the first and the last of them."""
    scores = torch.tensor([[math.log(4), math.log(2), 0.0, -5.0]])
    recall, mass = shares_found(scores, flags([1, 1, 1, 0]), flags([1, 0, 1, 1]))
    assert recall.item() == pytest.approx(2 / 3) and mass.item() == pytest.approx(5 / 7)


def test_mass_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 40, generator=generator) * 3
    native, found = (torch.rand(5, 40, generator=generator) < share for share in (0.4, 0.5))
    recall, mass = shares_found(scores, native, found)
    for row in range(5):
        p = torch.softmax(scores[row].double(), dim=0).tolist()
        of_native = sum(p[j] for j in range(40) if native[row, j])
        of_both = sum(p[j] for j in range(40) if native[row, j] and found[row, j])
        assert mass[row].item() == pytest.approx(of_both / of_native)
        wanted = [j for j in range(40) if native[row, j]]
        assert recall[row].item() == pytest.approx(sum(bool(found[row, j]) for j in wanted) / len(wanted))


def test_large_scores_neither_overflow_nor_vanish():
    scores = torch.tensor([[3000.0, 2999.0, -3000.0], [-3000.0, -3001.0, 0.0]])
    _, mass = shares_found(scores, flags([1, 1, 0], [1, 1, 0]), flags([1, 0, 0], [1, 0, 1]))
    assert mass.tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 2)


def test_nothing_wanted_and_nothing_found():
    scores = torch.zeros(2, 3)
    recall, mass = shares_found(scores, flags([0, 0, 0], [1, 0, 0]), flags([0, 0, 0], [0, 1, 1]))
    assert recall.tolist() == mass.tolist() == [1.0, 0.0]


def test_selected_tokens():
    got = selected_tokens(torch.tensor([[2, 0, -1], [-1, -1, -1]], dtype=torch.int32), 4)
    assert got.tolist() == [[True, False, True, False], [False] * 4]


def test_rows_with_nothing_to_choose_are_left_out():
    lengths = torch.tensor([10, 64, 65, 300])
    assert measured_rows("misa", lengths, SMALL).tolist() == [False, False, True, True]
    assert measured_rows("misa", lengths[:2], SMALL).tolist() == [True, True], "where no row has a choice, all count"


def test_group_rerank_needs_whole_groups():
    """Rows at positions 97; 100 .. 103; 106, 107; 108, 109 and the end: groups of 4 begin at multiples of 4."""
    positions = torch.tensor([97, 100, 101, 102, 103, 106, 107, 108, 109])
    want = [False, True, True, True, True, False, False, True, True]
    assert measured_rows("group_rerank", positions + 1, SMALL).tolist() == want
    assert measured_rows("misa", positions + 1, SMALL).all()


def test_native_against_itself_and_modes_against_sets():
    samples = trace_samples([trace(300, 1), trace(300, 0, seed=1), trace(900, 0)])
    assert [(sample.context, sample.layer) for sample in samples] == [(256, 0), (256, 1), (1024, 0)]
    for one in evaluate(samples, MODES, [SMALL], "reference", "cpu"):
        assert one is not None and one.recall.dtype == one.mass.dtype == torch.float64
        assert len(one.recall) == len(one.mass) == len(one.work) == 8 and one.wanted == 0
        assert ((one.recall >= 0) & (one.recall <= 1) & (one.mass >= 0) & (one.mass <= 1)).all()
        if one.mode == "native":
            assert (one.recall == 1).all() and (one.mass == 1).all()
        elif one.context == 1024:
            assert (one.recall < 1).any(), f"{one.mode} prunes here"


def test_recall_is_the_overlap_of_the_selections():
    from indexer_kernels import select_ragged

    (sample,) = trace_samples([trace(900)])
    (one,) = evaluate([sample], ["hisa"], [SMALL], "reference", "cpu")
    native, hisa = (select_ragged(mode, *sample.tensors, SMALL, "reference").tolist() for mode in ("native", "hisa"))
    scores = token_scores(*sample.tensors[:4]).double()
    for row in range(8):
        both = set(native[row]) & set(hisa[row])
        assert one.recall[row].item() == pytest.approx(len(both) / 64)
        total = torch.logsumexp(scores[row, native[row]], 0)
        assert one.mass[row].item() == pytest.approx(torch.exp(torch.logsumexp(scores[row, list(both)], 0) - total))


def test_a_sweep_measures_each_mode_once_per_parameter_it_has():
    settings = [
        IndexerParams(top_k=64, active_heads=heads, top_blocks=blocks, candidates=192)
        for heads in (2, 4)
        for blocks in (8, 16)
    ]
    found = list(evaluate([synthetic_sample(512, 8, 8, 0)], ["native", "misa", "hisa"], settings, "reference", "cpu"))
    assert len(found) == 12
    measured = [(one.mode, relevant(one.mode, one.params)) for one in found if one is not None]
    assert [mode for mode, _ in measured].count("native") == 1
    assert [values["active_heads"] for mode, values in measured if mode == "misa"] == [2, 4]
    assert [values["top_blocks"] for mode, values in measured if mode == "hisa"] == [8, 16]


def test_every_mode_names_its_parameters():
    assert set(MODE_FIELDS) == set(MODES)
    named = {name for names in MODE_FIELDS.values() for name in names} | {"top_k"}
    assert named == set(IndexerParams.__slots__)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_a_mode_does_not_name_change_nothing(mode):
    (sample,) = trace_samples([trace(900)])
    other = IndexerParams(top_k=64, active_heads=3, route_block=64, candidates=256, block_size=16, top_blocks=9)
    other = other.__class__(**{n: getattr(other, n) for n in other.__slots__} | {"group": 2, "local_tokens": 8})
    kept = {name: getattr(SMALL, name) for name in MODE_FIELDS[mode]}
    mixed = IndexerParams(**{name: getattr(other, name) for name in other.__slots__} | kept)
    (a, b) = (next(evaluate([sample], [mode], [params], "reference", "cpu")) for params in (SMALL, mixed))
    assert torch.equal(a.recall, b.recall)


def test_contexts_that_are_not_there():
    assert len(trace_samples([trace(300), trace(900)], [1024])) == 1
    with pytest.raises(ValueError, match=r"contexts=\[4096\]; there are \[256, 1024\]"):
        trace_samples([trace(300), trace(900)], [4096])
