"""Triton: integers in the order of float scores, for searches over their bits."""

import triton
import triton.language as tl


@triton.jit
def ordered_bits(score):
    """Unsigned 32-bit integers in the order of float32 scores; none is 0, which is free for "no score"."""
    score = tl.where(score == 0.0, 0.0, score)  # one zero, so that -0.0 and 0.0 tie
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def from_ordered_bits(key):
    """The float32 whose `ordered_bits` is `key`."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, ~bits).to(tl.float32, bitcast=True)
