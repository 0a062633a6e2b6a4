"""The Triton kernels of misa, misa_rerank, hisa and decode, run by Triton's interpreter, against the references."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the gpu extra is not installed")


@pytest.mark.parametrize(
    ("program", "rows"),
    [
        ("interpreted_kernels", 46),
        ("interpreted_token_modes", 82),
        ("interpreted_page_select", 132),
        ("interpreted_decode", 160),
    ],
)
def test_agrees_with_the_references(program, rows):
    command = [sys.executable, "-m", f"tests.support.{program}"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{rows} rows compared"
