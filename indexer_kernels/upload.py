"""Host values on their way to a GPU that is busy."""

import torch


def upload(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of a CPU tensor on `device`, for which the host does not wait.

    Through pinned memory: the driver may copy more than 64 KB of other memory only once the stream has come so far,
    with the host standing still behind all work that is queued (CUDA Runtime API, "API synchronization behavior").
    PyTorch keeps the pinned block until the copy is over, and then for the next one.
    """
    device = torch.device(device)
    source = values.pin_memory() if device.type == "cuda" else values
    return source.to(device, non_blocking=True)
