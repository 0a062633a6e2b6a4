"""What `sglang-ext tune` starts from: traces of one model, a grid of parameters, what a server could run of it."""

import argparse
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import replace

from indexer_kernels import IndexerParams
from indexer_kernels.traces import Trace, embedded_traces, load_traces
from sglang_ext.cli.doctor_checks import Model, kernel_refusal, model_of
from sglang_ext.cli.model_config import read_model_config
from sglang_ext.cli.parameter_flags import check_outputs, parameters_of
from sglang_ext.cli.tune_choice import TUNED, Option, option_of
from sglang_ext.settings import Settings


def check_arguments(args: argparse.Namespace) -> None:
    """What would fail only after minutes fails here. Raises ValueError naming the argument."""
    for name in ("recall_target", "recall_min"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be from 0 to 1")
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows} must be at least 1")
    if "native" in args.modes:
        raise ValueError("--modes native is not to be chosen from: it is what a layer runs where nothing else passes")
    if args.candidate_unit == "page" and "misa_rerank" in args.modes:
        raise ValueError("--candidate-unit page: auto does not run misa_rerank by pages (docs/quality.md)")
    check_outputs(args.json, None)
    check_outputs(args.out, None)
    if args.json and args.json.resolve() == args.out.resolve():
        raise ValueError(f"--json {args.json} is the file of --out: it would replace the settings")


def grid_of(args: argparse.Namespace) -> list[IndexerParams]:
    """Parameters of every combination. Raises ValueError naming a value that no server takes."""
    base = parameters_of(args, without=TUNED)
    axes = [sorted(set(getattr(args, name))) for name in TUNED]
    grid = [replace(base, **dict(zip(TUNED, values))) for values in itertools.product(*axes)]
    for params in grid:
        settings_with(params)
    return grid


def settings_with(params: IndexerParams) -> Settings:
    """A server's settings with these parameters. Raises ValueError where it would refuse them."""
    return Settings(**{name: getattr(params, name) for name in IndexerParams.__slots__ if name != "top_k"})


def traces_of(args: argparse.Namespace) -> list[Trace]:
    """Those named, or the package's. Raises ValueError where there are none, or of more than one model."""
    embedded = embedded_traces()
    paths = args.traces or ([embedded] if embedded else [])
    traces = [trace for path in paths for trace in load_traces(path)]
    if not traces:
        raise ValueError(f"--traces {' '.join(map(str, paths))}: there is none; scripts/capture_traces.py makes them")
    if not args.traces:
        print(f"no --traces: those of the package, of {traces[0].model}; the file is for that model only")
    for what, values in (
        ("models", {trace.model for trace in traces}),
        ("numbers of heads", {trace.q.shape[1] for trace in traces}),
    ):
        if len(values) > 1:
            raise ValueError(f"--traces are of several {what}: {', '.join(sorted(map(str, values)))}; name one model's")
    return traces


def shape_of(args: argparse.Namespace, traces: Sequence[Trace], top_k: int) -> tuple[Model, int]:
    """(indexer's shape, layers of the model). Without --model-path the layers are those up to the last one traced.

    Raises ValueError where the model's config does not fit the traces or --top-k.
    """
    heads, last = traces[0].q.shape[1], max(trace.layer for trace in traces)
    if args.model_path is None:
        return Model(heads, top_k), last + 1
    config = read_model_config(args.model_path)
    if config is None:
        raise ValueError(f"--model-path {args.model_path} has no config.json")
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int) or last >= num_layers:
        raise ValueError(f"--model-path {args.model_path}: num_hidden_layers={num_layers}, traces are of layer {last}")
    model = model_of(config)
    for name, served, here in (("index_n_heads", model.heads, heads), ("index_topk", model.top_k, top_k)):
        if served != here:
            raise ValueError(f"--model-path {args.model_path}: {name}={served}, traces and --top-k have {here}")
    return model, num_layers


def refused_options(modes: Sequence[str], grid: Sequence[IndexerParams], model: Model) -> dict[Option, str]:
    """What no server could run, and why. Nothing where TileLang, which knows, is not installed."""
    if importlib.util.find_spec("tilelang") is None:
        return {}
    asked = {option_of(mode, params): (mode, params) for mode in modes for params in grid}
    answers = {option: kernel_refusal(mode, settings_with(params), model) for option, (mode, params) in asked.items()}
    return {option: why for option, why in answers.items() if why is not None}
