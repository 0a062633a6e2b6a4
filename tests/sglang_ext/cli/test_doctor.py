"""`sglang-ext doctor`: exit codes and wording, with the machine replaced by what each case needs."""

import json
import os
import sys

import pytest
import torch

from sglang_ext.cli import doctor_checks
from sglang_ext.cli.doctor_checks import Check, Model, check_gpu, check_hooks, check_kernels, check_phase, model_of
from sglang_ext.cli.main import main
from sglang_ext.settings import Settings

GOOD = Check("stub", "ok", "fine")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SGLANG_EXT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which every check is content."""
    for name in ("check_gpu", "check_sglang", "check_hooks"):
        monkeypatch.setattr(doctor_checks, name, lambda *_: GOOD)
    monkeypatch.setattr(doctor_checks, "check_kernels", lambda params, heads: iter([GOOD]))


def findings(capsys, *arguments):
    code = main(["doctor", "--json", *arguments])
    content = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for check in content["checks"]}, content


def test_healthy_machine(healthy, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no problems" in out and "all defaults" in out and "problem " not in out


def test_phases_and_reasons_are_shown(healthy, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_EXT_PREFILL_MODE", "misa_rerank")
    code, checks, content = findings(capsys)
    assert code == 0 and content["settings"]["prefill_mode"] == "misa_rerank"
    shown = {name: check["detail"] for name, check in checks.items() if name.startswith("would run")}
    assert any("prefill" in name and "misa_rerank" in detail for name, detail in shown.items()), shown
    assert any("decode" in name for name in shown), shown
    assert checks["settings"]["detail"] == "prefill_mode=misa_rerank"


@pytest.mark.parametrize("broken", ["check_gpu", "check_sglang", "check_hooks"])
def test_any_problem_is_exit_code_1(healthy, broken, capsys, monkeypatch):
    monkeypatch.setattr(doctor_checks, broken, lambda *_: Check("stub", "problem", "broken"))
    assert main(["doctor"]) == 1
    assert "problems: 1" in capsys.readouterr().out


def test_kernel_errors_are_a_problem(healthy, capsys, monkeypatch):
    monkeypatch.setattr(
        doctor_checks, "check_kernels", lambda *_: iter([GOOD, Check("kernel x", "problem", "spilled")])
    )
    assert main(["doctor"]) == 1
    assert main(["doctor", "--skip-kernels"]) == 0


def test_bad_settings_are_a_problem(healthy, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_EXT_MODE", "mias")
    code, checks, content = findings(capsys)
    assert code == 1 and content["settings"] is None
    assert checks["settings"]["status"] == "problem" and "mias" in checks["settings"]["detail"]


def test_settings_of_the_model_config(healthy, tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"sglang_ext": {"mode": "hisa"}, "index_n_heads": 32, "index_topk": 2048})
    )
    code, checks, content = findings(capsys, "--model-path", str(tmp_path))
    assert code == 0 and content["settings"]["mode"] == "hisa"


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A settings file in force, and the folder of a model that it fits."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "index_n_heads": 64}))
    content = {"format": 1, "tuned_on": {"num_layers": 3, "heads": 64}}
    content["layers"] = {"0": {"mode": "native"}, "2": {"prefill_mode": "hisa"}, "1": {"active_heads": 5}}

    def make(**changes):
        (tmp_path / "tuned.json").write_text(json.dumps(content | changes))
        monkeypatch.setenv("SGLANG_EXT_SETTINGS_FILE", str(tmp_path / "tuned.json"))
        return tmp_path

    return make


def test_layers_of_a_settings_file(healthy, tuned, capsys):
    pytest.importorskip("tilelang")
    folder = tuned()
    code, checks, _ = findings(capsys, "--model-path", str(folder))
    assert code == 1 and "layers=" not in checks["settings"]["detail"]
    assert checks["layers"]["detail"].split("; ") == [
        "prefill/decode of layers with settings of their own: 0: native/native, 1: misa_rerank/native, 2: hisa/native",
        "layer 1, misa_rerank: active_heads=5, kernels are built for 4, 8 and 16",
    ]


def test_what_a_layers_decode_runs_beside_its_mode(healthy, tuned, capsys):
    """misa_rerank in decode chooses blocks as hisa does; the server asks for the kernels of both."""
    pytest.importorskip("tilelang")
    folder = tuned(layers={"1": {"prefill_mode": "native", "decode_mode": "misa_rerank", "block_size": 96}})
    code, checks, _ = findings(capsys, "--model-path", str(folder))
    assert "layer 1, hisa: block_size=96 is not a multiple of 64" in checks["layers"]["detail"]
    assert checks["layers"]["status"] == "problem"


def test_a_settings_file_of_another_model(healthy, tuned, capsys):
    folder = tuned(tuned_on={"num_layers": 61})
    code, checks, _ = findings(capsys, "--model-path", str(folder))
    assert code == 1 and "tuned_on.num_layers=61, but the served model has 3" in checks["settings"]["detail"]
    code, checks, _ = findings(capsys, "--skip-kernels")
    assert checks["settings"]["status"] == "ok", "without a model there is nothing to compare"


@pytest.mark.parametrize(
    ("config", "status", "detail"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "problem", "no indexer of DeepSeek sparse attention"),
        ({"index_topk": 2048, "index_head_dim": 64}, "problem", "head dim is not 128 (index_head_dim=64)"),
        ({"index_topk": 2048, "index_head_dim": 128}, "ok", "index_topk=2048"),
        ({"text_config": {"index_topk": 1024}}, "ok", "index_topk=1024"),
    ],
)
def test_a_model_that_the_plugin_does_not_serve(healthy, config, status, detail, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, checks, _ = findings(capsys, "--model-path", str(tmp_path))
    assert checks["model"]["status"] == status and detail in checks["model"]["detail"]
    assert code == (status == "problem")


def test_layers_that_the_model_lacks(healthy, tuned, capsys, monkeypatch):
    folder = tuned(layers={})
    monkeypatch.setenv("SGLANG_EXT_NATIVE_LAYERS", "0,3")
    code, checks, _ = findings(capsys, "--model-path", str(folder))
    assert code == 1 and "native_layers: the model has no layer 3" in checks["settings"]["detail"]


def test_missing_model_config_is_a_user_error(tmp_path, capsys):
    assert main(["doctor", "--model-path", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sglang-ext doctor: error: --model-path {tmp_path} has no config.json\n"


@pytest.mark.parametrize(
    ("capability", "status"), [((9, 0), "ok"), ((8, 0), "problem"), ((10, 0), "problem"), (None, "problem")]
)
def test_gpu(capability, status, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    check = check_gpu()
    assert check.status == status
    assert "Card" in check.detail if capability else "no CUDA device" in check.detail


def test_hooks_of_the_installed_sglang():
    pytest.importorskip("sglang", reason="the sglang extra is not installed")
    assert check_hooks().status == "ok"


def test_without_sglang_hooks_are_skipped(monkeypatch):
    monkeypatch.setattr(doctor_checks.importlib.util, "find_spec", lambda name: None)
    assert check_hooks().status == "skipped"
    (kernels,) = check_kernels(None, 64)
    assert kernels.status == "skipped" and "TileLang is not installed" in kernels.detail


def test_a_library_that_cannot_be_loaded_is_a_problem(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "sglang_ext.sglang_hooks":
                raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "sglang_ext.sglang_hooks", raising=False)
    monkeypatch.delattr("sglang_ext.sglang_hooks", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(doctor_checks.importlib.util, "find_spec", lambda name: object())
    hooks = check_hooks()
    assert hooks.status == "problem" and "OSError: libcudart.so.13" in hooks.detail


def test_kernels_need_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor_checks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda name: None)
    (kernels,) = check_kernels(None, 64)
    assert kernels.status == "skipped" and "nvcc" in kernels.detail


def test_shape_comes_from_the_model():
    assert model_of({"index_n_heads": 32, "index_topk": 1024}) == Model(32, 1024)
    assert model_of({}) == model_of(None) == Model(64, 2048)


@pytest.mark.parametrize("value", [None, "64", 64.5])
def test_a_shape_that_is_no_number_is_one_line(healthy, value, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"index_n_heads": value}))
    assert main(["doctor", "--model-path", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"index_n_heads={value!r} must be an integer" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "phase", "shown"),
    [
        (
            {},
            "prefill",
            "8K: native (below_break_even), 32K: native (below_break_even), 128K: misa_rerank (auto_selected)",
        ),
        ({"candidate_unit": "page"}, "prefill", "8K: native (page_candidates), 32K: native (page_candidates), 128K"),
        ({"mode": "misa_rerank"}, "prefill", "128K: misa_rerank (configured)"),
        ({}, "decode", "1 rows: native (auto_decode_native), 8 rows: native (auto_decode_native), 64 rows: native"),
        ({"decode_mode": "hisa"}, "decode", "1 rows: hisa (configured)"),
        ({"decode_mode": "hisa"}, "decode", "256 rows: hisa (configured) - decode chooses whole blocks of tokens"),
        ({"decode_tokens": 65536}, "decode", "256 rows: hisa (auto_selected) - decode chooses whole blocks of tokens"),
        ({"mode": "misa_rerank", "decode_mode": "hisa"}, "decode", "1 rows: hisa (configured)"),
        (
            {"mode": "misa_rerank"},
            "decode",
            "256 rows: native (auto_decode_native) - mode=misa_rerank is prefill's, a mode of decode is named by",
        ),
        ({"mode": "native"}, "decode", "1 rows: native (configured_native)"),
        (
            {"decode_tokens": 20000},
            "decode",
            "1 rows: native (below_break_even), 8 rows: native (below_break_even), 64 rows: hisa (auto_selected), 256",
        ),
        ({"mode": "native"}, "prefill", "128K: native (configured_native)"),
    ],
)
def test_phase_follows_the_policy(settings, phase, shown):
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    check = check_phase(phase, Settings(**settings), Model(64, 2048))
    assert check.status == "ok" and shown in check.detail


@pytest.mark.parametrize(
    ("settings", "model", "why"),
    [
        ({"mode": "group_rerank", "group": 3}, Model(64, 2048), "group=3"),
        ({"mode": "hisa"}, Model(16, 2048), "16 indexer heads"),
        ({"mode": "misa", "active_heads": 5}, Model(64, 2048), "active_heads=5"),
        ({"mode": "misa"}, Model(64, 4096), "index_topk=4096"),
    ],
)
def test_a_mode_without_kernels_is_a_problem(settings, model, why):
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    check = check_phase("prefill", Settings(**settings), model)
    assert check.status == "problem" and why in check.detail and "native (no_kernel)" in check.detail
