"""Which forwards and rows are sampled: exact shares, no step with the traffic, the same on every rank."""

import pytest

from sglang_ext.sampling import BLOCK, MAX_SCORES, Sampler, pick_rows


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.01, 1 / 16, 0.3, 0.5, 0.99, 1.0])
def test_the_share_is_exact_in_every_block(rate):
    sampler = Sampler(rate)
    for block in range(1, 21):
        chosen = sum(sampler.next() for _ in range(BLOCK))
        assert chosen == int(block * BLOCK * rate) - int((block - 1) * BLOCK * rate)


def test_ranks_choose_the_same_forwards_and_places():
    ranks = [Sampler(0.03) for _ in range(3)]
    for _ in range(5000):
        assert len({rank.fraction() for rank in ranks}) == 1
        assert len({rank.next() for rank in ranks}) == 1


@pytest.mark.parametrize("period", [2, 5, 16, 100])
def test_no_step_with_the_chunks_of_prompts(period):
    """Every chunk of prompts with so many chunks is sampled about as often."""
    sampler, times = Sampler(0.01), [0] * period
    for number in range(period * 20000):
        times[number % period] += sampler.next()
    assert min(times) > 0.75 * 200 and max(times) < 1.25 * 200, times


def test_fractions_spread():
    sampler, tenths = Sampler(1.0), [0] * 10
    for _ in range(10000):
        fraction = sampler.fraction()
        assert 0 <= fraction < 1
        tenths[int(fraction * 10)] += 1
        sampler.next()
    assert min(tenths) > 900 and max(tenths) < 1100


FRACTIONS = [number / 97 for number in range(97)]


def test_rows_are_of_one_request_and_have_something_to_choose():
    seen, extend, ends = [300, 40, 120, 70], [200, 40, 30, 1], [300, 40, 110, 1]
    counts = {0: range(100, 300), 2: range(90, 110)}  # positions p with 64 <= p < ends, among those extended
    times = dict.fromkeys(counts, 0)
    for fraction in FRACTIONS:
        request, positions = pick_rows(seen, extend, ends, 64, 16, fraction)
        assert set(positions) <= set(counts[request])
        assert positions == sorted(set(positions)) and len(positions) == min(16, len(counts[request]))
        gaps = {after - before for before, after in zip(positions, positions[1:])}
        assert max(gaps) - min(gaps) <= 1
        times[request] += 1
    # in proportion to the rows that count: 200 and 20
    assert times[2] == pytest.approx(97 * 20 / 220, abs=1)


def test_every_row_comes_up_equally_often():
    times = [0] * 100
    for number in range(1000):
        for position in pick_rows([100], [40], [100], 64, 7, number / 1000).positions:
            times[position] += 1
    assert sum(times[:64]) == 0 and {round(n / (7 * 1000 / 36), 1) for n in times[64:]} == {1.0}


@pytest.mark.parametrize(
    ("seen", "extend", "ends"),
    [([64, 10], [64, 10], [64, 10]), ([], [], []), ([300], [20], [280]), ([300], [20], [0]), ([300], [20], [-4])],
)
def test_nothing_to_choose(seen, extend, ends):
    assert all(pick_rows(seen, extend, ends, 64, 16, fraction) is None for fraction in FRACTIONS)


def test_a_row_that_sees_one_token_more_than_is_selected():
    assert pick_rows([65], [65], [65], 64, 16, 0.5) == (0, [64])


@pytest.mark.parametrize(("length", "rows"), [(131072, 57), (524288, 14), (100000, 64), (MAX_SCORES + 1, 1)])
def test_long_contexts_have_fewer_rows(length, rows):
    """So that SGLang's matrix of scores stays below the size from which it asks the driver for free memory."""
    assert len(pick_rows([length], [8192], [length], 2048, 64, 0.4).positions) == rows
    assert rows * length <= MAX_SCORES or rows == 1
