"""Command-line flags that commands share: a flag per field of IndexerParams, lists, and files that can be written."""

import argparse
import dataclasses
import typing
from collections.abc import Collection
from pathlib import Path

from indexer_kernels import MODES, IndexerParams


def add_parameter_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """A group with one flag per field of IndexerParams, but for those that have a flag of another kind."""
    group = parser.add_argument_group("parameters of the modes")
    hints = typing.get_type_hints(IndexerParams)
    for field in dataclasses.fields(IndexerParams):
        if field.name in without:
            continue
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if kind is int:
            group.add_argument(flag, type=int, default=field.default, help="(default: %(default)s)")
        else:
            group.add_argument(
                flag, choices=typing.get_args(kind), default=field.default, help="(default: %(default)s)"
            )


def parameters_of(args: argparse.Namespace, without: Collection[str] = ()) -> IndexerParams:
    """The parameters of parsed flags. Raises ValueError naming a wrong one."""
    names = [field.name for field in dataclasses.fields(IndexerParams) if field.name not in without]
    return IndexerParams(**{name: getattr(args, name) for name in names})


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """--modes, --backend, --json, --plot, --quiet."""
    parser.add_argument("--modes", type=mode_names, default=list(MODES), metavar="MODE,...", help=f"{', '.join(MODES)}")
    parser.add_argument("--backend", choices=("reference", "gpu", "auto"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """What would fail only after minutes of work fails here. Raises ValueError naming the file."""
    if plot and plot.suffix != ".png":
        raise ValueError(f"--plot {plot} must end in .png")
    for path in (json_file, plot):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist")
        if path and path.is_dir():
            raise ValueError(f"{path} is a folder, it must be the name of a file")
    if plot:
        try:
            import matplotlib  # noqa: F401  (only asked whether it is there)
        except ModuleNotFoundError:
            raise ValueError("--plot needs matplotlib: pip install 'sglang-ext[plot]'") from None


def integers(text: str, smallest: int = 1) -> list[int]:
    """`4096,8192` as a list, for argparse."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of integers such as 4096,8192") from None
    if min(values) < smallest:
        raise argparse.ArgumentTypeError(f"'{text}' holds a value below {smallest}")
    return values


def layer_numbers(text: str) -> list[int]:
    """`0,1,2` as a list, for argparse."""
    return integers(text, smallest=0)


def mode_names(text: str) -> list[str]:
    """`native,misa` as a list, for argparse."""
    names = text.split(",")
    if unknown := [name for name in names if name not in MODES]:
        raise argparse.ArgumentTypeError(f"unknown mode {', '.join(unknown)}; known: {', '.join(MODES)}")
    return names
