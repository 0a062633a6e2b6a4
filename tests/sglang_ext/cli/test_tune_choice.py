"""The choice of a layer: cheapest of what finds enough, and native with a reason, on numbers made by hand."""

import pytest

from indexer_kernels import IndexerParams
from sglang_ext.cli.tune_choice import Cost, Found, Option, Target, choose_layer, option_of, passing

TARGET = Target(mean=0.9, row=0.7)
MISA = option_of("misa", IndexerParams(active_heads=4))
RERANK = option_of("misa_rerank", IndexerParams(candidates=8192))
HISA = option_of("hisa", IndexerParams(top_blocks=32))


def found(**recall: list[float]) -> Found:
    """found(at_100=[0.9, 1.0]): recall of two rows at context 100."""
    return Found({int(name.removeprefix("at_")): rows for name, rows in recall.items()})


def costs(native: dict[int, float], **options: dict[int, float]) -> dict[tuple[int, Option, int], Cost]:
    named = {"misa": MISA, "rerank": RERANK, "hisa": HISA}
    return {(5, named[n], c): Cost(native[c], value) for n, own in options.items() for c, value in own.items()}


def test_an_option_names_what_it_depends_on():
    assert MISA.shown == "misa active_heads=4"
    assert RERANK.shown == "misa_rerank active_heads=8 candidates=8192"
    assert HISA.shown == "hisa top_blocks=32"
    assert option_of("hisa", IndexerParams(top_blocks=32, active_heads=16)) == HISA
    assert HISA.params(IndexerParams(active_heads=16)) == IndexerParams(top_blocks=32, active_heads=16)


@pytest.mark.parametrize(
    ("recall", "passes"),
    [
        ({"at_100": [0.9, 0.9]}, True),
        ({"at_100": [0.7, 1.0, 1.0]}, True),
        ({"at_100": [0.69, 1.0, 1.0, 1.0]}, False),  # the worst row
        ({"at_100": [0.89, 0.89]}, False),  # the mean
        ({"at_100": [1.0] * 9, "at_200": [0.8]}, False),  # the worst context counts, not the mean of all rows
        ({"at_200": [1.0]}, False),  # not measured at 100
    ],
)
def test_passing(recall, passes):
    assert passing({MISA: found(**recall)}, TARGET, {100}) == ([MISA] if passes else [])


def test_the_cheapest_that_passes():
    of_layer = {MISA: found(at_100=[0.5]), RERANK: found(at_100=[0.95]), HISA: found(at_100=[0.92])}
    priced = costs({100: 10.0}, misa={100: 1.0}, rerank={100: 5.0}, hisa={100: 4.0})
    choice = choose_layer(5, of_layer, TARGET, {100}, priced)
    assert (choice.layer, choice.option, choice.share, choice.from_context) == (5, HISA, 0.4, 100)
    assert choice.why == "hisa top_blocks=32: recall 0.9200, worst row 0.9200 of 1 rows"


def test_of_equal_costs_the_one_that_finds_more():
    of_layer = {RERANK: found(at_100=[0.95]), HISA: found(at_100=[0.99])}
    assert (
        choose_layer(5, of_layer, TARGET, {100}, costs({100: 10.0}, rerank={100: 5.0}, hisa={100: 5.0})).option == HISA
    )


def test_short_contexts_stay_native_where_the_mode_is_dearer():
    recall = {f"at_{c}": [1.0] for c in (100, 200, 400)}
    of_layer, native = {MISA: found(**recall), HISA: found(**recall)}, {100: 10.0, 200: 20.0, 400: 40.0}
    priced = costs(native, misa={100: 12.0, 200: 16.0, 400: 20.0}, hisa={100: 5.0, 200: 25.0, 400: 21.0})
    choice = choose_layer(5, of_layer, TARGET, {100, 200, 400}, priced)
    assert (choice.option, choice.from_context) == (MISA, 200)
    assert choice.share == pytest.approx((10 + 16 + 20) / 70)
    hisa = choose_layer(5, {HISA: of_layer[HISA]}, TARGET, {100, 200, 400}, priced)
    assert hisa.from_context == 400, "cheaper at 100 only by chance: from a context on means at all longer ones"


def test_native_where_nothing_finds_enough():
    of_layer = {MISA: found(at_100=[0.5]), RERANK: found(at_100=[0.85, 0.6]), HISA: found(at_200=[1.0])}
    choice = choose_layer(5, of_layer, TARGET, {100}, {})
    assert (choice.option, choice.share) == (None, 1.0)
    assert choice.why == (
        "nothing meets recall 0.9 (worst row 0.7): the most has misa_rerank active_heads=8 candidates=8192, "
        "recall 0.7250, worst row 0.6000"
    )
    assert "no mode was measured at every context" in choose_layer(5, {}, TARGET, {100}, {}).why


def test_native_where_nothing_is_cheaper():
    choice = choose_layer(5, {MISA: found(at_100=[1.0])}, TARGET, {100}, costs({100: 10.0}, misa={100: 10.0}))
    assert choice.option is None and "costs no less than native" in choice.why


def test_native_where_nothing_is_cheaper_in_any_order_of_addition():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: an option that pays nowhere must not pass for a cheaper one."""
    native = {400: 0.3, 200: 0.2, 100: 0.1}
    dearer = {context: 2 * cost for context, cost in native.items()}
    for own in ([100, 200, 400], [400, 200, 100]):
        recall = {f"at_{context}": [1.0] for context in native}
        choice = choose_layer(5, {MISA: found(**recall)}, TARGET, own, costs(native, misa=dearer))
        assert (choice.option, choice.share) == (None, 1.0)
