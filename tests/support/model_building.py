"""SGLang builds a model, and its indexers with it, under torch defaults of its own."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The model's dtype is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def model_building() -> Iterator[None]:
    """Its dtype, and its device, too; here one whose tensors hold no values, so that a tensor made there by mistake is
    found out.
    """
    with default_dtype(torch.bfloat16), torch.device("meta"):
        yield
