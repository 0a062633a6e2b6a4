"""How much of native's selection each mode finds, on traces of a model or on synthetic data."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from indexer_kernels import IndexerParams, select_ragged
from indexer_kernels.reference.scores import token_scores
from indexer_kernels.synthetic import make_case
from indexer_kernels.traces import Trace
from sglang_ext.cli.work_counts import Work, count_work

GPU_REPEATS = 5
# The parameters that a mode's selection depends on; top_k is everyone's.
MODE_FIELDS: dict[str, tuple[str, ...]] = {
    "native": (),
    "misa": ("active_heads", "route_block", "route_statistic"),
    "misa_rerank": ("active_heads", "route_block", "route_statistic", "candidates", "candidate_unit", "local_tokens"),
    "hisa": ("block_size", "top_blocks", "local_tokens"),
    "group_rerank": ("group", "candidates", "local_tokens"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Rows of one request and its keys. layer: of the model, None for synthetic data; context: what it is listed
    under; tensors: the six of `select_ragged`, ks = 0; needles [M, n] int64 or None.
    """

    context: int
    layer: int | None
    tensors: tuple[torch.Tensor, ...]
    needles: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        return self.tensors[5]

    def to(self, device: str) -> "Sample":
        needles = None if self.needles is None else self.needles.to(device)
        return Sample(self.context, self.layer, tuple(tensor.to(device) for tensor in self.tensors), needles)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One mode with one set of parameters on one sample.

    recall, mass [rows] float64: see `shares_found`; kept, wanted: needle tokens the mode and native select; work of
    each row; seconds of one call.
    """

    context: int
    layer: int | None
    mode: str
    params: IndexerParams
    recall: torch.Tensor
    mass: torch.Tensor
    kept: int
    wanted: int
    work: list[Work]
    native_work: list[Work]
    seconds: float


def synthetic_sample(context: int, rows: int, heads: int, seed: int) -> Sample:
    """The last rows of a made-up prompt."""
    case = make_case(context, rows, heads, seed)
    tensors = (case.q, case.weights, case.k, case.k_scale, case.ks, case.ke)
    return Sample(context, None, tensors, case.needles)


def trace_samples(traces: Sequence[Trace], contexts: Sequence[int] | None = None) -> list[Sample]:
    """Traces by context and layer, those of `contexts` (nominal lengths) only. Raises ValueError where none is left."""
    there = sorted({trace.nominal_context for trace in traces})
    samples = [
        Sample(trace.nominal_context, trace.layer, trace.case())
        for trace in traces
        if contexts is None or trace.nominal_context in contexts
    ]
    if not samples:
        raise ValueError(f"no trace has contexts={list(contexts or ())}; there are {there}")
    return sorted(samples, key=lambda sample: (sample.context, sample.layer or 0))


def selected_tokens(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[M, N] bool of the tokens in indices [M, K]; -1 is dropped into a column of its own."""
    flags = torch.zeros(indices.shape[0], num_tokens + 1, dtype=torch.bool, device=indices.device)
    return flags.scatter_(1, indices.long().where(indices >= 0, num_tokens), True)[:, :num_tokens]


