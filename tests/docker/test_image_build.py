"""The Dockerfile's COPY and RUN steps, carried out in a virtual environment that has what SGLang's image brings."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.docker.image_files import DOCKER, ROOT, instructions, script

PREFIXES = ("/opt/sglang-ext", "/var/cache/sglang-ext")
# Three kernels of those the image compiles: the rest is the same call (tests/indexer_kernels compiles them all).
SUBSET = ["--heads", "64", "--modes", "hisa"]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A root folder with a virtual environment that sees this one's packages, this package apart."""
    root = tmp_path_factory.mktemp("image")
    python = sysconfig.get_paths(vars={"base": str(root / "venv"), "platbase": str(root / "venv")})
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True)
    shown = root / "shown"
    shown.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("sglang_ext", "__editable__", "pip", "setuptools")):
            (shown / entry.name).symlink_to(entry)
    (Path(python["purelib"]) / "shown.pth").write_text(f"{shown}\n")
    return root


def inside(root, text):
    """Absolute folders of the image, moved below `root`."""
    for prefix in PREFIXES:
        text = text.replace(prefix, f"{root}{prefix}")
    return text


def carry_out(root):
    """Every ENV, COPY and RUN, in order; returns the variables and what the RUN steps printed."""
    path = f"{root / 'venv' / 'bin'}:{os.environ['PATH']}"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    printed = []
    for name, text in instructions():
        words = inside(root, text).split()
        if name == "ENV":
            environ |= dict(word.split("=", 1) for word in words)
        elif name == "COPY":
            copy([ROOT / source for source in words[:-1]], words[-1])
        elif name == "RUN":
            words += SUBSET if words[-1].endswith("precompile.py") else []
            done = subprocess.run(words, cwd=root, env=environ, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"RUN {text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            printed.append(done.stdout)
    return environ, printed


def copy(sources, target):
    """COPY: into the folder where the target ends with a slash, else to that name."""
    for source in sources:
        place = Path(target) / source.name if target.endswith("/") else Path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place)


def test_steps_install_the_package_and_compile_kernels(image):
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    pytest.importorskip("sglang", reason="the sglang extra is not installed")
    environ, (installed, compiled) = carry_out(image)
    assert "installed: sglang 0.5.23, torch " in installed and "sglang-ext 0.1.0" in installed
    assert "tilelang" not in installed.split("installed:")[0], "TileLang was there and must not be installed again"
    assert [line.endswith(": compiled") for line in compiled.splitlines()] == [True] * 14, compiled
    for variable, suffix in (("TILELANG_CACHE_DIR", ".so"), ("TRITON_CACHE_DIR", ".cubin")):
        assert list(Path(environ[variable]).rglob(f"*{suffix}")), f"nothing compiled below {variable}"
    source = Path(inside(image, "/opt/sglang-ext"))
    assert not list(source.glob("build")) + list(source.glob("*.egg-info")), "build folders left in the image"
    # The entry point finds the command that pip installed; EXTRA_ARGS takes the dry run as far as `sglang-ext serve`.
    program = ["python3", inside(image, "/opt/sglang-ext/docker/entrypoint.py"), "--context-length", "8192"]
    trial = environ | {"MODEL_PATH": "org/name", "MODE": "hisa", "EXTRA_ARGS": "--dry-run"}
    done = subprocess.run(program, cwd=image, env=trial, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    server = f"{image / 'venv' / 'bin' / 'python3'} -m sglang.launch_server --model-path org/name"
    assert done.stdout.startswith(f"SGLANG_EXT_MODE=hisa SGLANG_EXT_STRICT=1 {server}")


PYTHON_WITHOUT_TILELANG = """\
#!/bin/sh
case "$1" in
  -c) exit 1 ;;
  -m) shift; echo "$*" >>"$PIP_CALLS" ;;
esac
"""


def test_missing_tilelang_is_installed_as_pinned(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON_WITHOUT_TILELANG)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    variables = os.environ | {"PYTHON": str(python), "PIP_CALLS": str(calls)}
    subprocess.run(["bash", str(DOCKER / "install.sh"), str(ROOT)], env=variables, check=True)
    tilelang, package = calls.read_text().splitlines()
    assert tilelang == "pip install --no-cache-dir tilelang==0.1.12"
    assert package.startswith("pip install --no-cache-dir --no-deps /") and str(ROOT) not in package


def test_install_says_what_is_wrong(tmp_path):
    done = subprocess.run(
        ["bash", str(DOCKER / "install.sh"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"install.sh: error: SOURCE={tmp_path} holds no pyproject.toml\n"


def test_precompile_covers_what_the_kernels_support():
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    from indexer_kernels.gpu.compile_check import GPU_MODES
    from indexer_kernels.gpu.refusals import HEADS

    precompile = script("precompile")
    assert set(precompile.MODES) == set(GPU_MODES) and set(precompile.HEADS) == set(HEADS)


def test_precompile_wants_a_folder_that_stays(monkeypatch, capsys):
    monkeypatch.setenv("TILELANG_CACHE_DIR", "/somewhere")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert script("precompile").main([]) == 2
    assert capsys.readouterr().err.startswith("precompile.py: error: TRITON_CACHE_DIR must name the folder")


def test_precompile_fails_with_the_kernel(monkeypatch, capsys):
    check = pytest.importorskip("indexer_kernels.gpu.compile_check", reason="the gpu extra is not installed")
    outcome = [check.Compiled("block_means 128", None), check.Compiled("block_select", "CompileError: no")]
    monkeypatch.setattr(check, "compile_all", lambda **_: outcome)
    for name in script("precompile").CACHES:
        monkeypatch.setenv(name, "/somewhere")
    assert script("precompile").main(["--heads", "32"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "32 heads, block_select: CompileError: no"
