"""Host values go to a busy GPU without the host standing still behind its work."""

import torch

from indexer_kernels.upload import upload

VALUES = torch.arange(40000, dtype=torch.int32)


def test_what_goes_to_a_gpu_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda _self, device, non_blocking: (str(device), non_blocking))
    assert upload(VALUES, "cuda") == ("cuda", True) and len(pinned) == 1
    assert upload(VALUES, torch.device("meta")) == ("meta", True) and len(pinned) == 1, "no driver is asked for memory"


def test_the_values_arrive():
    assert torch.equal(upload(VALUES, "cpu"), VALUES)
