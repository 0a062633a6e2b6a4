"""The model config as SGLang will see it: a model folder's config.json under --json-model-override-args."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_ext.model_settings import settings_of_model
from sglang_ext.settings import Settings, load_settings


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


def settings_in_force(config: Mapping[str, Any] | None, environ: Mapping[str, str]) -> Settings:
    """The settings of a server with these variables and, where it is known, this model config.

    Raises ValueError for what the server would end on, in its two steps: the variables alone, then with the config.
    """
    settings = load_settings(None, environ)
    if not config:
        return settings
    shape: list[Any] = [config.get(name) for name in ("index_n_heads", "index_topk")]  # None: not compared
    return settings_of_model(settings, config, environ, *shape)


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
