"""What a layer's selection costs, for `sglang-ext tune`: timed on a GPU, or by the formulas."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from indexer_kernels import IndexerParams
from indexer_kernels.backend import gpu_refusal
from indexer_kernels.top_k import TopK
from sglang_ext.cli.recall import Measured, Sample
from sglang_ext.cli.stage_time import StageCase, stage_milliseconds
from sglang_ext.cli.tune_choice import Cost, Option, option_of

FORMULA = (
    "products of heads and keys from the formulas; nothing was timed: gathers, launches and top-k cost nothing in it, "
    "and prefill stays native below auto's own break-even"
)
ROUNDS = 5
Costs = dict[tuple[int, Option, int], Cost]  # of (layer, option, context)


class Timed(NamedTuple):
    """How costs are timed: rows of a chunk, and the top-k kernel, SGLang's where it can be imported."""

    rows: int
    top_k_kernel: TopK | None

    @property
    def note(self) -> str:
        """What was timed, in one sentence."""
        kernel = "SGLang's" if self.top_k_kernel else "torch's (SGLang cannot be imported here)"
        return (
            f"device milliseconds of {self.rows} rows on one {torch.cuda.get_device_name()}, medians of {ROUNDS}, "
            f"interleaved with native, top-k {kernel}"
        )


def timing(cost: str, rows: int, q: torch.Tensor) -> Timed | None:
    """How to time, or None for formulas. cost: "auto", "measured" or "formula"; q: any queries of the model.

    Raises ValueError where "measured" cannot be.
    """
    refusal: str | None = "there is no GPU here"
    if torch.cuda.is_available():
        refusal = gpu_refusal("native", q[:0].to("cuda"), IndexerParams())
    if cost == "measured" and refusal is not None:
        raise ValueError(f"--cost measured: {refusal}")
    if cost == "formula" or refusal is not None:
        return None
    try:
        from sglang_ext.sglang_hooks import sglang_top_k
    except ImportError:
        return Timed(rows, None)
    return Timed(rows, sglang_top_k)


def time_costs(
    samples: Sequence[Sample],
    able: Mapping[int, Sequence[Option]],
    base: IndexerParams,
    how: Timed,
    done: Callable[[], object],
) -> Costs:
    """Times the options of `able` on every sample of their layer; several samples of one context add up.

    Raises ValueError where the device cannot: out of memory, or a call that waits for it.
    """
    costs: Costs = {}
    for sample in samples:
        layer = sample.layer or 0
        if options := able[layer]:
            case = StageCase(sample.to("cuda"), how.rows, how.top_k_kernel)
            choices = {option: (option.mode, option.params(base)) for option in options}
            try:
                native, of_option = stage_milliseconds(case, choices, base.top_k, ROUNDS)
            except RuntimeError as error:
                raise ValueError(
                    f"layer {layer} at {sample.context} tokens could not be timed: {error}; fewer --rows need less "
                    "memory, --cost formula needs no GPU"
                ) from error
            for option, spent in of_option.items():
                before = costs.get((layer, option, sample.context), Cost(0.0, 0.0))
                costs[layer, option, sample.context] = Cost(before.native + native, before.option + spent)
            del case
        done()
    return costs


def formula_costs(measured: Sequence[Measured]) -> Costs:
    """Products of heads and keys, means over the measured rows of a layer and context."""
    rows: dict[tuple[int, Option, int], list[tuple[float, float]]] = {}
    for one in measured:
        pairs = [(n.head_products, w.head_products) for n, w in zip(one.native_work, one.work)]
        rows.setdefault((one.layer or 0, option_of(one.mode, one.params), one.context), []).extend(pairs)
    means = {key: [sum(values) / len(pairs) for values in zip(*pairs)] for key, pairs in rows.items()}
    return {key: Cost(*pair) for key, pair in means.items()}
