"""Device time of a selection, as a server sees it: launches queued ahead, runs interleaved, medians."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.page_layout import PAGE_TOKENS, pack_pages
from indexer_kernels.row_plan import plan_extend
from indexer_kernels.top_k import TopK, torch_top_k
from sglang_ext.cli.recall import Sample

WAIT_CYCLES = 4_000_000  # some 2 ms in which a call's kernels are launched
WARM_UPS = 2
Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Milliseconds of one call: on the device, and on the host until everything is launched."""

    device: float
    launch: float


def timed(work: Callable[[], object]) -> Timing:
    """One call, launched while the device is still busy with something else, as it is in a server: its kernels follow
    each other without waiting for the host.
    """
    wait = WAIT_CYCLES
    while True:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(wait)
        begin.record()
        began = time.perf_counter()
        work()
        launch = 1e3 * (time.perf_counter() - began)
        end.record()
        in_time = not begin.query()
        torch.cuda.synchronize()
        if in_time:
            return Timing(begin.elapsed_time(end), launch)
        if wait > 64 * WAIT_CYCLES:
            raise RuntimeError(f"a call took {launch:.0f} ms to launch: something in it waits for the device")
        wait *= 2


def interleaved_medians(
    work: Mapping[Name, Callable[[], object]], rounds: int, timer: Callable[[Callable[[], object]], Timing] = timed
) -> dict[Name, float]:
    """Median device milliseconds of each call over `rounds`, in each of which all run one after the other.

    Rounds that come before them compile and warm up, and do not count.
    """
    spent: dict[Name, list[float]] = {name: [] for name in work}
    for turn in range(WARM_UPS + rounds):
        for name, call in work.items():
            milliseconds = timer(call).device
            if turn >= WARM_UPS:
                spent[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in spent.items()}


class StageCase:
    """The last `rows` rows of a trace's prompt, whose queries are the trace's over and over: enough to fill a chunk.

    Keys lie in shuffled pages, as in a server's cache. top_k_kernel: SGLang's, if it is installed.
    """

    def __init__(self, sample: Sample, rows: int, top_k_kernel: TopK | None) -> None:
        q, weights, k, k_scale = sample.tensors[:4]
        context, count, device = k.shape[0], min(rows, k.shape[0]), k.device
        picked = torch.arange(count, device=device) % q.shape[0]
        self.q = q.view(torch.uint8)[picked].view(torch.float8_e4m3fn)
        self.weights = weights[picked].contiguous()
        padding = -context % PAGE_TOKENS
        padded = torch.nn.functional.pad(k.view(torch.uint8), (0, 0, 0, padding)).view(torch.float8_e4m3fn)
        self.k, self.k_scale = padded, torch.nn.functional.pad(k_scale, (0, padding))
        pages = pack_pages(self.k, self.k_scale)
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).to(device)
        self.pool = torch.empty_like(pages)
        self.pool[order] = pages
        self.page_table = order.to(torch.int32)[None]
        self.plan = plan_extend([context - count], [count], device)
        self.top_k_kernel = top_k_kernel

    def native(self, top_k: int) -> torch.Tensor:
        """What SGLang runs: DeepGEMM's scores of all keys with all heads, then its top-k (without its key gather)."""
        from indexer_kernels.gpu.deep_gemm_logits import contiguous_logits

        out = torch.empty((len(self.q), top_k), dtype=torch.int32, device=self.q.device)
        scores = contiguous_logits(self.q, self.weights, self.k, self.k_scale, self.plan.row_lengths)
        (self.top_k_kernel or torch_top_k)(scores, self.plan.row_lengths, None, out)
        return out

    def mode(self, mode: str, params: IndexerParams, backend: str = "gpu", output: str = "slot") -> torch.Tensor:
        """Everything from q, gates and index pages to cache slots."""
        return select_rows(
            mode,
            self.q,
            self.weights,
            self.pool,
            self.page_table,
            self.plan,
            params,
            backend=backend,
            output=output,
            top_k_kernel=self.top_k_kernel,
        )


def stage_milliseconds(
    case: StageCase, choices: Mapping[Name, tuple[str, IndexerParams]], top_k: int, rounds: int
) -> tuple[float, dict[Name, float]]:
    """(native's, each choice's) median device milliseconds of a layer's selection, interleaved. Needs an sm_90 GPU."""
    work: dict[Any, Callable[[], object]] = {None: partial(case.native, top_k)}
    work |= {name: partial(case.mode, mode, params) for name, (mode, params) in choices.items()}
    medians = interleaved_medians(work, rounds)
    return medians.pop(None), medians
