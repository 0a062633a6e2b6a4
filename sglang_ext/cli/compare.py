"""`sglang-ext compare`: every mode on structured synthetic data, against native. Needs neither a GPU nor SGLang."""

import argparse
import dataclasses
import statistics
import sys
import time
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from indexer_kernels import MODES, IndexerParams, select_ragged
from indexer_kernels.synthetic import SyntheticCase, make_case
from sglang_ext.cli.compare_report import NOTE, Result, format_table, write_json, write_plot
from sglang_ext.cli.work_counts import count_work

GPU_REPEATS = 5


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `compare`; one flag per field of IndexerParams."""
    parser = commands.add_parser(
        "compare",
        help="compare all modes on synthetic data (no GPU, no SGLang needed)",
        description=f"Compare the modes with native on synthetic keys and queries. {NOTE}",
        allow_abbrev=False,
    )
    parser.add_argument("--contexts", type=_integers, default=[4096, 8192, 16384, 32768], metavar="N,N,...")
    parser.add_argument(
        "--rows", type=int, default=32, help="query rows at the end of the context (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=64, help="indexer heads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", type=_names, default=list(MODES), metavar="MODE,...", help=f"of {', '.join(MODES)}")
    parser.add_argument("--backend", choices=("reference", "gpu", "auto"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw recall and work over the context")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    group = parser.add_argument_group("parameters of the modes")
    hints = typing.get_type_hints(IndexerParams)
    for field in dataclasses.fields(IndexerParams):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if kind is int:
            group.add_argument(flag, type=int, default=field.default, help="(default: %(default)s)")
        else:
            group.add_argument(
                flag, choices=typing.get_args(kind), default=field.default, help="(default: %(default)s)"
            )


def run(args: argparse.Namespace) -> int:
    """Runs every mode on every context, prints the table, writes the files asked for."""
    params = IndexerParams(**{field.name: getattr(args, field.name) for field in dataclasses.fields(IndexerParams)})
    _check(args)
    device = "cuda" if args.backend != "reference" and torch.cuda.is_available() else "cpu"
    results: list[Result] = []
    # The first call pays for threads and memory of the whole process; it is not timed.
    _select("native", make_case(min(args.contexts), args.rows, args.heads).to(device), params, "reference")
    quiet = args.quiet or not sys.stderr.isatty()
    with tqdm(total=len(args.contexts) * len(args.modes), file=sys.stderr, disable=quiet, unit="run") as progress:
        for context in args.contexts:
            case = make_case(context, args.rows, args.heads, args.seed).to(device)
            native = None
            for mode in args.modes:
                progress.set_description(f"{context} {mode}")
                seconds, chosen = _timed(partial(_select, mode, case, params, args.backend), device)
                if native is None:
                    native = chosen if mode == "native" else _select("native", case, params, args.backend)
                results.append(_result(mode, context, args.heads, params, case, chosen, native, seconds))
                progress.update()
    print(_header(args, device))
    print(format_table(results))
    if args.json:
        write_json(args.json, results, params, vars(args), device)
    if args.plot:
        write_plot(args.plot, results)
    for path in (args.json, args.plot):
        if path:
            print(f"wrote {path}")
    return 0


def _integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of integers such as 4096,8192") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' holds a length below 1")
    return values


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in MODES]:
        raise argparse.ArgumentTypeError(f"unknown mode {', '.join(unknown)}; known: {', '.join(MODES)}")
    return names


def _check(args: argparse.Namespace) -> None:
    """What would fail only after minutes of work fails here."""
    if args.rows > min(args.contexts):
        raise ValueError(f"--rows {args.rows} is more than the shortest context, {min(args.contexts)}")
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot} must end in .png")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist")
    if args.plot:
        try:
            import matplotlib  # noqa: F401  (only asked whether it is there)
        except ModuleNotFoundError:
            raise ValueError("--plot needs matplotlib: pip install 'sglang-ext[plot]'") from None


def _select(mode: str, case: SyntheticCase, params: IndexerParams, backend: str) -> torch.Tensor:
    return select_ragged(
        mode, case.q, case.weights, case.k, case.k_scale, case.ks, case.ke, params=params, backend=backend
    )


def _timed(work: Callable[[], torch.Tensor], device: str) -> tuple[float, torch.Tensor]:
    """Seconds and result: one call on a CPU; on a GPU the median of a few after one that compiles."""
    if device == "cpu":
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result
    result, seconds = work(), []
    for _ in range(GPU_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def _result(
    mode: str,
    context: int,
    heads: int,
    params: IndexerParams,
    case: SyntheticCase,
    chosen: torch.Tensor,
    native: torch.Tensor,
    seconds: float,
) -> Result:
    wanted, found = (_selected(indices, context) for indices in (native, chosen))
    recall = (wanted & found).sum(1) / wanted.sum(1)
    needles = wanted.gather(1, case.needles)
    kept = (found.gather(1, case.needles) & needles).sum().item()
    per_row = [count_work(mode, int(length), heads, params) for length in (case.ke - case.ks).tolist()]
    return Result(
        context=context,
        mode=mode,
        recall_mean=recall.mean().item(),
        recall_min=recall.min().item(),
        needles_kept=kept / needles.sum().item() if needles.any() else None,
        tokens_all_heads=statistics.fmean(work.tokens_all_heads for work in per_row),
        tokens_routed=statistics.fmean(work.tokens_routed for work in per_row),
        head_products=statistics.fmean(work.head_products for work in per_row),
        key_bytes=statistics.fmean(work.key_bytes for work in per_row),
        seconds=seconds,
    )


def _selected(indices: torch.Tensor, context: int) -> torch.Tensor:
    """[M, context] bool of the selected tokens; -1 is dropped into a column of its own."""
    flags = torch.zeros(indices.shape[0], context + 1, dtype=torch.bool, device=indices.device)
    return flags.scatter_(1, indices.long().where(indices >= 0, context), True)[:, :context]


def _header(args: argparse.Namespace, device: str) -> str:
    where = "this CPU" if device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{NOTE}\nTimes: all {args.rows} rows of one layer, backend '{args.backend}' on {where}"
        + ("; the reference is written to be read, its times say nothing about a server." if device == "cpu" else ".")
        + f"\nrows {args.rows}, heads {args.heads}, seed {args.seed}; counts and bytes are per row, from the formulas."
    )
