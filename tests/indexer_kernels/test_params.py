"""IndexerParams: defaults, what is refused and with which words, and that nothing refused was needed."""

import dataclasses

import pytest

from indexer_kernels import MODES, IndexerParams
from indexer_kernels.params import CHOICES

SIZES = [field.name for field in dataclasses.fields(IndexerParams) if field.name not in CHOICES]


def test_defaults_are_the_designs():
    assert dataclasses.asdict(IndexerParams()) == {
        "top_k": 2048,
        "active_heads": 8,
        "route_block": 128,
        "route_statistic": "max",
        "candidates": 10240,
        "block_size": 128,
        "top_blocks": 64,
        "group": 4,
        "local_tokens": 128,
        "candidate_unit": "token",
    }
    assert MODES == ("native", "misa", "misa_rerank", "hisa", "group_rerank")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        IndexerParams().top_k = 1


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must be at least 1"):
        IndexerParams(**{field: value})


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [1.5, "64", None, True], ids=repr)
def test_sizes_of_a_wrong_type(field, value):
    with pytest.raises(TypeError, match=f"{field}={value!r} must be an int"):
        IndexerParams(**{field: value})


@pytest.mark.parametrize("value", ["pages", "auto", "", None, 64], ids=repr)
def test_unknown_candidate_unit(value):
    with pytest.raises(ValueError, match="candidate_unit=.* must be one of [(]'token', 'page'[)]"):
        IndexerParams(candidate_unit=value)


def test_unknown_route_statistic():
    with pytest.raises(ValueError, match="route_statistic='mean' must be one of .*sum.*max"):
        IndexerParams(route_statistic="mean")


@pytest.mark.parametrize(("changes", "words"), [
    ({"top_k": 10241}, "candidates=10240 must be at least top_k=10241"),
    ({"candidates": 2047}, "candidates=2047 must be at least top_k=2048"),
    ({"top_blocks": 16}, "top_blocks=16 of block_size=128 .* 1921 tokens.*top_k=2048"),
    ({"block_size": 32}, "top_blocks=64 of block_size=32 .* 2017 tokens.*top_k=2048"),
    ({"candidate_unit": "page", "candidates": 2048}, "candidates=2048 must be .* at least top_k [+] 63 = 2111"),
    ({"candidate_unit": "page", "candidates": 8200}, "candidates=8200 must be a multiple of 64"),
])  # fmt: skip
def test_budgets_that_could_leave_a_row_short(changes, words):
    with pytest.raises(ValueError, match=words):
        IndexerParams(**changes)


@pytest.mark.parametrize("changes", [
    {"candidates": 2048},
    {"top_blocks": 17},
    {"candidate_unit": "page", "candidates": 2112},
    {"top_k": 1, "active_heads": 1, "route_block": 1, "candidates": 1, "block_size": 1, "top_blocks": 1, "group": 1,
     "local_tokens": 1},
    {"top_k": 64, "candidates": 256, "block_size": 64, "top_blocks": 2},
])  # fmt: skip
def test_smallest_budgets_that_suffice(changes):
    assert dataclasses.asdict(IndexerParams(**changes)).items() >= changes.items()


def test_unknown_field():
    with pytest.raises(TypeError, match="topk"):
        IndexerParams(topk=2048)
