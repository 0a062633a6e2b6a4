"""What GPU tests share: a batch as the pipeline takes it, and a captured decode step replayed at other lengths."""

from collections.abc import Callable

import torch

from indexer_kernels import IndexerParams
from indexer_kernels.gpu.work import Pool, Work
from indexer_kernels.top_k import torch_top_k
from tests.support.compare import assert_form
from tests.support.inputs import Batch

DECODE_LENGTHS = [9000, 4001, 9000, 700]


class CountingTopK:
    """`PlannedTopK` by torch.topk, which counts; a plan is a copy of its lengths, and must still be theirs."""

    def __init__(self) -> None:
        self.plans = self.calls = 0

    def plan(self, lengths: torch.Tensor) -> torch.Tensor:
        self.plans += 1
        return lengths.clone()

    def __call__(self, scores, lengths, page_table, out, page_tokens=64, plan=None) -> None:
        assert plan is not None and plan.shape == lengths.shape
        self.calls += 1
        torch_top_k(scores, torch.minimum(lengths, plan), page_table, out, page_tokens)


def work_of(batch: Batch, params: IndexerParams) -> Work:
    """The batch as the steps of the pipeline take it, for positions."""
    pages = batch.k_pages
    pool = Pool(pages, pages.view(torch.float8_e4m3fn).view(-1, 128), pages.view(torch.float32).view(-1, 64))
    out = torch.empty((batch.plan.num_rows, params.top_k), dtype=torch.int32, device=pages.device)
    return Work(batch.q, batch.weights, pool, batch.page_table, batch.plan, params, False, torch_top_k, out)


def assert_a_graph_follows_the_lengths(select: Callable[[], torch.Tensor], lengths: torch.Tensor, top_k: int) -> None:
    """select() reads `lengths` [4] int32, at most DECODE_LENGTHS, on the GPU. Captured at one length and replayed at
    others, lengths of 0 and 1 included: nothing is read back, nothing frozen.
    """
    select()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select()
    for values in (DECODE_LENGTHS, [3000, 1, 8999, 64], [64, 4000, 0, 257]):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert_form(captured, values, top_k)
        assert torch.equal(captured.sort(dim=1).values, select().sort(dim=1).values)
