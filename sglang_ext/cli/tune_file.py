"""What `sglang-ext tune` writes: a settings file that says what it was tuned on."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from indexer_kernels import IndexerParams
from sglang_ext import __version__
from sglang_ext.cli.tune_choice import TUNED, Choice
from sglang_ext.settings import load_settings
from sglang_ext.settings_file import FORMAT


def file_content(
    choices: Sequence[Choice],
    base: IndexerParams,
    num_layers: int,
    starts: Mapping[int, int] | None,
    tuned_on: Mapping[str, Any],
) -> dict[str, Any]:
    """The file. Layers that were not measured, and those where nothing is good enough, are native, each with its
    reason.

    starts: tokens from which on a mode pays, by nominal context; None where costs were not measured: then `auto`'s own
    break-even holds.
    """
    layers: dict[str, Any] = {}
    chosen = {choice.layer: choice for choice in choices}
    for layer in range(num_layers):
        choice = chosen.get(layer)
        if choice is None or choice.option is None:
            why = "no trace shows this layer" if choice is None else choice.why
            layers[str(layer)] = {"prefill_mode": "native", "why": why}
            continue
        own = {name: value for name, value in choice.option.values if name in TUNED}
        start = {} if starts is None else {"prefill_min_tokens": starts[choice.from_context]}
        layers[str(layer)] = {"prefill_mode": choice.option.mode, **own, **start, "why": choice.why}
    # The rest that recall depends on is in the file too: other defaults must not change what was measured.
    shared = {name: value for name, value in asdict(base).items() if name not in ("top_k", *TUNED)}
    return {"format": FORMAT, "tuned_on": dict(tuned_on), "prefill_mode": "auto", **shared, "layers": layers}


def write_settings_file(path: Path, content: Mapping[str, Any]) -> None:
    """Written under its name only once it is whole and loads. Raises ValueError where it does not."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        load_settings(None, {"SGLANG_EXT_SETTINGS_FILE": str(temporary)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def where_and_when() -> dict[str, Any]:
    """SGLang's version, GPU, date, commit of this package (None outside its repository) and command."""
    return {
        "sglang": _sglang_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sglang_ext": __version__,
        "commit": os.environ.get("COMMIT") or _commit(),
        "command": shlex.join(["sglang-ext", *sys.argv[1:]]),
    }


def _sglang_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__)
    try:
        # A package installed inside another project's repository is none of that project's commits.
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
