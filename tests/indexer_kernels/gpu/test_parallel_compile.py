"""What several threads compiled is what a launch finds: nothing is compiled again while serving."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

pytestmark = pytest.mark.gpu

# As a server starts: a default device and dtype that threads do not all inherit.
START = """
    import json
    import sys

    import tilelang
    import torch
    import triton

    from indexer_kernels import IndexerParams, select_rows
    from indexer_kernels.gpu.compile_check import compile_each
    from tests.support.inputs import make_batch

    compiled = {"tilelang": [], "triton": []}


    def note_kernel(func, **setting):
        compiled["tilelang"].append(func)
        return compile_kernel(func, **setting)


    def note_variant(src, cache_hit, **_):
        if not cache_hit:
            compiled["triton"].append(src)


    compile_kernel, tilelang.compile = tilelang.compile, note_kernel
    triton.knobs.compilation.listener = note_variant
    params, modes = IndexerParams(), ("misa", "misa_rerank", "hisa", "group_rerank")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        outcomes = list(compile_each([(mode, params) for mode in modes], 64, int(sys.argv[1])))
    torch.set_default_dtype(torch.float32)
    errors = [kernel for of_one in outcomes for kernel in of_one if kernel.error is not None]
    ahead = {compiler: len(kernels) for compiler, kernels in compiled.items()}
    chosen = {}
    for name, lengths, rows in (("short", [131, 9000], [131, 401]), ("long", [70000], [300])):
        batch = make_batch(lengths, rows, device="cuda", seed=3)
        inputs = (batch.q, batch.weights, batch.k_pages, batch.page_table, batch.plan, params)
        for mode in modes:
            for output in ("position", "slot"):
                picked = select_rows(mode, *inputs, backend="gpu", output=output)
                chosen[f"{name} {mode} {output}"] = picked.sum(1, dtype=torch.int64).tolist()
    again = {compiler: len(kernels) - ahead[compiler] for compiler, kernels in compiled.items()}
    counts = {"ahead": ahead, "again": again, "triton": triton.__version__}
    print(json.dumps({"errors": errors, "chosen": chosen, **counts}))
"""


def start(folder, workers: int) -> dict:
    """In a process and with cache folders of its own."""
    caches = {"TILELANG_CACHE_DIR": "tilelang", "TILELANG_TMP_DIR": "tmp", "TRITON_CACHE_DIR": "triton"}
    environ = os.environ | {name: str(folder / place) for name, place in caches.items()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(START), str(workers)], capture_output=True, text=True, env=environ
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict:
    return start(tmp_path_factory.mktemp("eight"), 8)


def test_everything_compiles(started):
    assert started["errors"] == [] and min(started["ahead"].values()) > 10


@pytest.mark.parametrize("compiler", ["tilelang", "triton"])
def test_launches_find_what_was_compiled(started, compiler):
    if compiler == "triton" and tuple(map(int, started["triton"].split(".")[:2])) < (3, 8):
        pytest.skip(f"Triton {started['triton']} spells a variant's attributes otherwise than 3.8, which SGLang brings")
    assert started["again"][compiler] == 0


def test_each_kernel_is_compiled_once_and_selects_as_when_compiled_in_sequence(started, tmp_path):
    alone = start(tmp_path, 1)
    assert started["ahead"] == alone["ahead"] and started["chosen"] == alone["chosen"]
