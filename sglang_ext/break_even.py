"""From which context on `auto` prefill pays, measured."""

# {indexer heads: tokens}: where misa_rerank with default settings was as fast as DeepGEMM and SGLang's top-k, on one
# H200, for 2048 and for 8192 rows (docs/performance.md; interpolated between 32768 and 131072 tokens, rounded up).
# Fewer heads make native cheaper, and not what is read and listed.
MIN_TOKENS = {64: 49152, 32: 73728}


def min_tokens(heads: int) -> int:
    """Tokens of the longest request from which on misa_rerank is no slower than native; for an unknown number of heads
    the largest measured value.
    """
    return MIN_TOKENS.get(heads, max(MIN_TOKENS.values()))
