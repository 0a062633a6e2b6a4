"""What a launch asks Triton for is what was compiled ahead of it: else a server compiles in the middle of serving, or
runs a variant that reads byte by byte. Launches are recorded here, not made.
"""

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import candidate_counts_kernel, decode_scores_kernel, group_proxy_kernel, page_means_kernel

PARAMS = IndexerParams(active_heads=16, route_block=64)
FP8 = torch.float8_e4m3fn
Q, WEIGHTS = torch.zeros((3, 64, 128)).to(FP8), torch.zeros((3, 64))
POOL, MEANS = torch.zeros((5, 8448), dtype=torch.uint8), torch.zeros((5, 128), dtype=torch.bfloat16)
# A view that starts at an odd entry, with rows of any width: nothing is known of either.
TABLE = torch.zeros((3, 30), dtype=torch.int32)[:, 1:8]
LENGTHS = torch.ones(7, dtype=torch.int32)[1:4]
CACHE = (POOL, TABLE, LENGTHS)
READ = (Q, WEIGHTS, MEANS, TABLE, LENGTHS, PARAMS)
BLOCKS = torch.zeros((3, 4, 128), dtype=torch.bfloat16)
STATISTICS = torch.zeros((3, 2, 64))

means, scores, counts = page_means_kernel, decode_scores_kernel, candidate_counts_kernel
LAUNCHES = {
    "update": (
        means.update_means_kernel,
        lambda: means.update_means(*CACHE, MEANS, None, last=False),
        lambda: means.compile_update(False, False),
    ),
    "update from a page": (
        means.update_means_kernel,
        lambda: means.update_means(*CACHE, MEANS, LENGTHS, last=False),
        lambda: means.compile_update(False, True),
    ),
    "update of last pages": (
        means.update_means_kernel,
        lambda: means.update_means(*CACHE, MEANS, None, last=True),
        lambda: means.compile_update(True, False),
    ),
    "check": (means.check_means_kernel, lambda: means.check_means(*CACHE, MEANS), means.compile_check),
    "block means": (
        means.block_means_kernel,
        lambda: means.block_means(*CACHE, 2, None, BLOCKS),
        lambda: means.compile_blocks(2, False),
    ),
    "stored block means": (
        means.block_means_kernel,
        lambda: means.block_means(*CACHE, 2, MEANS, BLOCKS),
        lambda: means.compile_blocks(2, True),
    ),
    "statistics": (
        scores.route_statistics_kernel,
        lambda: scores.route_statistics(*READ),
        lambda: scores.compile_statistics(64, PARAMS),
    ),
    "scores": (
        scores.decode_scores_kernel,
        lambda: scores.decode_scores(*READ, 8),
        lambda: scores.compile_scores(64, PARAMS, False, False),
    ),
    "scores and update": (
        scores.decode_scores_kernel,
        lambda: scores.decode_scores(*READ, 8, k_pages=POOL),
        lambda: scores.compile_scores(64, PARAMS, False, True),
    ),
    "routed scores": (
        scores.decode_scores_kernel,
        lambda: scores.decode_scores(*READ, 8, STATISTICS),
        lambda: scores.compile_scores(64, PARAMS, True, False),
    ),
    "counts": (
        counts.candidate_counts_kernel,
        lambda: counts.candidate_counts(LENGTHS, PARAMS),
        lambda: counts.compile_counts(PARAMS),
    ),
    "group proxies": (
        group_proxy_kernel.group_proxy_kernel,
        lambda: group_proxy_kernel.group_proxies(Q, WEIGHTS, TABLE[:, :4].contiguous(), LENGTHS, 32),
        lambda: group_proxy_kernel.compile_for(4),
    ),
}


@pytest.mark.parametrize(("kernel", "launch", "compile_ahead"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_finds_what_was_compiled(monkeypatch, kernel, launch, compile_ahead):
    launches = []
    monkeypatch.setattr(kernel, "run", lambda *args, grid, warmup, **kwargs: launches.append((args, kwargs)))
    launch()
    [(args, kwargs)] = launches
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    packed = kernel._pack_args(backend, {"num_warps": kwargs["num_warps"]}, bound, specialization, options)
    _, signature, constants, attributes = packed
    ahead = compile_ahead()
    assert signature == ahead.src.signature and attributes == ahead.src.attrs
    assert ASTSource(kernel, signature, constants, attributes).hash() == ahead.src.hash()
    assert kwargs["num_warps"] == ahead.metadata.num_warps
