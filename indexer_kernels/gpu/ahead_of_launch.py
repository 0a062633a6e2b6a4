"""Compiles a Triton kernel for sm_90 without a GPU or a launch."""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from indexer_kernels.gpu.build_once import lock_of


def compile_sm90(
    kernel: Any,
    kinds: Mapping[str, str],
    constants: Mapping[str, int],
    options: Mapping[str, int],
    aligned: Sequence[str] = (),
) -> Any:
    """The variant of `kernel` for some constants; its `asm` holds PTX and cubin.

    kinds: run-time argument -> Triton's type, in the kernel's order. aligned: arguments that a launch finds 16-byte
    aligned and specialises on. Attributes are spelled as a launch spells them, so that it finds this variant cached.
    """
    signature = {**kinds, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    attributes: dict[tuple[int], list] = {(names.index(name),): [] for name in constants}
    attributes |= {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    attributes = dict(sorted(attributes.items()))  # Triton's cache tells orders apart
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    variant = (tuple(signature.items()), tuple(constants.items()), tuple(options.items()), tuple(aligned))
    with lock_of((kernel.__module__, kernel.__name__, variant)):  # the next one finds it on disk
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
