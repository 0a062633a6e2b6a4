"""Compile TileLang kernels for sm_90a without a GPU and read what came out: spills, matrix instructions, source."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tilelang
import triton
from tilelang import tvm
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from indexer_kernels.gpu.target import PASS_CONFIGS, TARGET

TRITON_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Sm90aKernel:
    """source: the generated CUDA; spill_bytes: ptxas's spill stores + loads; opcodes: how often each SASS opcode
    occurs.
    """

    source: str
    spill_bytes: int
    opcodes: Counter[str]

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))


def lower(prim_func, configs: dict = PASS_CONFIGS) -> str:
    """The CUDA source TileLang generates for a prim_func."""
    target = tvm.target.Target(TARGET)
    with tvm.transform.PassContext(opt_level=3, config=dict(configs)), target:
        return tilelang.lower(
            prim_func, target=target, enable_host_codegen=False, enable_device_compile=False
        ).kernel_source


def compile_sm90a(prim_func, folder: Path, configs: dict = PASS_CONFIGS) -> Sm90aKernel:
    """Lower, compile with ptxas's resource report, disassemble."""
    source = lower(prim_func, configs)
    path, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    path.write_text(source)
    nvcc = shutil.which("nvcc")
    assert nvcc, "nvcc must be on the PATH to compile kernels (it comes with CUDA 13 or SGLang's own dependencies)"
    command = [nvcc, "-cubin", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-w"]
    command += ["--ptxas-options=-v", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
    report = subprocess.run([*command, "-o", str(cubin), str(path)], capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.stderr)
    assert spills, f"ptxas reported no resources: {report.stderr[-500:]}"
    return Sm90aKernel(source, sum(map(int, spills)), opcodes_of(cubin))


def opcodes_of(cubin: Path) -> Counter[str]:
    """SASS opcodes of a cubin, predicates and operands dropped."""
    sass = subprocess.run(
        [TRITON_TOOLS / "cuobjdump", "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.M))
