"""Which backend serves a call, and why not the other."""

import importlib.util
import logging

import torch

from indexer_kernels.params import IndexerParams

logger = logging.getLogger("indexer_kernels")
_logged: set[str] = set()


def gpu_refusal(mode: str, q: torch.Tensor, params: IndexerParams) -> str | None:
    """Why the gpu backend cannot serve the call, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device.type}, the gpu backend needs a CUDA device"
    missing = [name for name in ("tilelang", "deep_gemm") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    from indexer_kernels.gpu import refusals

    return refusals.refusal(mode, q, params)


def use_gpu(mode: str, q: torch.Tensor, params: IndexerParams, backend: str) -> bool:
    """True for the gpu backend. backend "gpu" raises NotImplementedError(reason) where it refuses; "auto" logs it
    once.
    """
    if backend == "reference":
        return False
    refusal = gpu_refusal(mode, q, params)
    if refusal is None:
        return True
    if backend == "gpu":
        raise NotImplementedError(f"backend='gpu', mode={mode!r}: {refusal}")
    if q.device.type == "cuda" and refusal not in _logged:
        _logged.add(refusal)
        logger.warning("the reference backend serves mode %r: %s", mode, refusal)
    return False
