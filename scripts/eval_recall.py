"""Recall of every mode on traces of a served model: per layer, context length and mode, against the native indexer.

    python scripts/eval_recall.py [--traces FILE...] [--modes MODE,...] [--sweep active_heads=4,8,16 ...]
    python scripts/eval_recall.py --url URL --trace-dir DIR --prompts FILE      captures from a running server first

recall: share of native's tokens that a mode selects. mass: share of the attention that the indexer predicts for
native's tokens, p = softmax of native's scores, which falls on those the mode selects too. Rows that see at most top_k
tokens are left out. work: products of heads and tokens as a share of native's, from the formulas. Default traces: the
package's.
"""

import argparse
import itertools
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm

from capture_traces import add_server_arguments, capture, keeper, read_prompts, running_server
from indexer_kernels import IndexerParams
from indexer_kernels.traces import Trace, embedded_traces, load_traces
from run_record import run_record
from sglang_ext.cli.parameter_flags import (
    add_common_flags,
    add_parameter_flags,
    check_outputs,
    integers,
    layer_numbers,
    parameters_of,
)
from sglang_ext.cli.recall import Measured, evaluate, relevant, trace_samples

HINTS = get_type_hints(IndexerParams)


@dataclass(frozen=True, slots=True)
class Line:
    """One mode with one set of parameters, in one layer (None: in all) on prompts of about one length."""

    mode: str
    params: dict[str, object]
    context: int
    layer: int | None
    rows: int
    recall_mean: float
    recall_min: float
    mass_mean: float
    mass_min: float
    work: float


def summarise(measured: Sequence[Measured]) -> list[Line]:
    """Lines per mode, parameters and context: one per layer, then one over all."""
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for one in measured:
        key = (one.mode, tuple(relevant(one.mode, one.params).items()), one.context)
        for layer in (one.layer, None):
            groups.setdefault((*key, layer), []).append(one)
    order = sorted(groups, key=lambda key: (key[2], key[3] is None, key[3] or 0))
    return [_line(key, groups[key]) for key in order]


def _line(key: tuple[Any, ...], group: list[Measured]) -> Line:
    mode, params, context, layer = key
    recall, mass = (torch.cat([getattr(one, name) for one in group]) for name in ("recall", "mass"))
    products = sum(row.head_products for one in group for row in one.work)
    return Line(
        mode=mode,
        params=dict(params),
        context=context,
        layer=layer,
        rows=len(recall),
        recall_mean=recall.mean().item(),
        recall_min=recall.min().item(),
        mass_mean=mass.mean().item(),
        mass_min=mass.min().item(),
        work=products / sum(row.head_products for one in group for row in one.native_work),
    )


