"""Settings small enough that every mode prunes within a few hundred tokens."""

from dataclasses import asdict, replace

from indexer_kernels import MODES, IndexerParams
from tests.support.brute_force import brute_force
from tests.support.inputs import Batch

SMALL = IndexerParams(
    top_k=64, active_heads=2, route_block=128, candidates=192, block_size=32, top_blocks=6, group=4, local_tokens=40
)
# Every mode, misa_rerank with both candidate units, misa with both routing statistics.
CASES = {mode: (mode, SMALL) for mode in MODES} | {
    "misa by maxima": ("misa", replace(SMALL, route_statistic="max", route_block=64)),
    "misa_rerank by pages": ("misa_rerank", replace(SMALL, candidate_unit="page", candidates=384)),
}


def brute_force_batch(mode: str, batch: Batch, params: IndexerParams) -> list[set[int]]:
    """`brute_force` of a batch's ragged form."""
    *tensors, ks, ke = batch.ragged
    return brute_force(mode, *tensors, ks.tolist(), ke.tolist(), **asdict(params))
