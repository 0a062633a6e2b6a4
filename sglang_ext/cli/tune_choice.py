"""The choice of `sglang-ext tune`: of what each layer could run, the cheapest that finds enough of native's tokens."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from indexer_kernels import IndexerParams
from sglang_ext.cli.recall import Measured, relevant

TUNED = ("active_heads", "candidates", "top_blocks")


class Option(NamedTuple):
    """A mode with the parameters that its selection depends on: what a layer could run."""

    mode: str
    values: tuple[tuple[str, object], ...]

    @property
    def shown(self) -> str:
        """As in `misa_rerank active_heads=8 candidates=10240`, the parameters that are tuned only."""
        return " ".join([self.mode, *(f"{name}={value}" for name, value in self.values if name in TUNED)])

    def params(self, base: IndexerParams) -> IndexerParams:
        """All parameters, those that the mode does not depend on from `base`."""
        return replace(base, **dict(self.values))  # type: ignore[arg-type]


def option_of(mode: str, params: IndexerParams) -> Option:
    """The option that a mode with these parameters is."""
    return Option(mode, tuple(relevant(mode, params).items()))


class Target(NamedTuple):
    """Share of native's tokens that a layer must find, at every context: on average over rows, and in its worst row."""

    mean: float
    row: float


@dataclass(slots=True)
class Found:
    """What an option finds in one layer, by context: lists over rows."""

    recall: dict[int, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of the context with the lowest mean."""
        return min(sum(rows) / len(rows) for rows in self.recall.values())

    @property
    def worst(self) -> float:
        return min(min(rows) for rows in self.recall.values())

    @property
    def rows(self) -> int:
        return sum(len(rows) for rows in self.recall.values())

    def meets(self, target: Target) -> bool:
        return self.mean >= target.mean and self.worst >= target.row

    @property
    def shown(self) -> str:
        return f"recall {self.mean:.4f}, worst row {self.worst:.4f}"


class Cost(NamedTuple):
    """Of a layer's selection at one context, in one unit: native's and the option's."""

    native: float
    option: float


class Choice(NamedTuple):
    """What one layer runs. option None: native, for the reason in `why`; from_context: the shortest that it pays at;
    share: of native's cost over all contexts, those below from_context at native's.
    """

    layer: int
    option: Option | None
    found: Found | None
    from_context: int
    share: float
    why: str


def gather(measured: Iterable[Measured]) -> dict[int, dict[Option, Found]]:
    """Layer -> option -> what it finds."""
    layers: dict[int, dict[Option, Found]] = {}
    for one in measured:
        found = layers.setdefault(one.layer or 0, {}).setdefault(option_of(one.mode, one.params), Found())
        found.recall.setdefault(one.context, []).extend(one.recall.tolist())
    return layers


def passing(found: Mapping[Option, Found], target: Target, contexts: Collection[int]) -> list[Option]:
    """The options that meet the target and were measured at every context of the layer."""
    return [option for option, one in found.items() if set(one.recall) >= set(contexts) and one.meets(target)]


def choose_layer(
    layer: int,
    found: Mapping[Option, Found],
    target: Target,
    contexts: Collection[int],
    costs: Mapping[tuple[int, Option, int], Cost],
) -> Choice:
    """The cheapest passing option over all contexts; native where none passes, or none is cheaper than native.

    costs: of (layer, option, context), of passing options at least. An option runs from the shortest context on from
    which it is cheaper than native at every longer one too.
    """
    able = passing(found, target, contexts)
    if not able:
        return Choice(layer, None, None, 0, 1.0, f"nothing meets {_shown(target)}: {_closest(found, contexts)}")
    choices = [_priced(layer, option, found[option], {c: costs[layer, option, c] for c in contexts}) for option in able]
    best = min(choices, key=lambda choice: (choice.share, -(choice.found.mean if choice.found else 0)))
    if not best.from_context:
        return Choice(layer, None, None, 0, 1.0, f"{best.why}, and costs no less than native at the longest context")
    return best


def _priced(layer: int, option: Option, found: Found, costs: Mapping[int, Cost]) -> Choice:
    start, spent = 0, 0.0
    pays = True
    for context in sorted(costs, reverse=True):
        pays = pays and costs[context].option < costs[context].native
        start = context if pays else start
        spent += costs[context].option if pays else costs[context].native
    # Exactly 1 where it pays nowhere: the same numbers added in another order need not give the same sum.
    share = spent / sum(one.native for one in costs.values()) if start else 1.0
    return Choice(layer, option, found, start, share, f"{option.shown}: {found.shown} of {found.rows} rows")


def _closest(found: Mapping[Option, Found], contexts: Collection[int]) -> str:
    whole = {option: one for option, one in found.items() if set(one.recall) >= set(contexts)}
    if not whole:
        return "no mode was measured at every context"
    option = max(whole, key=lambda option: (whole[option].mean, whole[option].worst))
    return f"the most has {option.shown}, {whole[option].shown}"


def _shown(target: Target) -> str:
    return f"recall {target.mean:g} (worst row {target.row:g})"
