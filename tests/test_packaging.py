"""What pip installs: one version, a base without SGLang, an entry point that SGLang finds."""

import importlib.metadata
import re
from pathlib import Path

import sglang_ext
from sglang_ext.plugin import register

PYPROJECT = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()


def test_one_version():
    assert re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE).group(1) == sglang_ext.__version__


def test_base_install_pulls_neither_sglang_nor_compilers():
    base = re.search(r"^dependencies = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)
    assert re.findall(r'"([a-z]+)', base) == ["torch", "numpy", "tqdm"]


def test_sglang_finds_the_plugin():
    entries = [
        entry for entry in importlib.metadata.entry_points(group="sglang.srt.plugins") if entry.name == "sglang_ext"
    ]
    assert entries, "the package is not installed (scripts/test.sh does): its entry point is missing"
    assert entries[0].load() is register
