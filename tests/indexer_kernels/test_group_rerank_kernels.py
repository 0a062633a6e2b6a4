"""The Triton kernels of group_rerank without a GPU: run by the interpreter on this CPU, and compiled for sm_90."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import group_proxy_kernel, group_rerank_kernel, group_scan_kernel, rescan_kernel
from indexer_kernels.gpu.compile_check import H200_SMS, kernel_builders
from tests.support.sm90a import compile_sm90a, opcodes_of

OUTPUTS = ("position", "slot")


def test_the_mode_agrees_with_the_reference():
    command = [sys.executable, "-m", "tests.support.interpreted_group_rerank"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "388 rows compared"


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


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_proxies_do_not_spill(num_rows, tmp_path):
    assert opcodes(group_proxy_kernel.compile_for(num_rows), tmp_path) == {}


@pytest.mark.parametrize("num_heads", [64, 32])
def test_rescans_keep_their_products_and_do_not_spill(num_heads, tmp_path):
    """64 keys a warpgroup, one instruction per 32 bytes of head dim."""
    product = {f"QGMMA.64x{num_heads}x32.F32.E4M3.E4M3": 4}
    assert opcodes(rescan_kernel.compile_scores(num_heads, True), tmp_path) == product
    assert opcodes(rescan_kernel.compile_choice(num_heads, 10240, 64, 128, False, True), tmp_path) == product


@pytest.mark.parametrize("form", ["scores", "mask"])
@pytest.mark.parametrize("num_heads", [64, 32])
def test_the_scan_keeps_its_products_and_sums_in_a_thread(num_heads, form, tmp_path):
    kernel = compile_sm90a(group_scan_kernel.group_scan_prim_func(num_heads, form, H200_SMS), tmp_path)
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    assert kernel.count("QGMMA.64x256x32") == kernel.count("QGMMA") == 4
    # One multiplication and one addition a product of a thread, and no sum over lanes.
    assert kernel.count("FMUL.SAT") == kernel.count("FFMA") == 128
    assert kernel.count("SHFL") == 0
    assert kernel.count("VOTE.ANY") == (128 // num_heads if form == "mask" else 0)


def test_both_phases_are_compiled_ahead():
    """Groups in prefill, single rows in decode."""
    assert set(kernel_builders(IndexerParams(group=2), 32, ("group_rerank",))) == {
        *(f"group_scan {form}" for form in ("scores", "mask")),
        *("sample_keys", "rescan_gather", "group rescan_scores"),
        *(f"group sample_threshold {held}" for held in (1024, 2048, 4096, 8192)),
        *(f"group {kernel} {output}" for kernel in ("candidate_list", "rescan_choice") for output in OUTPUTS),
        *(f"group_proxies {rows}" for rows in (1, 2)),
        *(f"token_scores {rows} H=32" for rows in (1, 2)),
        *(f"group_pick {rows} {output}" for rows in (1, 2) for output in OUTPUTS),
    }


def test_runtime_arguments_do_not_specialise():
    """A batch may change every argument that is not a constexpr; none of them may compile a second variant."""
    runtime = [param for param in group_rerank_kernel.group_pick_kernel.params if not param.is_constexpr]
    assert [param.name for param in runtime] == group_rerank_kernel.PICK_DYNAMIC
    assert all(param.do_not_specialize and param.do_not_specialize_on_alignment for param in runtime)
