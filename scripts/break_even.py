"""From which context on a mode pays, by rows and indexer heads, out of the JSON of `scripts/bench_stage.py`.

    python scripts/bench_stage.py --keys 16384 32768 65536 131072 --json stage.json
    python scripts/break_even.py stage.json

Between two measured contexts both times are taken as straight lines. Prints a table, and the dictionary that
`sglang_ext/break_even.py` holds: for each number of heads the largest break-even over the measured rows, rounded up to
8192 tokens. On other hardware set what it prints as SGLANG_EXT_PREFILL_MIN_TOKENS.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STEP = 8192  # tokens the result is rounded up to


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
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    for one in results:
        times.setdefault((one["heads"], one["rows"], one["keys"]), {})[one["mode"]] = one["ms"]
    cases: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for (heads, rows, keys), by_mode in times.items():
        if "native" in by_mode and mode in by_mode:
            cases.setdefault((heads, rows), []).append((keys, by_mode["native"], by_mode[mode]))
    if not cases:
        raise ValueError(f"no case was measured with both native and --mode {mode}")
    return {case: crossing(points) for case, points in sorted(cases.items(), reverse=True)}


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
    parser.add_argument("--mode", default="misa_rerank", help="default: %(default)s, what `auto` runs")
    args = parser.parse_args(argv)
    try:
        found = break_evens(json.loads(args.stage.read_text())["results"], args.mode)
    except (OSError, ValueError, KeyError) as error:
        print(
            f"break_even: error: {error!r}" if isinstance(error, KeyError) else f"break_even: error: {error}",
            file=sys.stderr,
        )
        return 2
    for (heads, rows), tokens in found.items():
        shown = "never within what was measured" if tokens is None else f"from {tokens:.0f} tokens on"
        print(f"{args.mode}, {heads} heads, {rows} rows: {shown}")
    print(f"MIN_TOKENS = {min_tokens(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