def shares_found(scores: torch.Tensor, native: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of native's tokens that were found, and share of their attention mass: two float64 [M].

    With p = softmax(s) over the visible tokens: mass = sum_{j in native and found} p_j / sum_{j in native} p_j. The
    indexer is trained by KL divergence to match the attention (DeepSeek-V3.2 report), so p is the attention that it
    predicts. scores [M, N] f32; native, found [M, N] bool. A row for which native selects nothing has 1 and 1.
    """
    both = native & found
    recall = both.sum(1) / native.sum(1).clamp_min(1)
    # the softmax's denominator cancels; its shift must be native's own maximum
    logits = torch.where(native, scores.double(), float("-inf"))
    p = torch.exp(logits - logits.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).min))
    mass = torch.where(both, p, 0.0).sum(1) / p.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    nothing = ~native.any(1)
    return recall.double().masked_fill(nothing, 1.0), mass.masked_fill(nothing, 1.0)


def measured_rows(mode: str, lengths: torch.Tensor, params: IndexerParams) -> torch.Tensor:
    """[M] bool: rows that say something about the mode.

    A row that sees at most top_k tokens has nothing to choose, and is left out where others have. group_rerank averages
    the rows of a group that are there: one whose group is not whole would find too much.
    """
    rows = lengths > params.top_k
    if not rows.any():
        rows = torch.ones_like(rows)
    if mode != "group_rerank":
        return rows
    positions = (lengths - 1).tolist()
    there, last = set(positions), max(positions)
    starts = (position // params.group * params.group for position in positions)
    whole = [there.issuperset(range(start, min(start + params.group, last + 1))) for start in starts]
    return rows & torch.tensor(whole, device=rows.device)


def evaluate(
    samples: Sequence[Sample],
    modes: Sequence[str],
    settings: Sequence[IndexerParams],
    backend: str,
    device: str,
    skips: Callable[[str, IndexerParams], bool] = lambda mode, params: False,
) -> Iterator[Measured | None]:
    """Every mode with every set of parameters on every sample, sample by sample.

    None stands for a run that was not needed: a mode without a row to measure, of whose parameters none changed, or
    that `skips` names with its parameters.
    """
    warm = samples[0].to(device).tensors
    _select("native", tuple(t[:1] for t in warm[:2]) + warm[2:4] + tuple(t[:1] for t in warm[4:]), settings[0], backend)
    for moved in (sample.to(device) for sample in samples):
        scores = token_scores(*moved.tensors[:4])
        native: dict[int, torch.Tensor] = {}
        done: set[tuple[object, ...]] = set()
        for params in settings:
            if params.top_k not in native:
                native[params.top_k] = selected_tokens(
                    _select("native", moved.tensors, params, backend), scores.shape[1]
                )
            for mode in modes:
                key = (mode, *relevant(mode, params).items())
                rows = measured_rows(mode, moved.lengths, params)
                if key in done or not rows.any() or skips(mode, params):
                    yield None
                    continue
                done.add(key)
                yield _measure(mode, moved, params, backend, device, rows, scores, native[params.top_k])


def relevant(mode: str, params: IndexerParams) -> dict[str, object]:
    """The parameters that the mode's selection depends on."""
    return {name: getattr(params, name) for name in ("top_k", *MODE_FIELDS[mode])}


def _measure(
    mode: str,
    sample: Sample,
    params: IndexerParams,
    backend: str,
    device: str,
    rows: torch.Tensor,
    scores: torch.Tensor,
    native: torch.Tensor,
) -> Measured:
    seconds, chosen = _timed(partial(_select, mode, sample.tensors, params, backend), device)
    found = selected_tokens(chosen, scores.shape[1])
    recall, mass = shares_found(scores[rows], native[rows], found[rows])
    kept = wanted = 0
    if sample.needles is not None:
        needles = native.gather(1, sample.needles)
        wanted, kept = int(needles.sum()), int((found.gather(1, sample.needles) & needles).sum())
    lengths, heads = sample.lengths[rows].tolist(), sample.tensors[0].shape[1]
    return Measured(
        context=sample.context,
        layer=sample.layer,
        mode=mode,
        params=params,
        recall=recall.cpu(),
        mass=mass.cpu(),
        kept=kept,
        wanted=wanted,
        work=[count_work(mode, length, heads, params) for length in lengths],
        native_work=[count_work("native", length, heads, params) for length in lengths],
        seconds=seconds,
    )


def _select(mode: str, tensors: Sequence[torch.Tensor], params: IndexerParams, backend: str) -> torch.Tensor:
    q, weights, k, k_scale, ks, ke = tensors
    return select_ragged(mode, q, weights, k, k_scale, ks, ke, params, backend)


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
