"""Entry point of the plugin: SGLang calls `register` in each of its processes before it starts."""

import logging
import os

from sglang_ext.settings import load_settings

logger = logging.getLogger("sglang_ext")


def register() -> None:
    """Install every hook, or none.

    A wrong setting always ends the process: a user asked for something that cannot be honoured. An SGLang that does
    not fit ends it under strict; otherwise one ERROR line says that SGLang's own indexer runs. (SGLang swallows any
    other exception of a plugin and would serve on.)
    """
    try:
        settings = load_settings(None, os.environ)
    except ValueError as error:
        raise SystemExit(f"sglang-ext: {error}") from None
    try:
        from sglang_ext import sglang_hooks
        from sglang_ext.stage import Stage

        problems = sglang_hooks.verify(settings.runtime_switch)
    except Exception as error:
        # Whatever SGLang's modules and their libraries raise as they are imported: SGLang would log it and serve on.
        problems = [f"cannot be imported here: {type(error).__name__}: {error}"]
    if problems:
        if settings.strict:
            raise SystemExit(f"sglang-ext (strict): {'; '.join(problems)}")
        logger.error("inactive, SGLang's own indexer runs: %s", "; ".join(problems))
        return
    sglang_hooks.install(Stage(settings, dict(os.environ), sglang_hooks.sglang_top_k))
