"""What the served model says of the settings: its config's own, and whether a settings file was made for it."""

import logging
from collections.abc import Mapping
from typing import Any

from sglang_ext.settings import Settings, load_settings
from sglang_ext.settings_file import read_settings_file

logger = logging.getLogger("sglang_ext")


def settings_of_model(
    so_far: Settings, model_config: Mapping[str, Any], environ: Mapping[str, str], num_heads: int, top_k: int
) -> Settings:
    """The settings with the model config's among their sources; `so_far` itself where they are the same.

    Raises ValueError for a wrong setting, a settings file of another model, a layer that the model lacks, or what must
    be known before the model is.
    """
    settings = load_settings(model_config, environ)
    if settings.settings_file is not None:
        file = read_settings_file(settings.settings_file)
        file.check_model(model_config.get("num_hidden_layers"), num_heads, top_k)
        logger.info("settings file %s, tuned on %s", file.path, dict(file.tuned_on) or "nothing: made by hand")
    _check_layers(settings, model_config.get("num_hidden_layers"))
    if settings.runtime_switch and not so_far.runtime_switch:
        raise ValueError("runtime_switch is read before the model is: set SGLANG_EXT_RUNTIME_SWITCH=1")
    return so_far if settings == so_far else settings


def _check_layers(settings: Settings, num_layers: object) -> None:
    """A number that no layer has would be left out without a word, and another layer run what it was not asked to."""
    if not isinstance(num_layers, int):
        return
    for name, numbers in (
        ("native_layers", settings.native_layers),
        ("layers", [number for number, _ in settings.layers]),
    ):
        beyond = [number for number in numbers if number >= num_layers]
        if beyond:
            raise ValueError(f"{name}: the model has no layer {beyond[0]}, its layers are 0 to {num_layers - 1}")
