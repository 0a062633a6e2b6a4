"""The model config as SGLang will see it: a model folder's config.json under --json-model-override-args."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_ext.settings import Settings
from sglang_ext.settings_file import read_settings_file


def model_config_of(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Config of the server arguments; None where they name no model folder on this machine and override nothing.

    A model named by hub id is not looked up. Raises ValueError for JSON that does not parse.
    """
    folder = value_of(arguments, "--model-path") or value_of(arguments, "--model")
    config = read_model_config(Path(folder)) if folder else None
    override = value_of(arguments, "--json-model-override-args")
    if override is None:
        return config
    parsed = _parse(override, "--json-model-override-args")
    return {**(config or {}), **parsed}


def read_model_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a model folder, or None where there is none."""
    path = folder / "config.json"
    return _parse(path.read_text(), str(path)) if path.is_file() else None


def check_tuned_on(settings: Settings, config: Mapping[str, Any] | None) -> None:
    """Raises ValueError where the settings' file does not belong to the model of this config."""
    if settings.settings_file is not None and config:
        facts = (config.get(name) for name in ("num_hidden_layers", "index_n_heads", "index_topk"))
        read_settings_file(settings.settings_file).check_model(*facts)


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """Value of `--option value` or `--option=value`, the last one given, or None."""
    value = None
    for number, argument in enumerate(arguments):
        if argument == option and number + 1 < len(arguments):
            value = arguments[number + 1]
        elif argument.startswith(option + "="):
            value = argument[len(option) + 1 :]
    return value


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source} must be a JSON object, not {type(parsed).__name__}")
    return parsed
