"""The kernels of token candidates, run on this CPU by Triton's interpreter and compared with the references."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the gpu extra is not installed")


def test_token_kernels_agree_with_the_references():
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "40 rows compared"
