"""`sglang-ext serve`: its options become variables, everything else reaches SGLang as it was typed."""

import json
import os
import shlex
import sys

import pytest

from sglang_ext.cli import serve
from sglang_ext.cli.main import main
from sglang_ext.cli.model_config import model_config_of, value_of

OVERRIDE = '{"sglang_ext": {"active_heads": 16}}'


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(serve.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)


def dry_run(capsys, *arguments):
    """(environment, command) of a dry run."""
    code = main(["serve", "--dry-run", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    words = shlex.split(out)
    split = words.index(sys.executable)
    return dict(word.split("=", 1) for word in words[:split]), words[split:]


def test_options_become_environment(capsys):
    arguments = ["--mode", "misa_rerank", "--prefill-mode=hisa", "--decode-mode", "native", "--strict"]
    environ, command = dry_run(capsys, *arguments, "--set", "active_heads=16", "--set", "Candidates=4096")
    assert environ == {
        "SGLANG_EXT_MODE": "misa_rerank",
        "SGLANG_EXT_PREFILL_MODE": "hisa",
        "SGLANG_EXT_DECODE_MODE": "native",
        "SGLANG_EXT_STRICT": "1",
        "SGLANG_EXT_ACTIVE_HEADS": "16",
        "SGLANG_EXT_CANDIDATES": "4096",
    }
    assert command == [sys.executable, "-m", "sglang.launch_server"]


def test_other_arguments_pass_verbatim(capsys):
    theirs = [
        "--model-path",
        "some/model",
        "-tp",
        "8",
        "--json-model-override-args",
        OVERRIDE,
        "--port=1",
        "--m",
        "x y",
    ]
    environ, command = dry_run(capsys, *theirs[:4], "--mode", "hisa", *theirs[4:])
    assert environ == {"SGLANG_EXT_MODE": "hisa"}
    assert command == [sys.executable, "-m", "sglang.launch_server", *theirs]


def test_settings_of_the_environment_stay(capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_EXT_ACTIVE_HEADS", "4")
    monkeypatch.setenv("SGLANG_EXT_MODE", "misa")
    environ, _ = dry_run(capsys, "--mode", "hisa")
    assert environ == {"SGLANG_EXT_ACTIVE_HEADS": "4", "SGLANG_EXT_MODE": "hisa"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "mias"], "mias"),
        (["--set", "activ_heads=8"], "SGLANG_EXT_ACTIV_HEADS"),
        (["--set", "active_heads=many"], "many"),
        (["--set", "active_heads"], "write it as KEY=VALUE"),
        (["--mode", "hisa", "--set", "mode=misa"], "mode is already set to hisa"),
        (["--json-model-override-args", "{"], "--json-model-override-args is not JSON"),
        (["--json-model-override-args", "[]"], "must be a JSON object, not list"),
        (["--json-model-override-args", '{"sglang_ext": {"wat": 1}}'], "wat"),
    ],
)
def test_bad_settings_end_before_the_server(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("started a server"))
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("sglang-ext serve: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 1, "mo', "tuned.json is not JSON, it may be cut off"),
        ('{"format": 1, "layers": {"3": {"mode": "mias"}}}', "layers.3.mode='mias' must be one of native"),
        ('{"format": 1, "tuned_on": {"num_layers": 61}}', "tuned_on.num_layers=61, but the served model has 3"),
        ('{"format": 1, "layers": {"3": {"mode": "hisa"}}}', "layers.3 is not there: the served model has layers 0 to"),
    ],
)
def test_a_wrong_settings_file_ends_before_the_server(content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("started a server"))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    (tmp_path / "tuned.json").write_text(content)
    arguments = ["--set", f"settings_file={tmp_path / 'tuned.json'}", "--model-path", str(tmp_path)]
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "override", "message"),
    [
        ("native_layers=0-5", {}, "native_layers: the model has no layer 3, its layers are 0 to 2"),
        ("strict=1", {"layers": {"7": {"mode": "native"}}}, "layers: the model has no layer 7"),
        ("mode=hisa", {"runtime_switch": True}, "set SGLANG_EXT_RUNTIME_SWITCH=1"),
        ("guard_overlap=0.5", {"shadow_rate": 0.1}, "set shadow_rate too"),  # read before the model is
    ],
)
def test_what_the_server_would_refuse_ends_before_it(setting, override, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("started a server"))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    more = ["--json-model-override-args", json.dumps({"sglang_ext": override})]
    assert main(["serve", "--set", setting, "--model-path", str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(("allowed", "code"), [("other", 2), ("other, sglang_ext", 0), ("", 0)])
def test_plugin_whitelist(allowed, code, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    assert main(["serve", "--dry-run"]) == code
    assert ("SGLANG_PLUGINS=other keeps SGLang from loading sglang_ext" in capsys.readouterr().err) == (code == 2)


def test_missing_sglang_is_said(capsys, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "--model-path", "x"]) == 2
    assert "SGLang is not installed here" in capsys.readouterr().err


def test_unregistered_plugin_is_said(capsys, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.importlib.metadata, "entry_points", lambda group: [])
    assert main(["serve", "--model-path", "x"]) == 2
    assert "SGLang cannot see the plugin" in capsys.readouterr().err


def test_replaces_the_process(monkeypatch):
    started = []
    monkeypatch.setattr(serve, "check_installed", lambda: None)
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    main(["serve", "--mode", "hisa", "--model-path", "x"])
    ((program, command, environ),) = started
    assert program == sys.executable and command[1:] == ["-m", "sglang.launch_server", "--model-path", "x"]
    assert environ["SGLANG_EXT_MODE"] == "hisa" and environ["PATH"] == os.environ["PATH"]


def test_model_config_is_the_folders_under_the_override(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"index_topk": 2048, "use_misa": True}))
    assert model_config_of(["--model-path", str(tmp_path)]) == {"index_topk": 2048, "use_misa": True}
    config = model_config_of([f"--model-path={tmp_path}", "--json-model-override-args", '{"use_misa": false}'])
    assert config == {"index_topk": 2048, "use_misa": False}
    assert model_config_of(["--model-path", "deepseek/some-hub-id"]) is None
    assert model_config_of([]) is None


def test_value_of_takes_the_last():
    assert value_of(["--a", "1", "--a=2"], "--a") == "2"
    assert value_of(["--ab", "1", "--a"], "--a") is None
