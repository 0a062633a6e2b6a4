"""From which context on a mode pays, by rows and indexer heads, out of the JSON of `scripts/bench_stage.py`.

    python scripts/bench_stage.py --keys 16384 32768 65536 131072 --json stage.json
    python scripts/break_even.py stage.json
    python scripts/bench_stage.py --phase decode --json decode.json
    python scripts/break_even.py decode.json

Between two measured contexts both times are taken as straight lines. Prints a table, and the dictionary that
`sglang_ext/break_even.py` holds: for each number of heads the largest break-even over the measured rows, rounded up to
8192 tokens. On other hardware set what it prints as SGLANG_EXT_PREFILL_MIN_TOKENS. Of decode it prints, for each batch,
the largest break-even over the numbers of heads, and leaves out batches that gain less than a tenth at any context.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STEP = 8192  # tokens the result is rounded up to
WORTH = 1.1  # times native that a decode batch must reach somewhere: one graph serves shorter contexts, too
DEFAULTS = {"prefill": "misa_rerank", "decode": "hisa"}  # what `auto` runs


def crossing(points: Iterable[tuple[int, float, float]]) -> float | None:
    """Tokens from which on the mode is no slower: points (tokens, native's time, the mode's). None: nowhere.

    The last crossing counts: behind it the mode is never slower at a measured context. Where the mode is no slower
    from the first point on, that point's tokens.
    """
    found: float | None = None
    previous: tuple[int, float] | None = None
    for tokens, native, mode in sorted(points):
        gain = native - mode
        if gain < 0:
            found = None
        elif found is None:
            found = float(tokens)
            if previous is not None:
                before, lost = previous
                found = before + (tokens - before) * -lost / (gain - lost)
        previous = (tokens, gain)
    return found


def break_evens(results: Iterable[Mapping[str, Any]], mode: str) -> dict[tuple[int, int], float | None]:
    """{(heads, rows): tokens} of one mode. ValueError where the results do not hold it."""
    return {case: crossing(points) for case, points in sorted(points_of(results, mode).items(), reverse=True)}


def points_of(results: Iterable[Mapping[str, Any]], mode: str) -> dict[tuple[int, int], list[tuple[int, float, float]]]:
    """{(heads, rows or batch): (tokens, native's time, the mode's) of each context}."""
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for one in results:
        if one.get("phase") == "decode":
            times.setdefault((one["heads"], one["batch"], one["context"]), {})[one["mode"]] = one["us"]
        else:
            times.setdefault((one["heads"], one["rows"], one["keys"]), {})[one["mode"]] = one["ms"]
    cases: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for (heads, rows, keys), by_mode in times.items():
        if "native" in by_mode and mode in by_mode:
            cases.setdefault((heads, rows), []).append((keys, by_mode["native"], by_mode[mode]))
    if not cases:
        raise ValueError(f"no case was measured with both native and --mode {mode}")
    return cases


def decode_min_tokens(results: Sequence[Mapping[str, Any]], mode: str) -> dict[int, int]:
    """{batch: tokens} for all measured numbers of heads, rounded up; batches that gain too little are left out."""
    found: dict[int, float] = {}
    for (_, batch), points in points_of(results, mode).items():
        tokens = crossing(points)
        if tokens is None or max(native / own for _, native, own in points) < WORTH:
            tokens = math.inf
        found[batch] = max(found.get(batch, 0.0), tokens)
    return {batch: -(-int(tokens) // STEP) * STEP for batch, tokens in sorted(found.items()) if math.isfinite(tokens)}


def min_tokens(found: Mapping[tuple[int, int], float | None]) -> dict[int, int | None]:
    """{heads: tokens} for all measured rows, rounded up; None where some rows never pay."""
    largest: dict[int, float | None] = {}
    for (heads, _), tokens in found.items():
        known = largest.get(heads, 0.0)
        largest[heads] = None if tokens is None or known is None else max(known, tokens)
    return {heads: None if tokens is None else -(-int(tokens) // STEP) * STEP for heads, tokens in largest.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="the JSON of scripts/bench_stage.py")
    parser.add_argument("--mode", help="default: what `auto` runs, misa_rerank in prefill and hisa in decode")
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.stage.read_text())["results"]
        phase = "decode" if results and results[0].get("phase") == "decode" else "prefill"
        mode = args.mode or DEFAULTS[phase]
        found = break_evens(results, mode)
    except (OSError, ValueError, KeyError) as error:
        print(
            f"break_even: error: {error!r}" if isinstance(error, KeyError) else f"break_even: error: {error}",
            file=sys.stderr,
        )
        return 2
    for (heads, rows), tokens in found.items():
        shown = "never within what was measured" if tokens is None else f"from {tokens:.0f} tokens on"
        print(f"{mode}, {heads} heads, {rows} rows: {shown}")
    print(
        f"DECODE_MIN_TOKENS = {decode_min_tokens(results, mode)}"
        if phase == "decode"
        else f"MIN_TOKENS = {min_tokens(found)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
