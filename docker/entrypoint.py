"""Entry point of the image: turns its variables into one `sglang-ext serve` command and becomes that command.

Standard library only: a typo ends the container at once, not after torch has been imported. SGLANG_EXT_* variables stay
as they are, empty ones are dropped; `sglang-ext serve` reads them and refuses unknown ones.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SETTINGS = "SGLANG_EXT_"
MODES = ("native", "misa", "misa_rerank", "hisa", "group_rerank", "auto")  # those of sglang_ext/settings.py
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Variable -> the arguments that say the same. The first one is what the variable is turned into.
OPTIONS = {
    "MODEL_PATH": ("--model-path", "--model"),
    "HOST": ("--host",),
    "PORT": ("--port",),
    "TP": ("--tp-size", "--tensor-parallel-size", "--tp", "-tp"),
    "MODE": ("--mode",),
    "PREFILL_MODE": ("--prefill-mode",),
    "DECODE_MODE": ("--decode-mode",),
    "STRICT": ("--strict",),
    "ENABLE_METRICS": ("--enable-metrics",),
}
SETTING_VARIABLES = ("MODE", "PREFILL_MODE", "DECODE_MODE", "STRICT")  # those that a SGLANG_EXT_* variable also sets
VARIABLES = (*OPTIONS, "EXTRA_ARGS", "DRY_RUN")
DEFAULTS = {"HOST": "0.0.0.0", "PORT": "30000", "STRICT": "1"}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Becomes the server. Returns 0 after a dry run, 2 after a wrong variable, 127 where the package is missing."""
    # Compose and a ConfigMap can hardly leave a variable out; to the settings an empty number would be a wrong one.
    environ = {name: value for name, value in environ.items() if value.strip() or not name.startswith(SETTINGS)}
    try:
        command = command_of(environ, [argument for argument in argv if argument != "--dry-run"])
        dry_run = "--dry-run" in argv or flag("DRY_RUN", environ.get("DRY_RUN", ""))
    except ValueError as error:
        print(f"entrypoint: error: {error}", file=sys.stderr)
        return 2
    if dry_run:
        ours = [f"{name}={shlex.quote(value)}" for name, value in sorted(environ.items()) if name.startswith(SETTINGS)]
        print(" ".join([*ours, shlex.join(command)]))
        return 0
    return become(command, environ)


def command_of(environ: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """The command for these variables, `arguments` (those after the image's name) last. An empty variable is unset.

    Raises ValueError naming the variable, its value and what is allowed.
    """
    passed_on = [*extra_arguments(environ.get("EXTRA_ARGS", "")), *arguments]
    command = ["sglang-ext", "serve"]
    for variable in OPTIONS:
        value = value_of(variable, environ, passed_on)
        if value is not None:
            command += words_of(variable, value)
    return command + passed_on


def value_of(variable: str, environ: Mapping[str, str], passed_on: Sequence[str]) -> str | None:
    """The variable or its default; None where neither is set, or where an argument or SGLANG_EXT_* variable says it."""
    value = environ.get(variable, "").strip()
    elsewhere = said_elsewhere(variable, environ, passed_on)
    if variable == "PORT" and elsewhere:
        raise ValueError(f"{elsewhere} is given as an argument; set PORT instead, the health check reads it too")
    if value and elsewhere:
        raise ValueError(f"{variable}={value} and {elsewhere} say the same thing; give one of them")
    if variable == "MODEL_PATH" and not value and not elsewhere:
        raise ValueError("MODEL_PATH is not set; it must be a model folder, or a hub id such as org/name")
    return None if elsewhere else value or DEFAULTS.get(variable)


def said_elsewhere(variable: str, environ: Mapping[str, str], passed_on: Sequence[str]) -> str | None:
    """The argument, or the SGLANG_EXT_* variable, that says what `variable` says."""
    for argument in passed_on:
        name = argument.partition("=")[0]
        if name in OPTIONS[variable]:
            return name
    setting = SETTINGS + variable
    return f"{setting}={environ[setting]}" if variable in SETTING_VARIABLES and setting in environ else None


def words_of(variable: str, value: str) -> list[str]:
    """`value`, checked, as words of the command line."""
    option = OPTIONS[variable][0]
    if variable in ("STRICT", "ENABLE_METRICS"):
        return [option] if flag(variable, value) else []
    if variable == "MODEL_PATH":
        check_model(value)
    elif variable == "PORT":
        check_number(variable, value, 1, 65535)
    elif variable == "TP":
        check_number(variable, value, 1, 1024)
    elif variable.endswith("MODE"):
        value = value.lower()
        if value not in MODES:
            raise ValueError(f"{variable}={value} must be one of {', '.join(MODES)}")
    return [option, value]


def check_model(model: str) -> None:
    """Raises ValueError for what is neither there nor a hub id; an unmounted volume is an empty folder."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"MODEL_PATH={model} is a folder without config.json; is the model's volume mounted there?")
    if not path.exists() and not HUB_ID.fullmatch(model):
        raise ValueError(f"MODEL_PATH={model} does not exist; it must be a model folder, or a hub id such as org/name")


def check_number(variable: str, value: str, lowest: int, highest: int) -> None:
    """Raises ValueError for anything but a plain number in the range."""
    if not re.fullmatch("[0-9]{1,9}", value) or not lowest <= int(value) <= highest:
        raise ValueError(f"{variable}={value} must be a number from {lowest} to {highest}")


def flag(variable: str, value: str) -> bool:
    """A switch, spelled as the settings spell theirs; empty is off."""
    text = value.strip().lower()
    if text not in (*TRUE, *FALSE, ""):
        raise ValueError(f"{variable}={value} must be one of {', '.join((*TRUE, *FALSE))}")
    return text in TRUE


def extra_arguments(text: str) -> list[str]:
    """EXTRA_ARGS, split as a shell splits it; nothing is expanded."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"EXTRA_ARGS={text} cannot be split into arguments: {error}") from None


def become(command: list[str], environ: Mapping[str, str]) -> int:
    """Replaces this process, so that the container's signals reach the server; returns only where that fails."""
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environ)
    except FileNotFoundError:
        print(f"entrypoint: error: {command[0]} is not installed in this image", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
