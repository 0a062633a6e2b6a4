"""torch_top_k: the K best owned columns, as columns or as slots, then -1."""

import pytest
import torch

from indexer_kernels.top_k import torch_top_k


def rows_of(out):
    return [set(row.tolist()) for row in out]


@pytest.mark.parametrize("num_columns", [3, 64, 200])
@pytest.mark.parametrize("top_k", [1, 64, 128])
def test_against_a_sort(num_columns, top_k):
    scores = torch.randn(6, num_columns)
    lengths = torch.tensor([0, 1, 2, 3, num_columns // 2, num_columns], dtype=torch.int32)
    out = torch.full((6, top_k), -7, dtype=torch.int32)
    torch_top_k(scores, lengths, None, out)
    for m, length in enumerate(lengths.tolist()):
        count = min(length, top_k)
        best = sorted(range(length), key=lambda j: -float(scores[m, j]))[:count]
        assert set(out[m, :count].tolist()) == set(best)
        assert (out[m, count:] == -1).all()


def test_columns_past_the_length_are_not_looked_at():
    scores = torch.full((2, 100), float("nan"))
    scores[0, :40], scores[1, :5] = torch.randn(40), torch.randn(5)
    out = torch.empty((2, 10), dtype=torch.int32)
    torch_top_k(scores, torch.tensor([40, 5], dtype=torch.int32), None, out)
    assert rows_of(out[:1]) == [set(scores[0, :40].topk(10).indices.tolist())]
    assert rows_of(out[1:]) == [{0, 1, 2, 3, 4, -1}]


def test_slots_through_a_page_table_with_garbage_behind():
    """A table as wide as the pages the longest row needs; entries past a row's pages may be anything."""
    scores = torch.randn(2, 192)
    lengths = torch.tensor([192, 70], dtype=torch.int32)
    table = torch.tensor([[5, 0, 9], [2, 7, -(2**31)]], dtype=torch.int32)
    columns, slots = torch.empty((2, 80), dtype=torch.int32), torch.empty((2, 80), dtype=torch.int32)
    torch_top_k(scores, lengths, None, columns)
    torch_top_k(scores, lengths, table, slots)
    for m, count in enumerate([80, 70]):
        want = {int(table[m, j // 64]) * 64 + j % 64 for j in columns[m, :count].tolist()}
        assert set(slots[m, :count].tolist()) == want and len(want) == count
    assert (slots[1, 70:] == -1).all()


def test_own_columns_come_first_whatever_they_score():
    scores = torch.full((2, 50), float("-inf"))
    scores[0, 30], scores[1, 1] = 1.0, float("nan")
    out = torch.empty((2, 16), dtype=torch.int32)
    torch_top_k(scores, torch.tensor([40, 3], dtype=torch.int32), None, out)
    assert out[0, 0] == 30 and ((out[0] >= 0) & (out[0] < 40)).all() and len(rows_of(out[:1])[0]) == 16
    assert rows_of(out[1:]) == [{0, 1, 2, -1}]


def test_no_rows():
    out = torch.empty((0, 4), dtype=torch.int32)
    torch_top_k(torch.empty(0, 9), torch.empty(0, dtype=torch.int32), None, out)
    assert out.shape == (0, 4)
