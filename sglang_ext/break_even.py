"""From which context on `auto` pays, measured."""

# {indexer heads: tokens}: where misa_rerank with default settings was as fast as DeepGEMM and SGLang's top-k, on one
# H200, for 2048 and for 8192 rows (scripts/break_even.py on docs/results/prefill_stage/stage.json; rounded up to 8192).
# Fewer heads make native cheaper, and not what is read and listed.
MIN_TOKENS = {64: 40960, 32: 57344}
# {rows of a decode batch: tokens}: from which context on hisa with stored statistics is as fast as native in a graph,
# for at least so many rows; with 64 and 32 heads (scripts/break_even.py on docs/results/decode_stage/decode.json). One
# row gains nothing at any context.
DECODE_MIN_TOKENS = {8: 24576, 64: 16384, 256: 8192}


def min_tokens(heads: int) -> int:
    """Tokens of the longest request from which on misa_rerank is no slower than native; for an unknown number of heads
    the largest measured value.
    """
    return MIN_TOKENS.get(heads, max(MIN_TOKENS.values()))


def decode_min_tokens(rows: int) -> int | None:
    """Context from which on hisa decode of so many rows is no slower than native; None: never, or not measured."""
    measured = [least for least in DECODE_MIN_TOKENS if least <= rows]
    return DECODE_MIN_TOKENS[max(measured)] if measured else None
