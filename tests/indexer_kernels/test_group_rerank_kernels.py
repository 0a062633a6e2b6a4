"""The Triton kernels of group_rerank without a GPU: run by the interpreter on this CPU, and compiled for sm_90."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import group_rerank_kernel
from indexer_kernels.gpu.compile_check import kernel_builders
from tests.support.sm90a import opcodes_of

OUTPUTS = ("position", "slot")


def test_the_mode_agrees_with_the_reference():
    command = [sys.executable, "-m", "tests.support.interpreted_group_rerank"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "132 rows compared"


def opcodes(compiled, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found = opcodes_of(cubin)
    assert sum(found.values()) > 100
    assert not [opcode for opcode in found if opcode.startswith(("LDL", "STL"))], "spills to local memory"
    return {opcode: count for opcode, count in found.items() if "GMMA" in opcode}


@pytest.mark.parametrize("slots", [False, True])
def test_pick_does_not_spill(slots, tmp_path):
    assert opcodes(group_rerank_kernel.compile_pick_for(4, slots), tmp_path) == {}


def test_both_phases_are_compiled_ahead():
    """Groups in prefill, single rows in decode."""
    assert set(kernel_builders(IndexerParams(group=2), 32, ("group_rerank",))) == {
        *(f"group sample_threshold {held}" for held in (1024, 2048, 4096, 8192)),
        *(f"group {kernel} {output}" for kernel in ("candidate_list", "token_select") for output in OUTPUTS),
        *(f"group_proxies {rows}" for rows in (1, 2)),
        *(f"token_scores {rows} H=32" for rows in (1, 2)),
        *(f"group_pick {rows} {output}" for rows in (1, 2) for output in OUTPUTS),
    }


def test_runtime_arguments_do_not_specialise():
    """A batch may change every argument that is not a constexpr; none of them may compile a second variant."""
    runtime = [param for param in group_rerank_kernel.group_pick_kernel.params if not param.is_constexpr]
    assert [param.name for param in runtime] == group_rerank_kernel.PICK_DYNAMIC
    assert all(param.do_not_specialize and param.do_not_specialize_on_alignment for param in runtime)
