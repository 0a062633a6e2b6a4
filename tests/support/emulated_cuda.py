"""Runs the CUDA that TileLang generates on a CPU.

The source is compiled by g++ against `emulated_cuda.h`, whose barriers and shuffles wait for all threads that CUDA's
wait for: a missing barrier, or one that not every thread reaches, shows as a wrong result or an error. What Hopper does
beside the threads, copies and products, `emulated_hopper.h` and `emulated_bfloat16.h` do at once.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from indexer_kernels.gpu import (
    bit_list_kernel,
    group_scan_kernel,
    head_route_kernel,
    routed_scores_kernel,
    sample_threshold_kernel,
)
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.sm90a import lower


def emulated(
    prim_func,
    configs: dict,
    blocks: Callable[[dict[str, int]], int],
    rows: Callable[[dict[str, int]], int] = lambda _dims: 1,
) -> Callable[..., None]:
    """The kernel as TileLang would return it, called with the prim_func's arguments; blocks: how many there are in a
    row of the grid, and rows: how many rows, from the values of its dynamic dimensions.
    """
    source = lower(prim_func, configs)
    source = source[source.index('extern "C"') :].replace(
        "extern __shared__ __align__(1024) uchar buf_dyn_shmem[];", ""
    )
    name, parameters = re.search(r"void (\w+)\(([^)]*)\);", source).groups()
    threads = int(re.search(r"__launch_bounds__\((\d+)", source).group(1))
    parameters = parameters.replace("__restrict__", "").replace("__grid_constant__ const CUtensorMap", "CUtensorMap")
    declared = [parameter.strip() for parameter in parameters.split(",")]
    names = [parameter.split()[-1].lstrip("*") for parameter in declared]
    entry = "".join(f"static {parameter}_;\n" for parameter in declared)
    entry += f'extern "C" int emulated_launch(int grid_rows, int grid_columns, {", ".join(declared)}) {{\n'
    entry += "".join(f"  {n}_ = {n};\n" for n in names)
    arguments = ", ".join(f"{n}_" for n in names)
    entry += "  return emulated::launch(grid_rows * grid_columns, grid_columns, "
    entry += f"{threads}, [] {{ {name}({arguments}); }});\n}}\n"
    headers = [Path(__file__).with_name(f"emulated_{name}.h").read_text() for name in ("cuda", "hopper", "bfloat16")]
    function = _compiled("\n".join([*headers, source, entry]))

    def call(*values: torch.Tensor | int) -> None:
        given = dict(zip((parameter.name for parameter in prim_func.params), values, strict=True))
        given = {name.removesuffix("_handle"): value for name, value in given.items()}
        dims = {}
        for parameter, buffer in prim_func.buffer_map.items():
            tensor = given[parameter.name.removesuffix("_handle")]
            assert tensor.is_contiguous() and tensor.ndim == len(buffer.shape), (parameter.name, tensor.shape)
            for size, dim in zip(tensor.shape, buffer.shape, strict=True):
                _bind(dims, dim, size)
        passed = {**given, **dims}
        pointers = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int(value)
            for value in (passed[n.removesuffix("_desc")] for n in names)
        ]
        assert function(rows(dims), blocks(dims), *pointers), f"{name}: threads wait for each other"

    return call


def _bind(dims: dict[str, int], dim, size: int) -> None:
    """A dynamic dimension is a name, a number, or a name times numbers."""
    factor = 1
    while hasattr(dim, "b"):
        dim, factor = dim.a, factor * int(dim.b)
    if hasattr(dim, "name"):
        assert size % factor == 0 and dims.setdefault(dim.name, size // factor) == size // factor, (dim.name, size)
    else:
        assert int(dim) == size


def _compiled(source: str):
    # A loaded library needs its file no longer.
    with tempfile.TemporaryDirectory(prefix="emulated_cuda_") as folder:
        code, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        code.write_text(source)
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", "-w", "-fno-strict-aliasing", "-o"]
        done = subprocess.run([*command, str(library), str(code)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return ctypes.CDLL(str(library)).emulated_launch


@functools.cache
def build_bit_list(unit_rows: int, *setting: int | bool) -> Callable[..., None]:
    """In place of `bit_list_kernel.build`."""
    prim_func = bit_list_kernel.bit_list_prim_func(unit_rows, *setting)
    parts = unit_rows // bit_list_kernel.ROWS
    return emulated(prim_func, bit_list_kernel.CONFIGS, lambda dims: dims["num_units"] * parts)


@functools.cache
def build_sample_threshold(*setting: float) -> Callable[..., None]:
    """In place of `sample_threshold_kernel.build`."""
    prim_func = sample_threshold_kernel.sample_threshold_prim_func(*setting)
    return emulated(prim_func, sample_threshold_kernel.CONFIGS, lambda dims: dims["places"])


@functools.cache
def build_group_scan(num_heads: int, form: str, num_sms: int) -> Callable[..., None]:
    """In place of `group_scan_kernel.build`."""
    prim_func = group_scan_kernel.group_scan_prim_func(num_heads, form, num_sms)
    return emulated(prim_func, group_scan_kernel.configs(form), lambda _dims: num_sms)


@functools.cache
def build_head_route(num_heads: int, *setting: int | str) -> Callable[..., None]:
    """In place of `head_route_kernel.build`."""
    prim_func = head_route_kernel.head_route_prim_func(num_heads, *setting)
    parts = TILE_ROWS * num_heads // head_route_kernel.HEADS
    return emulated(prim_func, head_route_kernel.CONFIGS, lambda _dims: parts, lambda dims: dims["num_tiles"])


@functools.cache
def build_routed_scores(active_heads: int, form: str, num_sms: int) -> Callable[..., None]:
    """In place of `routed_scores_kernel.build`."""
    prim_func = routed_scores_kernel.routed_scores_prim_func(active_heads, form, num_sms)
    return emulated(prim_func, routed_scores_kernel.configs(form), lambda _dims: num_sms)
