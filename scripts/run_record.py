"""What a result needs to be repeated: commit, command, machine, versions."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone

PACKAGES = ("torch", "triton", "tilelang", "sglang", "sgl-deep-gemm", "sglang-kernel", "flashinfer-python")


def run_record() -> dict:
    """Commit (from git, or COMMIT in the environment where the tree travels without it), command line, GPU and
    versions.
    """
    return {
        "commit": os.environ.get("COMMIT") or git_commit(),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "gpu": gpu_name(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
    }


def git_commit() -> str | None:
    """HEAD of these scripts' repository, whatever the working directory is, with `+` where tracked files differ from
    it; None outside a repository.
    """
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def gpu_name() -> str | None:
    """Name and driver of each GPU that this process may use."""
    lines = ask_gpus("name,driver_version")
    return None if lines is None else "; ".join(lines)


def ask_gpus(fields: str) -> list[str] | None:
    """nvidia-smi's answer, a line for each GPU in CUDA_VISIBLE_DEVICES, for all where that is empty; None if none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={chosen}")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
