"""The overlap of two selections, and its sums: against sets, and against the recall of scripts/eval_recall.py."""

import random

import pytest
import torch

from indexer_kernels import select_ragged
from indexer_kernels.reference.scores import token_scores
from sglang_ext.cli.recall import Sample, evaluate, selected_tokens, shares_found
from sglang_ext.overlap import BOUNDS, SLOTS, Key, Overlaps, Total, row_overlap
from tests.support.inputs import make_batch
from tests.support.model_building import model_building
from tests.support.small import SMALL

KEY = Key("prefill", "misa", 3)


def selection(rows: list[set[int]], width: int) -> torch.Tensor:
    """Packed in a random order, then -1."""
    padded = []
    for row in rows:
        entries = random.sample(sorted(row), len(row))
        padded.append(entries + [-1] * (width - len(row)))
    return torch.tensor(padded, dtype=torch.int32)


def test_against_sets():
    ours = [set(random.sample(range(1000), random.randrange(65))) for _ in range(200)]
    native = [set(random.sample(range(1000), random.randrange(1, 65))) for _ in range(200)]
    want = [len(a & b) / len(b) for a, b in zip(ours, native)]
    assert len({round(share, 3) for share in want}) > 20
    got = row_overlap(selection(ours, 64), selection(native, 64))
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(want, abs=1e-7)


def test_edges():
    ours = [{1, 2}, set(), {5, 6}, set(), {0}, {2**31 - 1}]
    native = [{1, 2}, {7}, set(), set(), {0, 1, 2, 3}, {2**31 - 1, 0}]
    got = row_overlap(selection(ours, 4), selection(native, 4))
    assert got.tolist() == [1.0, 0.0, 1.0, 1.0, 0.25, 0.5], "padding is no entry; native without any is found"


def test_widths_may_differ():
    assert row_overlap(selection([{1, 9}], 2), selection([{1, 9, 4}], 5)).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize("mode", ["misa", "misa_rerank", "hisa", "group_rerank", "native"])
def test_is_the_recall_of_eval_recall(mode):
    """Bit for bit, for the same selections."""
    batch = make_batch([900], 8, num_heads=8, seed=3)
    tensors = batch.ragged
    ours, native = (select_ragged(one, *tensors, SMALL, backend="reference") for one in (mode, "native"))
    scores = token_scores(*tensors[:4])
    recall, _ = shares_found(scores, *(selected_tokens(chosen, 900) for chosen in (native, ours)))
    assert torch.equal(row_overlap(ours, native), recall)
    [measured] = evaluate([Sample(900, 0, tensors)], [mode], [SMALL], "reference", "cpu")
    assert torch.equal(row_overlap(ours, native), measured.recall)
    assert mode == "native" or 0 < float(recall.mean()) < 1


# Sums


def test_sums_and_histogram():
    overlaps = Overlaps()
    first, second = [1.0, 0.95, 0.5, 0.2], [0.999, 0.9995]
    overlaps.add(KEY, torch.tensor(first, dtype=torch.float64))
    overlaps.add(KEY, torch.tensor(second, dtype=torch.float64))
    overlaps.add(Key("decode", "misa", 3), torch.tensor([0.25], dtype=torch.float64))
    rows = first + second
    want = Total(6, sum(rows), tuple(sum(row <= bound for row in rows) for bound in BOUNDS))
    got = overlaps.read(wait=True)
    assert got[KEY].rows == 6 and got[KEY].at_most == want.at_most and got[KEY].mean == pytest.approx(want.mean)
    assert want.at_most == (1, 2, 2, 2, 2, 3, 3, 4)
    assert got[Key("decode", "misa", 3)] == Total(1, 0.25, (1,) * len(BOUNDS))


def test_rows_that_do_not_count():
    overlaps = Overlaps()
    overlaps.add(KEY, torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([False, True]))
    overlaps.add(Key("decode", "hisa", 0), torch.tensor([1.0], dtype=torch.float64), torch.tensor([False]))
    assert overlaps.read(wait=True) == {KEY: Total(1, 0.5, (0, *[1] * (len(BOUNDS) - 1)))}


def test_nothing_is_seen_before_it_is_sent():
    overlaps = Overlaps()
    overlaps.send()
    assert overlaps.read() == {} == overlaps.read(wait=True)
    overlaps.add(KEY, torch.ones(2, dtype=torch.float64))
    assert overlaps.read() == {}
    overlaps.send()
    assert overlaps.read()[KEY].rows == 2
    overlaps.add(KEY, torch.ones(3, dtype=torch.float64))
    assert overlaps.read()[KEY].rows == 2 and overlaps.read(wait=True)[KEY].rows == 5


def test_more_kinds_than_there_is_memory_for():
    """Shadow sampling takes it as any error: it ends, and serving goes on (test_shadow.py)."""
    overlaps = Overlaps()
    for layer in range(SLOTS):
        overlaps.add(Key("prefill", "misa", layer), torch.ones(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no memory .*decode.*1024"):
        overlaps.add(Key("decode", "misa", 0), torch.ones(1, dtype=torch.float64))
    assert len(overlaps.read(wait=True)) == SLOTS


def test_prepared_while_a_model_is_built():
    overlaps = Overlaps()
    with model_building():
        overlaps.prepare(torch.device("cpu"))
    overlaps.add(Key("prefill", "hisa", 0), torch.tensor([1.0, 0.5], dtype=torch.float64))
    overlaps.send()
    assert overlaps.read()[Key("prefill", "hisa", 0)].mean == 0.75
