"""From which context on `auto` prefill pays, measured."""

# {indexer heads: tokens}: where misa_rerank with default settings was as fast as DeepGEMM and SGLang's top-k, on one
# H200, for 2048 and for 8192 rows (scripts/break_even.py on docs/results/prefill_stage/stage.json; rounded up to 8192).
# Fewer heads make native cheaper, and not what is read and listed.
MIN_TOKENS = {64: 40960, 32: 57344}


def min_tokens(heads: int) -> int:
    """Tokens of the longest request from which on misa_rerank is no slower than native; for an unknown number of heads
    the largest measured value.
    """
    return MIN_TOKENS.get(heads, max(MIN_TOKENS.values()))