def format_table(lines: Sequence[Line], swept: Sequence[str]) -> str:
    """The lines as text, with the swept parameters that each mode depends on."""
    header = ("context", "layer", "mode", *swept, "rows", "recall", "min", "mass", "min", "work")
    cells = [header] + [
        (
            str(line.context),
            "all" if line.layer is None else str(line.layer),
            line.mode,
            *(str(line.params.get(name, "-")) for name in swept),
            str(line.rows),
            *(f"{value:.4f}" for value in (line.recall_mean, line.recall_min, line.mass_mean, line.mass_min)),
            f"{line.work:.3f}",
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    shown = []
    for number, row in enumerate(cells):
        if number > 1 and row[:2] != cells[number - 1][:2]:
            shown.append("")
        aligned = [cell.ljust(w) if column == 2 else cell.rjust(w) for column, (cell, w) in enumerate(zip(row, widths))]
        shown.append("  ".join(aligned).rstrip())
    return "\n".join(shown)


def sweep_of(texts: Sequence[str], base: IndexerParams) -> tuple[list[str], list[IndexerParams]]:
    """(fields, parameters of every combination) of FIELD=V1,V2 texts. Raises ValueError naming a wrong one."""
    axes: dict[str, list[object]] = {}
    known = [field.name for field in fields(IndexerParams)]
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise ValueError(f"--sweep {text}: write it as FIELD=V1,V2, for example --sweep active_heads=4,8")
        if name not in known or name in axes:
            raise ValueError(f"--sweep {text}: {name} must be one of {', '.join(known)}, each once")
        axes[name] = [_value(name, value, text) for value in values.split(",")]
    combinations = itertools.product(*axes.values())
    return list(axes), [replace(base, **dict(zip(axes, values))) for values in combinations]  # type: ignore[arg-type]


def _value(name: str, value: str, text: str) -> object:
    if HINTS[name] is not int:
        if value not in get_args(HINTS[name]):
            raise ValueError(f"--sweep {text}: {value!r} must be one of {get_args(HINTS[name])}")
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--sweep {text}: {value!r} is no integer") from None


def write_plot(path: Path, lines: Sequence[Line], swept: Sequence[str], note: str) -> None:
    """Recall and mass over all layers: against the context, or in a sweep against the work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.layer is None]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in zip(axes, ("recall", "mass")):
        for mode, marker in zip(dict.fromkeys(line.mode for line in shown), "osv^D"):
            own = [line for line in shown if line.mode == mode]
            points = sorted((line.work if swept else line.context, getattr(line, f"{name}_mean")) for line in own)
            axis.plot(*zip(*points), marker=marker, linestyle="" if swept else "-", label=mode, alpha=0.85)
        axis.set_title(f"{name}, mean over rows and layers", fontsize=10)
        axis.set_xlabel("work, share of native's products" if swept else "context, tokens")
        axis.set_xscale("log", base=10 if swept else 2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle(note, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def traces_of(args: argparse.Namespace) -> list[Trace]:
    """From a running server, the named files or the package. Raises ValueError where there are none."""
    keep = keeper(args.layers, None, None)
    if args.url:
        if args.prompts is None or args.traces:
            raise ValueError("--url needs --prompts FILE, and no --traces")
        return capture(running_server(args), args.trace_dir, read_prompts(args.prompts), keep, args.quiet)
    embedded = embedded_traces()
    paths = args.traces or ([embedded] if embedded else [])
    if not paths:
        raise ValueError("this version ships no traces: name some with --traces, or --url of a server that writes them")
    return [kept for path in paths for trace in load_traces(path) if (kept := keep(trace)) is not None]


def read_files(args: argparse.Namespace) -> dict[str, str]:
    """What `traces_of` read, or with --url the prompts: {file name: CRC-32}, so that a record names its data."""
    embedded = embedded_traces()
    paths = [args.prompts] if args.url else args.traces or ([embedded] if embedded else [])
    files = [file for path in paths for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    return {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--traces", type=Path, nargs="+", metavar="FILE", help="files or folders of traces")
    add_server_arguments(parser)
    parser.add_argument("--layers", type=layer_numbers, metavar="N,N,...", help="these layers only")
    parser.add_argument("--contexts", type=integers, metavar="N,N,...", help="prompts of about these lengths only")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=V,V,...", help="values of a parameter; repeatable"
    )
    add_common_flags(parser)
    add_parameter_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    swept, settings = sweep_of(args.sweep, parameters_of(args))
    check_outputs(args.json, args.plot)
    traces = traces_of(args)
    if not traces:
        raise ValueError("no trace is left, of those asked for")
    samples = trace_samples(traces, args.contexts)
    device = "cuda" if args.backend != "reference" and torch.cuda.is_available() else "cpu"
    total = len(samples) * len(settings) * len(args.modes)
    measured = []
    with tqdm(total=total, unit="run", disable=args.quiet or not sys.stderr.isatty()) as progress:
        for one in evaluate(samples, args.modes, settings, args.backend, device):
            if one is not None:
                measured.append(one)
            progress.update()
    lines = summarise(measured)
    if not lines:
        raise ValueError(f"no row of the traces can measure --modes {','.join(args.modes)}")
    models = ", ".join(sorted({trace.model for trace in traces}))
    note = f"{len(samples)} traces of {models}, backend '{args.backend}' on {device}"
    print(f"{note}\n{format_table(lines, swept)}")
    lost = [mode for mode in args.modes if mode not in {line.mode for line in lines}]
    if lost:
        print(f"not measured, no row has its whole group in a trace: {', '.join(lost)}")
    if args.json:
        record: dict[str, Any] = {"run": run_record(), "note": note, "files": read_files(args), "swept": swept}
        record["lines"] = [asdict(line) for line in lines]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        write_plot(args.plot, lines, swept, note)
    for path in filter(None, (args.json, args.plot)):
        print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        print(f"eval_recall: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
