"""Which backend serves a call, and why not the other."""

import importlib.util
import logging

import torch

from indexer_kernels.params import IndexerParams

logger = logging.getLogger("indexer_kernels")
_logged: set[str] = set()


def gpu_refusal(mode: str, q: torch.Tensor, params: IndexerParams) -> str | None:
    """Why the gpu backend cannot serve the call, or None."""
    refusal = _installation_refusal(q.device, "q")
    if refusal is not None:
        return refusal
    from indexer_kernels.gpu import refusals

    return refusals.refusal(mode, q, params)


def _installation_refusal(device: torch.device, name: str) -> str | None:
    if device.type != "cuda":
        return f"{name} is on {device.type}, the gpu backend needs a CUDA device"
    missing = [package for package in ("tilelang", "deep_gemm") if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def use_gpu(mode: str, q: torch.Tensor, params: IndexerParams, backend: str) -> bool:
    """True for the gpu backend. backend "gpu" raises NotImplementedError(reason) where it refuses; "auto" logs it
    once.
    """
    if backend == "reference":
        return False
    return _chosen(gpu_refusal(mode, q, params), f"mode {mode!r}", f"mode={mode!r}", q.device, backend)


def use_gpu_on(device: torch.device, backend: str) -> bool:
    """`use_gpu` for what needs only the key cache, which is on `device`: page means."""
    if backend == "reference":
        return False
    refusal = _installation_refusal(device, "k_pages")
    if refusal is None:
        from indexer_kernels.gpu import refusals

        refusal = refusals.device_refusal(device)
    return _chosen(refusal, "page means", "page means", device, backend)


def _chosen(refusal: str | None, what: str, argument: str, device: torch.device, backend: str) -> bool:
    if refusal is None:
        return True
    if backend == "gpu":
        raise NotImplementedError(f"backend='gpu', {argument}: {refusal}")
    if device.type == "cuda" and refusal not in _logged:
        _logged.add(refusal)
        logger.warning("the reference backend serves %s: %s", what, refusal)
    return False
