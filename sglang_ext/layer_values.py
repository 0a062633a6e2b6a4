"""Settings of single layers: what an entry of `layers` may hold, and how entries of several sources come together."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from indexer_kernels.params import IndexerParams

PHASE_MODES = ("prefill_mode", "decode_mode")
PARAMETERS = tuple(field.name for field in dataclasses.fields(IndexerParams) if field.name != "top_k")
ALLOWED = ("mode", *PHASE_MODES, "prefill_min_tokens", *PARAMETERS)
NOTE = "why"  # a sentence for people; nothing reads it

Entries = dict[int, dict[str, Any]]
Frozen = tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]


def decode_mode_of(mode: str) -> str:
    """Decode's mode where `mode` alone is set: native or not. What decode can choose by, the means of blocks, loses
    answers that prefill's choice keeps (docs/quality.md): a mode of decode is asked for by name, or is `auto`.
    """
    return "native" if mode == "native" else "auto"


def parse_layers(value: Any, parse: Callable[[str, Any], Any]) -> Frozen:
    """{"3": {"mode": "hisa", "top_blocks": 48}} (or its JSON text), each value by parse(name, value).

    `mode` becomes the modes of both phases, as the deployment's: decode's is native where it is native, else auto.
    Raises ValueError naming layer, field, value and what is allowed.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"layers={value!r} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"layers={value!r} must be an object of layer numbers, as in {{'3': {{'mode': 'hisa'}}}}")
    entries: Entries = {}
    for number, own in value.items():
        where = f"layers.{number}"
        if not str(number).isdecimal():
            raise ValueError(f"{where}: {number!r} must be the number of a layer")
        if not isinstance(own, Mapping):
            raise ValueError(f"{where}={own!r} must be an object of settings")
        if int(number) in entries:
            raise ValueError(f"{where} is there twice")
        for name in own:
            if name not in (*ALLOWED, NOTE):
                raise ValueError(f"{where}.{name} is not a setting of single layers; those are {', '.join(ALLOWED)}")
        try:
            parsed = {name: parse(name, one) for name, one in own.items() if name != NOTE}
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        mode = parsed.pop("mode", None)
        of_mode = {"prefill_mode": mode, "decode_mode": mode and decode_mode_of(mode)}
        modes = {phase: parsed.pop(phase, None) or of_mode[phase] for phase in PHASE_MODES}
        entries[int(number)] = parsed | {phase: mode for phase, mode in modes.items() if mode is not None}
    return freeze(entries)


def freeze(entries: Entries) -> Frozen:
    """Hashable, in the order of the layers; without layers that keep nothing of their own."""
    return tuple((number, tuple(sorted(own.items()))) for number, own in sorted(entries.items()) if own)


def thaw(layers: Frozen) -> Entries:
    """The opposite of `freeze`."""
    return {number: dict(own) for number, own in layers}


def override(layers: Frozen, values: Mapping[str, Any]) -> Frozen:
    """The entries of an earlier source under the deployment-wide values of a later one: what that sets, no layer keeps.

    A mode of `auto` is no override: it leaves the choice to the layers.
    """
    gone = {name for name in values if name not in ("mode", *PHASE_MODES, "layers")}
    for name in ("mode", *PHASE_MODES):
        if values.get(name) not in (None, "auto"):
            gone |= set(PHASE_MODES) if name == "mode" else {name}
    return freeze({n: {name: v for name, v in own.items() if name not in gone} for n, own in thaw(layers).items()})


def merge(layers: Frozen, later: Frozen) -> Frozen:
    """Entries of two sources; of a value that both have, the later's."""
    entries = thaw(layers)
    for number, own in thaw(later).items():
        entries[number] = entries.get(number, {}) | own
    return freeze(entries)
