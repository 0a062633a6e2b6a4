"""The entry point: settings errors, strict, all hooks or none, and the real loader of SGLang."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sglang_ext import plugin

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SGLANG_EXT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def hooks(monkeypatch):
    """In place of sglang_hooks: `problems` is what verify answers, `installed` what install was given."""
    fake = ModuleType("sglang_ext.sglang_hooks")
    fake.problems, fake.installed, fake.sglang_top_k = [], [], None
    fake.verify = lambda runtime_switch: list(fake.problems)
    fake.install = fake.installed.append
    monkeypatch.setitem(sys.modules, "sglang_ext.sglang_hooks", fake)
    monkeypatch.setattr("sglang_ext.sglang_hooks", fake, raising=False)
    return fake


@pytest.mark.parametrize("strict", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SGLANG_EXT_MODE", "mias", "mode='mias' must be one of native, misa"),
        ("SGLANG_EXT_MOD", "misa", "unknown setting SGLANG_EXT_MOD (did you mean mode?)"),
        ("SGLANG_EXT_TOP_BLOCKS", "3", "top_blocks=3"),
        ("SGLANG_EXT_SETTINGS_FILE", "/nowhere/tuned.json", "settings file /nowhere/tuned.json cannot be read"),
        ("SGLANG_EXT_SETTINGS_FILE", __file__, f"settings file {__file__} is not JSON"),
    ],
)
def test_a_wrong_setting_always_ends_the_process(monkeypatch, hooks, strict, name, value, said):
    monkeypatch.setenv("SGLANG_EXT_STRICT", strict)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        plugin.register()
    assert str(ended.value).startswith("sglang-ext: ") and said in str(ended.value)
    assert hooks.installed == []


def test_problems_end_the_process_under_strict(monkeypatch, hooks):
    monkeypatch.setenv("SGLANG_EXT_STRICT", "1")
    hooks.problems = ["x is not there", "y has other parameters"]
    with pytest.raises(SystemExit) as ended:
        plugin.register()
    assert str(ended.value) == "sglang-ext (strict): x is not there; y has other parameters"
    assert hooks.installed == []


def test_problems_are_one_error_line_otherwise(hooks, caplog):
    hooks.problems = ["x is not there"]
    with caplog.at_level(logging.INFO, "sglang_ext"):
        plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "inactive, SGLang's own indexer runs: x is not there"
    assert hooks.installed == []


def test_the_hooks_are_installed_with_the_settings(monkeypatch, hooks, caplog):
    """Without a word: SGLang has not set up its log yet."""
    monkeypatch.setenv("SGLANG_EXT_MODE", "hisa")
    with caplog.at_level(logging.INFO, "sglang_ext"):
        plugin.register()
    (stage,) = hooks.installed
    assert stage.settings.mode == "hisa" and not caplog.records


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_that_cannot_be_imported(monkeypatch, caplog, strict):
    """SGLang would log an ImportError of a plugin and serve on."""
    monkeypatch.setenv("SGLANG_EXT_STRICT", str(int(strict)))
    monkeypatch.setitem(sys.modules, "sglang_ext.sglang_hooks", None)
    monkeypatch.delattr("sglang_ext.sglang_hooks", raising=False)
    if strict:
        with pytest.raises(SystemExit, match="strict.*cannot be imported"):
            plugin.register()
        return
    plugin.register()
    assert "inactive" in caplog.records[0].getMessage()


@pytest.mark.parametrize("strict", [False, True])
def test_an_import_that_fails_otherwise(monkeypatch, hooks, caplog, strict):
    """As of a library of CUDA that is not there, or of an SGLang that lost a name: no ImportError."""
    monkeypatch.setenv("SGLANG_EXT_STRICT", str(int(strict)))

    def verify(_runtime_switch: bool) -> list[str]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    hooks.verify = verify
    if strict:
        with pytest.raises(SystemExit, match="strict.*OSError: libcudart"):
            plugin.register()
    else:
        plugin.register()
        assert "inactive" in caplog.records[0].getMessage()
    assert hooks.installed == []


LOAD = """
import importlib.metadata, logging, sys
logging.basicConfig(level=logging.INFO)
from sglang.srt import plugins
plugins.entry_points = lambda group: [
    importlib.metadata.EntryPoint("sglang_ext", "sglang_ext.plugin:register", group)
] if group == "sglang.srt.plugins" else []
if sys.argv[1] == "changed":
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    Indexer._get_topk_paged = lambda self, forward_batch, q: None
plugins.load_plugins()
print("patched", len(plugins.HookRegistry._patched))
"""


@pytest.mark.parametrize(
    ("sglang", "strict", "code", "patched", "said"),
    [
        ("as_installed", "1", 0, "patched 14", "Executed general plugin: sglang_ext"),
        ("changed", "1", 1, "", "sglang-ext (strict): "),
        ("changed", "0", 0, "patched 0", "inactive, SGLang's own indexer runs: "),
    ],
)
def test_sglangs_real_loader(sglang, strict, code, patched, said):
    pytest.importorskip("sglang", reason="the sglang extra is not installed")
    environ = {**os.environ, "SGLANG_EXT_STRICT": strict, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, sglang], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert said in done.stderr and (patched in done.stdout if patched else "patched" not in done.stdout)
    if sglang == "changed":
        assert "Indexer._get_topk_paged has parameters ('self', 'forward_batch', 'q')" in done.stderr
