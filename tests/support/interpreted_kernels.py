"""Runs the token kernels in Triton's interpreter, on a CPU, against the references.

A program of its own: the interpreter is chosen when triton is imported, and must not reach the tests that compile.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels

Prints how many rows were compared; an assertion ends it.
"""

import torch

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import token_rerank_kernel, token_select_kernel
from indexer_kernels.reference.candidates import token_candidates
from indexer_kernels.reference.scores import token_scores
from tests.support.inputs import Batch, make_batch

PARAMS = IndexerParams(top_k=64, candidates=384, local_tokens=40, active_heads=2, route_block=64)
SHAPES = (([700, 131, 1, 385, 384], [6, 3, 1, 3, 2]), ([1500], [5]))


def scores_of(values: str, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] f32: all different, or few values with many ties at the boundary, zeros of both signs."""
    generator = torch.Generator().manual_seed(1)
    if values == "normal":
        return torch.randn((rows, columns), generator=generator)
    scores = torch.randint(-3, 4, (rows, columns), generator=generator).float()
    return torch.where((scores == 0) & (torch.rand((rows, columns), generator=generator) < 0.5), -0.0, scores)


def check_select(batch: Batch, values: str) -> token_select_kernel.TokenCandidates:
    """Candidates of every row are the reference's, ascending, as positions and as slots; places without a row write
    nothing, and scores of rows within the budget are not read (they are NaN).
    """
    rows, lengths = batch.plan.num_rows, batch.plan.row_lengths
    scores = scores_of(values, rows, -(-batch.plan.max_length // 64) * 64 + 8)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    places = torch.cat([order, torch.tensor([-1, -1])]).int()
    placed = torch.full((rows + 2, scores.shape[1]), float("nan"))
    placed[:rows] = torch.where((lengths > PARAMS.candidates)[order][:, None], scores[order], float("nan"))
    found = token_select_kernel.empty_token_candidates(rows, PARAMS.candidates, torch.device("cpu"))
    plan, table = batch.plan, batch.page_table
    token_select_kernel.token_select(placed, places, lengths, plan.row_request, table, found, PARAMS.local_tokens)
    for row, (length, request) in enumerate(zip(lengths.tolist(), plan.row_request.tolist())):
        want = token_candidates(scores[row : row + 1, :length], lengths[row : row + 1], PARAMS)[0].nonzero()[:, 0]
        count = int(found.counts[row])
        assert torch.equal(found.positions[row, :count].long(), want), (values, row, count, len(want))
        slots = table[request].long()[want // 64] * 64 + want % 64
        assert torch.equal(found.slots[row, :count].long(), slots), (values, row)
    return found


def check_rerank(batch: Batch, found: token_select_kernel.TokenCandidates) -> None:
    """All-head scores of every candidate."""
    got = token_rerank_kernel.token_rerank(batch.q, batch.weights, batch.k_pages, found)
    for row, request in enumerate(batch.plan.row_request.tolist()):
        tensors = (batch.q[row : row + 1], batch.weights[row : row + 1], batch.k[request], batch.k_scale[request])
        count = int(found.counts[row])
        want = token_scores(*tensors)[0, found.positions[row, :count].long()]
        assert want.norm() > 0 and (got[row, :count] - want).norm() / want.norm() < 1e-5, row


def main() -> None:
    token_select_kernel.BLOCK = 512  # several blocks a row on short rows
    compared = 0
    for lengths, rows in SHAPES:
        for num_heads, values in ((64, "normal"), (32, "ties")):
            batch = make_batch(lengths, rows, num_heads=num_heads, seed=5)
            check_rerank(batch, check_select(batch, values))
            compared += batch.plan.num_rows
    print(f"{compared} rows compared")


if __name__ == "__main__":
    main()
