"""`sglang-ext tune`: from traces of a served model to a settings file, a mode and its budgets for every layer."""

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from indexer_kernels import MODES, IndexerParams
from sglang_ext.cli.parameter_flags import add_parameter_flags, integers, mode_names, parameters_of
from sglang_ext.cli.recall import Measured, Sample, evaluate, trace_samples
from sglang_ext.cli.tune_choice import TUNED, Choice, Found, Option, Target, choose_layer, gather, option_of, passing
from sglang_ext.cli.tune_compile import broken_options
from sglang_ext.cli.tune_cost import FORMULA, Costs, formula_costs, time_costs, timing
from sglang_ext.cli.tune_file import file_content, where_and_when, write_settings_file
from sglang_ext.cli.tune_input import check_arguments, grid_of, refused_options, shape_of, traces_of

GRID = {"active_heads": [4, 8, 16], "candidates": [6144, 8192, 10240, 12288], "top_blocks": [32, 64, 96]}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `tune`."""
    parser = commands.add_parser(
        "tune",
        help="choose mode and budgets of every layer's prefill from traces of your model and prompts",
        description="Choose the cheapest mode and budgets of every layer's prefill that find enough of native's tokens "
        "on traces of your model and prompts, and write them as a settings file (docs/tuning.md).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--traces", type=Path, nargs="+", metavar="PATH", help="files or folders of traces (default: the package's)")
    add("--out", type=Path, required=True, metavar="FILE.json", help="the settings file to write")
    add("--model-path", type=Path, metavar="DIR", help="the model's folder: its config is checked, its layers counted")
    add("--recall-target", type=float, default=0.95, metavar="R", help="of every layer, mean over rows (default: 0.95)")
    add("--recall-min", type=float, default=0.8, metavar="R", help="of every layer's worst row (default: 0.8)")
    add("--modes", type=mode_names, default=list(MODES[1:]), metavar="MODE,...", help="to choose from (default: all)")
    for name, values in GRID.items():
        shown = ",".join(map(str, values))
        add(f"--{name.replace('_', '-')}", type=integers, default=values, metavar="N,N,...", help=f"(default: {shown})")
    add("--contexts", type=integers, metavar="N,N,...", help="prompts of about these lengths only")
    add("--rows", type=int, default=8192, help="rows of a timed chunk (default: %(default)s)")
    add("--cost", choices=("auto", "measured", "formula"), default="auto", help="measured needs an sm_90 GPU")
    add("--backend", choices=("reference", "gpu", "auto"), default="auto", help="of the selections compared")
    add("--json", type=Path, metavar="FILE", help="also write what every option finds and costs")
    add("--quiet", action="store_true", help="no progress bar")
    add_parameter_flags(parser, without=TUNED)


def run(args: argparse.Namespace) -> int:
    """Recall of every option on every trace, the cost of those that pass, the choice, the file."""
    check_arguments(args)
    base, grid = parameters_of(args, without=TUNED), grid_of(args)
    traces = traces_of(args)
    model, num_layers = shape_of(args, traces, base.top_k)
    how = timing(args.cost, args.rows, traces[0].q)
    refused = refused_options(args.modes, grid, model)
    samples = trace_samples(traces, args.contexts)
    quiet = args.quiet or not sys.stderr.isatty()
    if args.backend != "reference" or how is not None:
        refused |= broken_options(args.modes, grid, refused, traces[0].q, quiet)
    measured = recalls(samples, grid, args, refused, quiet)
    found, target = gather(measured), Target(args.recall_target, args.recall_min)
    # Of all layers: one that was not traced at the longest prompts would run there what nobody has measured.
    contexts = {sample.context for sample in samples}
    layers = sorted({sample.layer or 0 for sample in samples})
    able = {layer: passing(found.get(layer, {}), target, contexts) for layer in layers}
    if how is None:
        costs = formula_costs(measured)
    else:
        with tqdm(total=len(samples), file=sys.stderr, disable=quiet, desc="time", unit="trace") as bar:
            costs = time_costs(samples, able, base, how, bar.update)
    choices = [choose_layer(layer, found.get(layer, {}), target, contexts, costs) for layer in layers]
    facts: dict[str, Any] = {
        "model": traces[0].model,
        "num_layers": num_layers,
        "heads": model.heads,
        "top_k": model.top_k,
        "recall_target": target._asdict(),
        "contexts": sorted(contexts),
        "traces": len(samples),
        "cost": FORMULA if how is None else how.note,
        "share_of_native": round(sum(choice.share for choice in choices) / len(choices), 4),
        **where_and_when(),
    }
    starts = None if how is None else shortest_prompts(samples)
    write_settings_file(args.out, file_content(choices, base, num_layers, starts, facts))
    print(report(choices, facts, refused))
    asked = {option_of(mode, params) for mode in args.modes for params in grid} - refused.keys()
    untold = {option.mode for option in asked} - {one.mode for one in measured}
    if unseen := [mode for mode in args.modes if mode in untold]:
        print(f"not measured, no row of the traces can tell: {', '.join(unseen)}")
    if args.json:
        args.json.write_text(json.dumps(record(facts, found, costs, refused), indent=1) + "\n")
        print(f"wrote {args.json}")
    print(f"wrote {args.out}; to serve with it: SGLANG_EXT_SETTINGS_FILE={args.out}")
    return 0


def recalls(
    samples: Sequence[Sample],
    grid: Sequence[IndexerParams],
    args: argparse.Namespace,
    refused: Collection[Option],
    quiet: bool,
) -> list[Measured]:
    """What every mode finds with every set of parameters it depends on, those of `refused` left out."""
    device = "cuda" if args.backend != "reference" and torch.cuda.is_available() else "cpu"
    measured = []

    def skips(mode: str, params: IndexerParams) -> bool:
        return option_of(mode, params) in refused

    total = len(samples) * len(grid) * len(args.modes)
    with tqdm(total=total, file=sys.stderr, disable=quiet, desc="recall", unit="run") as bar:
        for one in evaluate(samples, args.modes, grid, args.backend, device, skips):
            if one is not None:
                measured.append(one)
            bar.update()
    return measured


def shortest_prompts(samples: Sequence[Sample]) -> dict[int, int]:
    """Nominal context -> tokens of the shortest prompt that counts as one of it."""
    shortest: dict[int, int] = {}
    for sample in samples:
        tokens = sample.tensors[2].shape[0]
        shortest[sample.context] = min(tokens, shortest.get(sample.context, tokens))
    return shortest


def report(choices: Sequence[Choice], facts: Mapping[str, Any], refused: Mapping[Option, str]) -> str:
    """One line per layer, and what the costs are."""
    lines = [f"{facts['traces']} traces of {facts['model']}; cost: {facts['cost']}"]
    lines += [f"left out, no server runs it: {option.shown}: {why}" for option, why in refused.items()]
    for choice in choices:
        what = "native" if choice.option is None else f"{choice.share:.2f} of native's cost"
        lines.append(f"layer {choice.layer:>3}  {what:<24}  {choice.why}")
    lines.append(f"all traced layers: {facts['share_of_native']:.2f} of native's cost")
    return "\n".join(lines)


def record(
    facts: Mapping[str, Any], found: Mapping[int, Mapping[Option, Found]], costs: Costs, refused: Mapping[Option, str]
) -> dict[str, Any]:
    """Everything measured: what another target would have chosen from."""
    options = [
        {
            "layer": layer,
            "mode": option.mode,
            "params": dict(option.values),
            "contexts": {
                context: {
                    "rows": len(rows),
                    "recall_mean": sum(rows) / len(rows),
                    "recall_min": min(rows),
                    "cost": costs[layer, option, context]._asdict() if (layer, option, context) in costs else None,
                }
                for context, rows in sorted(one.recall.items())
            },
        }
        for layer, of_layer in sorted(found.items())
        for option, one in of_layer.items()
    ]
    left_out = {option.shown: why for option, why in refused.items()}
    return {"what": "sglang-ext tune", "tuned_on": dict(facts), "options": options, "left_out": left_out}
