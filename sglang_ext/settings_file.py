"""The settings file: JSON that `sglang-ext tune` writes or a person does, read by the setting `settings_file`.

{"format": 1, "tuned_on": {...}, <setting>: <value>, ..., "layers": {"3": {"mode": "hisa", "top_blocks": 48}}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
# What `tuned_on` must share with the served model: its key -> (the model config's field, in words).
MODEL_FACTS = {
    "num_layers": "num_hidden_layers, the layers of the model",
    "heads": "index_n_heads, the indexer's heads",
    "top_k": "index_topk, the tokens a row selects",
}


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A file's content. values: settings by name, unparsed; tuned_on: what it was tuned on, empty if by hand."""

    path: str
    values: Mapping[str, Any]
    tuned_on: Mapping[str, Any]

    def check_model(self, num_layers: int | None, heads: int | None, top_k: int | None) -> None:
        """Raises ValueError where the file was tuned on another model, or names a layer that the served one lacks.

        None: what is not known of the served model.
        """
        served = {"num_layers": num_layers, "heads": heads, "top_k": top_k}
        for name, meaning in MODEL_FACTS.items():
            tuned = self.tuned_on.get(name)
            if tuned is not None and served[name] is not None and tuned != served[name]:
                raise ValueError(
                    f"settings file {self.path}: tuned_on.{name}={tuned}, but the served model has {served[name]} "
                    f"({meaning}): tune on this model, or name its own file"
                )
        if num_layers is None:
            return
        for layer in self.values.get("layers", {}):
            if int(layer) >= num_layers:
                raise ValueError(
                    f"settings file {self.path}: layers.{layer} is not there: the served model has layers 0 to "
                    f"{num_layers - 1}"
                )


def read_settings_file(path: str) -> SettingsFile:
    """Raises ValueError naming the file and what is wrong: unreadable, no JSON object, another format or shape."""
    where = f"settings file {path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text in UTF-8: it is damaged, or another file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON, it may be cut off: {error}") from None
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]!r} is there twice in one object: keep one of them") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(content).__name__}")
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise ValueError(f"{where}: format={content.get('format')!r} must be {FORMAT}, the version that this reads")
    tuned_on = content.get("tuned_on", {})
    if not isinstance(tuned_on, dict):
        raise ValueError(f"{where}: tuned_on={tuned_on!r} must be an object")
    if not isinstance(content.get("layers", {}), dict):
        raise ValueError(f"{where}: layers={content['layers']!r} must be an object of layer numbers")
    for name in MODEL_FACTS:
        if tuned_on.get(name) is not None and type(tuned_on[name]) is not int:
            raise ValueError(f"{where}: tuned_on.{name}={tuned_on[name]!r} must be an integer")
    values = {name: value for name, value in content.items() if name not in ("format", "tuned_on")}
    for name in ("settings_file", "runtime_switch"):
        if name in values:
            raise ValueError(f"{where}: {name} cannot be set in a settings file, only outside of it")
    return SettingsFile(path, values, tuned_on)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose equal names Python would keep the last. KeyError for one that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found
