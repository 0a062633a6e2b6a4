"""The kernels of `sglang-ext tune`, compiled before it measures: one after the other they took longer than all else."""

import sys
from collections.abc import Collection, Iterable, Sequence

import torch
from tqdm import tqdm

from indexer_kernels import IndexerParams
from indexer_kernels.backend import gpu_refusal
from sglang_ext.cli.tune_choice import Option, option_of


def kernels_serve(mode: str, q: torch.Tensor, params: IndexerParams) -> bool:
    """Whether this machine's GPU runs the mode by kernels. q: any queries of the model."""
    return torch.cuda.is_available() and gpu_refusal(mode, q[:0].to("cuda"), params) is None


def broken_options(
    modes: Iterable[str],
    grid: Sequence[IndexerParams],
    refused: Collection[Option],
    q: torch.Tensor,
    quiet: bool,
) -> dict[Option, str]:
    """Compiles, at once, what every option of the grid that is not `refused` runs on this GPU, and native's kernels.

    Returns the options with a kernel that does not compile, and the compiler's words. Nothing is compiled where no
    kernel runs. An error of native's is left to the measurement, which cannot do without it.
    """
    asked: dict[Option, tuple[str, IndexerParams]] = {}
    for params in grid:
        for mode in ("native", *modes):
            option = option_of(mode, params)
            if option not in asked and option not in refused and kernels_serve(mode, q, params):
                asked[option] = (mode, params)
    if not asked:
        return {}
    from indexer_kernels.gpu.compile_check import compile_each

    broken: dict[Option, str] = {}
    with tqdm(total=len(asked), file=sys.stderr, disable=quiet, desc="compile", unit="option") as bar:
        for option, outcome in zip(asked, compile_each(list(asked.values()), q.shape[1])):
            errors = [f"kernel {name} does not compile: {error}" for name, error in outcome if error is not None]
            if errors and option.mode != "native":
                broken[option] = errors[0]
            bar.update()
    return broken
