"""The walls of the project, checked: who may import what, how long a file may be, and what no file may mention."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
PACKAGES = ("indexer_kernels", "sglang_ext")

# Package -> the only files (of the two packages) that may import it, lazily or not.
ALLOWED = {
    "sglang": ("sglang_ext/sglang_*.py",),
    "sgl_kernel": ("sglang_ext/sglang_*.py",),
    "tilelang": (
        "indexer_kernels/gpu/*_kernel.py",
        "indexer_kernels/gpu/target.py",
        "indexer_kernels/gpu/compile_check.py",
    ),
    "triton": ("indexer_kernels/gpu/*_kernel.py", "indexer_kernels/gpu/ahead_of_launch.py"),
    "deep_gemm": ("indexer_kernels/gpu/deep_gemm_logits.py",),
    "sglang_ext": ("sglang_ext/*",),
    "matplotlib": ("sglang_ext/cli/*",),
    "tqdm": ("sglang_ext/cli/*",),
}
# Files whose decisions are pure functions of host values: standard library and their own package only.
PURE = {"sglang_ext/policy.py": ("sglang_ext",), "sglang_ext/settings.py": ("sglang_ext", "indexer_kernels")}
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def tracked_files() -> list[Path]:
    """Files git knows or would add; outside a checkout, every file."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0 and listing.stdout:
        return [path for line in listing.stdout.splitlines() if (path := ROOT / line).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file()]


def python_files(*folders: str) -> list[Path]:
    """Every Python file, or those below the named top folders."""
    found = (path for path in tracked_files() if path.suffix == ".py")
    return sorted(path for path in found if not folders or path.relative_to(ROOT).parts[0] in folders)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in the file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            yield from (
                (node.lineno, str(name.value).split(".")[0]) for name in node.args if isinstance(name, ast.Constant)
            )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    assert len(python_files(*PACKAGES)) > 10


def test_imports_stay_inside_their_walls():
    wrong = [
        f"{name_of(path)}:{line} imports {package}; only {', '.join(ALLOWED[package])} may"
        for path in python_files(*PACKAGES)
        for line, package in imports_of(path)
        if package in ALLOWED and not any(fnmatch(name_of(path), pattern) for pattern in ALLOWED[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_relative_imports():
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_only_the_standard_library(name):
    path = ROOT / name
    foreign = {package for _, package in imports_of(path)} - set(sys.stdlib_module_names) - set(PURE[name])
    assert not foreign, f"{name} imports {sorted(foreign)}"


def test_files_are_short_and_named_by_content():
    long = {
        name_of(path): count for path in python_files() if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines: {long}"
    vague = [name_of(path) for path in python_files() if path.name in FORBIDDEN_NAMES]
    assert not vague, vague


@pytest.mark.parametrize("blocked", ["sglang", "tilelang", "triton", "deep_gemm"])
def test_packages_import_without(blocked):
    """In a fresh process where importing `blocked` fails, everything a laptop uses still imports."""
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {blocked!r} and "torch" not in sys._getframe(1).f_globals.get("__name__", ""):
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
import indexer_kernels, indexer_kernels.select, indexer_kernels.stage, indexer_kernels.synthetic
import sglang_ext.settings, sglang_ext.policy, sglang_ext.plugin, sglang_ext.cli.main
assert {blocked!r} not in sys.modules, {blocked!r}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Spelled in pieces, so that this file does not contain them.
MACHINE_PATHS = re.compile("|".join(["/wo" + "rk/", "/tmp/con" + "tract", "/ro" + "ot/", r"\.\./sha" + "red"]))


def test_no_machine_paths_or_stray_blanks_in_text_files():
    wrong = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [f"{name_of(path)}:{n}" for n, line in enumerate(text.splitlines(), 1) if MACHINE_PATHS.search(line)]
    assert not wrong, wrong


def test_every_package_folder_is_a_package():
    missing = {name_of(path.parent) for path in python_files(*PACKAGES) if not (path.parent / "__init__.py").exists()}
    assert not missing, f"no __init__.py in {sorted(missing)}"
