"""`sglang-ext compare`: every mode against native, on traces of a model or synthetic data. No GPU, no SGLang needed."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from indexer_kernels.traces import embedded_traces, load_traces
from sglang_ext.cli.compare_report import Layer, Result, format_table, write_json, write_plot
from sglang_ext.cli.parameter_flags import (
    add_common_flags,
    add_parameter_flags,
    check_outputs,
    integers,
    parameters_of,
)
from sglang_ext.cli.recall import Measured, Sample, evaluate, synthetic_sample, trace_samples

SYNTHETIC_NOTE = (
    "Synthetic data: recall here compares implementations and shows failure modes; it is no claim about model quality."
)
SYNTHETIC_CONTEXTS = [4096, 8192, 16384, 32768]
SYNTHETIC_ONLY = {"rows": 32, "heads": 64, "seed": 0}


class Data(NamedTuple):
    """What is compared on, and the sentence that says so."""

    samples: list[Sample]
    note: str


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `compare`; one flag per field of IndexerParams."""
    parser = commands.add_parser(
        "compare",
        help="compare all modes on traces of a model or synthetic data (no GPU, no SGLang needed)",
        description="Compare the modes with native: share of its tokens and of their attention mass that a mode finds.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        metavar="traces|synthetic|FILE",
        help="the traces in this package (default, if it has any), made-up keys and queries, or a file or folder of "
        "traces",
    )
    parser.add_argument("--contexts", type=integers, metavar="N,N,...", help="of these lengths only")
    parser.add_argument("--rows", type=int, help="synthetic: query rows at the end of the context (default: 32)")
    parser.add_argument("--heads", type=int, help="synthetic: indexer heads (default: 64)")
    parser.add_argument("--seed", type=int, help="synthetic: (default: 0)")
    add_common_flags(parser)
    add_parameter_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Runs every mode on every context, prints the table, writes the files asked for."""
    params = parameters_of(args)
    check_outputs(args.json, args.plot)
    data = load_data(args)
    device = "cuda" if args.backend != "reference" and torch.cuda.is_available() else "cpu"
    measured: list[Measured] = []
    quiet = args.quiet or not sys.stderr.isatty()
    with tqdm(total=len(data.samples) * len(args.modes), file=sys.stderr, disable=quiet, unit="run") as progress:
        for one in evaluate(data.samples, args.modes, [params], args.backend, device):
            if one is not None:
                progress.set_description(f"{one.context} {one.mode}")
                measured.append(one)
            progress.update()
    results = summarise(measured)
    if not results:
        raise ValueError(f"no row of the data can measure --modes {','.join(args.modes)}")
    print(_header(data, args.backend, device))
    print(format_table(results))
    if lost := [mode for mode in dict.fromkeys(args.modes) if mode not in {result.mode for result in results}]:
        print(f"not measured, no row of the data can tell: {', '.join(lost)}")
    if args.json:
        write_json(args.json, results, params, vars(args), device, data.note)
    if args.plot:
        write_plot(args.plot, results, data.note)
    for path in (args.json, args.plot):
        if path:
            print(f"wrote {path}")
    return 0


def load_data(args: argparse.Namespace) -> Data:
    """The samples that --data names. Raises ValueError for flags that do not go with it, or traces that are not there.

    Fills in the defaults of the synthetic flags, so that what ran is in `args`.
    """
    embedded = embedded_traces()
    if args.data == "traces" and embedded is None:
        raise ValueError("--data traces: this version holds none; name a file, or use --data synthetic")
    missing = args.data is None and embedded is None
    args.data = args.data or ("synthetic" if missing else "traces")
    if args.data == "synthetic":
        note = SYNTHETIC_NOTE + (" (The package holds no traces.)" if missing else "")
        for name, default in SYNTHETIC_ONLY.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        contexts = sorted(set(args.contexts or SYNTHETIC_CONTEXTS))
        if args.rows > contexts[0]:
            raise ValueError(f"--rows {args.rows} is more than the shortest context, {contexts[0]}")
        return Data([synthetic_sample(context, args.rows, args.heads, args.seed) for context in contexts], note)
    if given := [name for name in SYNTHETIC_ONLY if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0]} {getattr(args, given[0])} is for --data synthetic; traces have their own")
    traces = load_traces(embedded if args.data == "traces" and embedded else Path(args.data))
    samples = trace_samples(traces, args.contexts)
    models = ", ".join(sorted({trace.model for trace in traces}))
    small = ", a small model: a large one looks for other things, measure yours" if args.data == "traces" else ""
    return Data(samples, f"Traces of {models}{small}. Recall and mass are of native's selection, not of answers.")


def summarise(measured: Sequence[Measured]) -> list[Result]:
    """One result per context and mode, over all rows of all samples, layers apart as well."""
    groups: dict[tuple[int, str], list[Measured]] = {}
    for one in sorted(measured, key=lambda one: one.context):
        groups.setdefault((one.context, one.mode), []).append(one)
    return [_result(context, mode, group) for (context, mode), group in groups.items()]


def _result(context: int, mode: str, group: list[Measured]) -> Result:
    recall, mass = (torch.cat([getattr(one, name) for one in group]) for name in ("recall", "mass"))
    wanted = sum(one.wanted for one in group)
    work = [row for one in group for row in one.work]
    layers = []
    for layer in sorted({one.layer for one in group if one.layer is not None}):
        own = [one for one in group if one.layer == layer]
        layers.append(
            Layer(
                layer,
                *(torch.cat([getattr(one, name) for one in own]).mean().item() for name in ("recall", "mass")),
            )
        )
    return Result(
        context=context,
        mode=mode,
        rows=len(recall),
        recall_mean=recall.mean().item(),
        recall_min=recall.min().item(),
        mass_mean=mass.mean().item(),
        mass_min=mass.min().item(),
        layers=tuple(layers),
        needles_kept=sum(one.kept for one in group) / wanted if wanted else None,
        tokens_all_heads=statistics.fmean(row.tokens_all_heads for row in work),
        tokens_routed=statistics.fmean(row.tokens_routed for row in work),
        head_products=statistics.fmean(row.head_products for row in work),
        key_bytes=statistics.fmean(row.key_bytes for row in work),
        seconds=statistics.fmean(one.seconds for one in group),
    )


def _header(data: Data, backend: str, device: str) -> str:
    where = "this CPU" if device == "cpu" else torch.cuda.get_device_name()
    rows, heads = (sorted({sample.tensors[0].shape[axis] for sample in data.samples}) for axis in (0, 1))
    shown = [" or ".join(map(str, counts)) for counts in (rows, heads)]
    return (
        f"{data.note}\nTimes: {shown[0]} rows of one layer and prompt, {shown[1]} heads, backend '{backend}' on {where}"
        + ("; the reference is written to be read, its times say nothing about a server." if device == "cpu" else ".")
        + "\nCounts and bytes are per row, from the formulas."
    )
