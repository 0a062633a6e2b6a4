"""Which settings each layer runs with, resolved once, and which layers share them."""

from collections.abc import Collection
from typing import NamedTuple

from sglang_ext.settings import Settings


class Variant(NamedTuple):
    """Settings that some layers share. number: 0 for the deployment's own, which single layers do not change."""

    number: int
    settings: Settings


class LayerSettings:
    """The variants of the settings of the moment. Layers of one variant share decision and plan of a forward."""

    def __init__(self) -> None:
        self._made_of: Settings | None = None
        self._variants: dict[Settings, Variant] = {}
        self._by_layer: dict[int, Variant] = {}
        self._firsts: dict[tuple[int, int, frozenset[int]], int] = {}

    def of(self, settings: Settings, layer: int) -> Variant:
        """The layer's variant. Its object is the same at every call with the same settings."""
        if settings is not self._made_of:
            self._made_of = settings
            self._variants = {settings: Variant(0, settings)}
            self._by_layer, self._firsts = {}, {}
        found = self._by_layer.get(layer)
        if found is None:
            own = settings.of_layer(layer)
            found = self._variants.setdefault(own, Variant(len(self._variants), own))
            self._by_layer[layer] = found
        return found

    def all(self, settings: Settings) -> list[Variant]:
        """The deployment's own settings, and those of every layer that has some."""
        own = [self.of(settings, number) for number, _ in settings.layers]
        return list(dict.fromkeys([Variant(0, settings), *own]))

    def first(
        self, settings: Settings, layer: int, layers: Collection[int], returned: Collection[int] | None = None
    ) -> int:
        """The lowest of `layers` that shares this layer's variant, -1 for none. With `returned`: that is none of these
        and no native layer either, so that it runs its mode.
        """
        number = self.of(settings, layer).number
        skipped = frozenset() if returned is None else frozenset((*settings.native_layers, *returned))
        key = (number, len(layers), skipped)
        if key not in self._firsts:
            own = (one for one in layers if one not in skipped and self.of(settings, one).number == number)
            self._firsts[key] = min(own, default=-1)
        return self._firsts[key]
