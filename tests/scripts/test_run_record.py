"""A record names the GPUs that were used, not those that happened to be in the machine."""

import subprocess

import pytest

import run_record
import soak

SMI = """#!/usr/bin/env python3
import sys
asked = dict(part.partition("=")[::2] for part in sys.argv[1:])
gpus = {"0": {"name": "NVIDIA H200", "driver_version": "580", "memory.used": "100"},
        "1": {"name": "NVIDIA H100", "driver_version": "580", "memory.used": "7"}}
for number in asked.get("--id", "0,1").split(","):
    print(", ".join(gpus[number][field] for field in asked["--query-gpu"].split(",")))
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-smi"
    path.write_text(SMI)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize(
    ("visible", "names", "used"),
    [
        (None, "NVIDIA H200, 580; NVIDIA H100, 580", 107),
        ("", "NVIDIA H200, 580; NVIDIA H100, 580", 107),
        ("1", "NVIDIA H100, 580", 7),
        ("1,0", "NVIDIA H100, 580; NVIDIA H200, 580", 107),
    ],
)
def test_the_gpus_in_use(smi, monkeypatch, visible, names, used):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run_record.gpu_name() == names
    assert soak.used_memory_mib() == used


def test_a_driver_that_fails(smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert run_record.gpu_name() is None and soak.used_memory_mib() is None


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_record.gpu_name() is None and soak.used_memory_mib() is None


def test_the_commit_is_that_of_the_scripts(monkeypatch, tmp_path):
    monkeypatch.delenv("COMMIT", raising=False)
    here = run_record.run_record()["commit"]
    monkeypatch.chdir(tmp_path)
    assert run_record.run_record()["commit"] == here
    subprocess.run(["git", "init", "-q", "."], check=True)
    assert run_record.git_commit() == here, "another repository is the working directory"
    monkeypatch.setenv("COMMIT", "c0ffee")
    assert run_record.run_record()["commit"] == "c0ffee"
