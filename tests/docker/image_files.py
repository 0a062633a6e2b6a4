"""The files of docker/, read: Dockerfile instructions, versions, YAML, the two scripts as modules, the linters."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"
# What belongs to the repository; settings.env is a user's own.
FILES = sorted(path for path in DOCKER.iterdir() if path.is_file() and path.name != "settings.env")


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile without its comments."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = filter(str.strip, re.sub(r"\\\n\s*", "", text).splitlines())
    return [Instruction(*line.split(maxsplit=1)) for line in lines]


def texts_of(name: str) -> list[str]:
    """What follows each instruction of that name, in order."""
    return [instruction.text for instruction in instructions() if instruction.name == name]


def build_arguments() -> dict[str, str]:
    """ARG name -> default."""
    return dict(text.split("=", 1) for text in texts_of("ARG"))


def versions() -> dict[str, str]:
    """docker/versions.env."""
    lines = (DOCKER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def script(name: str) -> ModuleType:
    """A script of docker/ as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A tool of the test extra, run in the repository; skips the test where it is not installed."""
    tool = Path(sys.executable).parent / name
    if not tool.is_file():
        pytest.skip(f"{name} is not installed in this environment (pip install '.[test]')")
    command = [str(tool), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
