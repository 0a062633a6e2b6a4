"""How much one row has to score and read in each mode: arithmetic from the formulas, not a measurement."""

from dataclasses import dataclass

from indexer_kernels import IndexerParams

PAGE_TOKENS = 64
KEY_BYTES = 128 + 4  # fp8 key and its f32 scale
MEAN_BYTES = 128 * 4  # f32 block mean


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one row.

    tokens_all_heads: tokens scored with every head; tokens_routed: with the routed heads only;
    head_products: dot products of one head with one key or block mean; key_bytes: keys, scales and means it reads, were
    it alone (rows of a tile share their reads on a GPU; a group's scan is divided by the group).
    """

    tokens_all_heads: float
    tokens_routed: float
    head_products: float
    key_bytes: float


def is_covered(mode: str, length: int, params: IndexerParams) -> bool:
    """Whether the mode's budget covers every token of a row of this length: its result is native's by definition."""
    budget = {
        "native": length,
        "misa": params.top_k,
        "misa_rerank": params.candidates,
        "group_rerank": params.candidates,
        "hisa": params.top_blocks * params.block_size,
    }[mode]
    return length <= budget or length <= params.top_k


def count_work(mode: str, length: int, heads: int, params: IndexerParams) -> Work:
    """Work of one row that sees `length` tokens. A covered row, or a misa row without a full block, is native."""
    if is_covered(mode, length, params) or (mode.startswith("misa") and length < params.route_block):
        return Work(length, 0, length * heads, length * KEY_BYTES)
    if mode == "hisa":
        blocks = length // params.block_size
        tokens = params.top_blocks * params.block_size
        return Work(tokens, 0, blocks * heads + tokens * heads, blocks * MEAN_BYTES + tokens * KEY_BYTES)
    if mode == "group_rerank":
        scanned = length / params.group
        scored = scanned + params.candidates
        return Work(scored, 0, scored * heads, scored * KEY_BYTES)
    blocks = length // params.route_block
    active = min(params.active_heads, heads)
    reranked = params.candidates if mode == "misa_rerank" else 0
    return Work(
        tokens_all_heads=reranked,
        tokens_routed=length,
        head_products=blocks * heads + length * active + reranked * heads,
        key_bytes=blocks * MEAN_BYTES + (length + reranked) * KEY_BYTES,
    )
