"""Token selection for DeepSeek Sparse Attention: references, and kernels for Hopper GPUs. No SGLang needed.

Letters used for shapes, here and everywhere below:
    M query rows    H indexer heads    A active (routed) heads    D head dim, 128    K selected tokens (top_k)
    N key tokens    R requests         B statistics blocks        P pages of 64 tokens    W page-table width    T row
    tiles A block is a unit of statistics, a page one of memory, a tile one of a kernel's work; position counts in the
    request, slot in the cache.
"""

from indexer_kernels.params import MODES, IndexerParams
from indexer_kernels.select import select_paged, select_ragged
from indexer_kernels.stage import select_rows

__all__ = ["MODES", "IndexerParams", "select_paged", "select_ragged", "select_rows"]
