"""`sglang-ext serve`: starts SGLang's server with the plugin on; every argument not ours goes through verbatim."""

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from sglang_ext.cli.model_config import model_config_of, settings_in_force

PREFIX = "SGLANG_EXT_"
PLUGIN = "sglang_ext"
GROUP = "sglang.srt.plugins"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `serve`; its own options become SGLANG_EXT_* variables."""
    parser = commands.add_parser(
        "serve",
        help="start SGLang's server with the plugin on",
        description="Start SGLang's server with the plugin on. Every other argument is passed to it as it is.",
        usage="sglang-ext serve [--mode MODE] [--prefill-mode MODE] [--decode-mode MODE] [--strict] [--set KEY=VALUE] "
        "[--dry-run] --model-path PATH [arguments of sglang.launch_server]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode",
        help="mode of prefill, and native for both phases if it is native: native, misa, misa_rerank, hisa, "
        "group_rerank, auto",
    )
    parser.add_argument("--prefill-mode", metavar="MODE", help="overrides --mode for prefill")
    parser.add_argument(
        "--decode-mode", metavar="MODE", help="mode of decode; without it native with --mode native, else auto"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end the server where the plugin cannot run, never fall back"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print the variables and the command, start nothing")


def run(args: argparse.Namespace, passed_on: Sequence[str]) -> int:
    """Checks what can be checked before a server starts, then replaces this process by the server."""
    settings = settings_of(args)
    environ = {**os.environ, **settings}
    check_whitelist(environ)
    settings_in_force(model_config_of(passed_on), environ)  # a typo ends here, not after a model has loaded
    command = [sys.executable, "-m", "sglang.launch_server", *passed_on]
    if args.dry_run:
        ours = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX)}
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in ours.items()), shlex.join(command)]))
        return 0
    check_installed()
    sys.stdout.flush()
    os.execve(sys.executable, command, environ)


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """The command line as SGLANG_EXT_* variables. Raises ValueError for a --set that is malformed or a repetition."""
    settings: dict[str, str] = {}
    for name in ("mode", "prefill_mode", "decode_mode"):
        if (value := getattr(args, name)) is not None:
            settings[PREFIX + name.upper()] = value
    if args.strict:
        settings[PREFIX + "STRICT"] = "1"
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--set {item}: write it as KEY=VALUE, for example --set active_heads=16")
        name = PREFIX + key.upper()
        if name in settings:
            raise ValueError(f"--set {item}: {key.lower()} is already set to {settings[name]}")
        settings[name] = value
    return settings


def check_whitelist(environ: Mapping[str, str]) -> None:
    """SGLang loads only the plugins named in SGLANG_PLUGINS, if that is set. Raises ValueError if we are not."""
    allowed = [name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and PLUGIN not in allowed:
        raise ValueError(f"SGLANG_PLUGINS={environ['SGLANG_PLUGINS']} keeps SGLang from loading {PLUGIN}; add it there")


def check_installed() -> None:
    """Raises ValueError where SGLang is missing, or would not find the plugin."""
    if importlib.util.find_spec("sglang") is None:
        raise ValueError("SGLang is not installed here: pip install 'sglang-ext[sglang,gpu]'")
    if not any(entry.name == PLUGIN for entry in importlib.metadata.entry_points(group=GROUP)):
        raise ValueError("SGLang cannot see the plugin: install this package (pip install -e .), not only its path")
