"""relu of fp8 products without a maximum: FMNMX runs at half rate on Hopper, a saturating multiplication at full rate.

A product of 128 pairs of e4m3 values is at most 448 * 448 * 128 < 2^25 and at least 2^-18 where it is not 0, so its
share of 2^25 is exact, and its saturation to 0 .. 1 is relu of it. A gate times 2^25 is exact, too: a score keeps its
bits.
"""

import tilelang.language as T

PRODUCT_LIMIT = 33554432.0  # 2^25


def relu_share(product):
    """max(product, 0) / PRODUCT_LIMIT, exactly; for use within a prim_func."""
    return T.call_extern("float32", "__saturatef", product * (1.0 / PRODUCT_LIMIT))
