"""`sglang-ext doctor`: what this machine has, what is wrong with it, and what would run per phase."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_ext.cli import doctor_checks
from sglang_ext.cli.doctor_checks import Check
from sglang_ext.cli.model_config import read_model_config, settings_in_force
from sglang_ext.settings import Settings


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check GPU, SGLang, hooks and kernels; say what would run and why",
        description="Check this machine and say what would run. Exit code 0: no problem, 1: a problem, 2: bad usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", type=Path, metavar="FOLDER", help="read this model's config.json too")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--skip-kernels", action="store_true", help="do not compile the kernels (it takes a minute)")


def run(args: argparse.Namespace) -> int:
    """Runs all checks; findings are printed as they come, so that a slow compilation is seen to be one."""
    config = None
    if args.model_path is not None and (config := read_model_config(args.model_path)) is None:
        raise ValueError(f"--model-path {args.model_path} has no config.json")
    settings, settings_check = read_settings(config)
    checks: list[Check] = []
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # compilers print; stdout is for the findings
        for check in all_checks(args, settings_check, settings, config):
            checks.append(check)
            if not args.json:
                print(f"{check.status:8} {check.name}: {check.detail}", file=stdout, flush=True)
    problems = sum(check.status == "problem" for check in checks)
    if args.json:
        content: dict[str, Any] = {"checks": [check._asdict() for check in checks], "problems": problems}
        content["settings"] = settings.as_dict() if settings else None
        print(json.dumps(content, indent=1))
    else:
        print(f"problems: {problems}" if problems else "no problems")
    return 1 if problems else 0


def read_settings(config: dict[str, Any] | None) -> tuple[Settings | None, Check]:
    """The settings in force (defaults < model config < environment), or None with what is wrong with them."""
    try:
        settings = settings_in_force(config, os.environ)
    except (ValueError, TypeError) as error:
        return None, Check("settings", "problem", str(error))
    default = Settings()
    changed = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != getattr(default, field.name) and field.name != "layers"
    }
    shown = ", ".join(f"{name}={value}" for name, value in changed.items())
    return settings, Check("settings", "ok", shown or "all defaults")


def all_checks(
    args: argparse.Namespace, settings_check: Check, settings: Settings | None, config: dict[str, Any] | None
) -> Iterator[Check]:
    """Every finding, cheap ones first. config: the model's, where one was named."""
    model = doctor_checks.model_of(config)
    yield doctor_checks.check_torch()
    yield doctor_checks.check_gpu()
    yield doctor_checks.check_sglang()
    if config is not None:
        yield doctor_checks.check_model(config)
    yield settings_check
    yield doctor_checks.check_hooks(settings is not None and settings.runtime_switch)
    if settings is None:
        return
    for phase in ("prefill", "decode"):
        yield doctor_checks.check_phase(phase, settings, model)
    if settings.layers:
        yield doctor_checks.check_layers(settings, model)
    if args.skip_kernels:
        yield Check("kernels", "skipped", "--skip-kernels")
    else:
        yield from doctor_checks.check_kernels(settings.params(min(model.top_k, 2048)), model.heads)
