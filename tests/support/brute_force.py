"""The modes once more, written from their formulas as loops over rows: what the reference is tested against.

Shares no code with the package. Scores are float64; a row is a sorted() over (-score, index).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

PAGE = 64


class Row(NamedTuple):
    """One query row: q [H, D] and weights [H] f64, its request's keys [n, D] f64 and scales [n] f64, n = tokens it
    sees.
    """

    q: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor

    @property
    def length(self) -> int:
        return len(self.scales)


def brute_force(
    mode: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: Sequence[int],
    ke: Sequence[int],
    *,
    top_k: int,
    active_heads: int,
    route_block: int,
    route_statistic: str,
    candidates: int,
    block_size: int,
    top_blocks: int,
    group: int,
    local_tokens: int,
    candidate_unit: str,
) -> list[set[int]]:
    """The selected positions of every row, as sets, relative to ks. Arguments as in select_ragged."""
    rows = []
    for m, (start, end) in enumerate(zip(ks, ke)):
        seen = slice(start, max(start, end))
        rows.append(Row(q[m].double(), weights[m].double(), k[seen].double(), k_scale[seen].double()))
    selected = []
    for m, row in enumerate(rows):
        pool = set(range(row.length))
        scores = head_sum(row, range(len(row.weights)))
        if mode in ("misa", "misa_rerank") and row.length >= route_block:
            routed = head_sum(row, routed_heads(row, route_block, route_statistic, active_heads))
            if mode == "misa":
                scores = routed
            elif candidate_unit == "page":
                pool = best_pages(routed, row.length, candidates // PAGE, local_tokens)
            else:
                forced = forced_tokens(row.length, local_tokens)
                pool = forced | best(routed, pool - forced, candidates - len(forced))
        elif mode == "hisa":
            pool = best_blocks(row, block_size, top_blocks, local_tokens)
        elif mode == "group_rerank" and row.length:
            first = (row.length - 1) // group * group
            members = [
                other
                for other, begin in zip(rows, ks)
                if begin == ks[m] and other.length and (other.length - 1) // group == (row.length - 1) // group
            ]
            scan = set(range(first + 1))
            forced = forced_tokens(first + 1, local_tokens)
            proxy_scores = head_sum(proxy_row(row, members), range(len(row.weights)))
            pool = forced | best(proxy_scores, scan - forced, candidates - len(forced)) | set(range(first, row.length))
        selected.append(best(scores, pool, top_k))
    return selected


def head_sum(row: Row, heads: Iterable[int]) -> list[float]:
    """k_scale[j] * sum over heads of w[h] * relu(q[h] . k[j]), for every token of the row."""
    total = torch.zeros(row.length, dtype=torch.float64)
    for head in heads:
        total += row.weights[head] * (row.keys @ row.q[head]).clamp_min(0)
    return (row.scales * total).tolist()


def proxy_row(row: Row, members: Sequence[Row]) -> Row:
    """The row with the members' mean query, rounded to fp8 after division by a power of two, and their mean gate."""
    q, weights = row.q.clone(), row.weights.clone()
    for head in range(len(weights)):
        mean = sum(other.q[head] for other in members) / len(members)
        largest = float(mean.abs().max())
        unit = 2.0 ** math.ceil(math.log2(largest / 448)) if largest else 1.0
        q[head] = (mean / unit).to(torch.float8_e4m3fn).double() * unit
        weights[head] = sum(other.weights[head] for other in members) / len(members)
    return row._replace(q=q, weights=weights)


def best(scores: Sequence[float], pool: Iterable[int], count: int) -> set[int]:
    """The count largest of the pool, ties to the lower index."""
    return set(sorted(pool, key=lambda j: (-scores[j], j))[: max(count, 0)])


def forced_tokens(length: int, local_tokens: int) -> set[int]:
    return set(range(min(PAGE, length))) | set(range(max(0, length - local_tokens), length))


def full_block_means(row: Row, size: int) -> list[torch.Tensor]:
    """Mean dequantised key of every block that ends at or before the row's end, as bfloat16: of its pages' bfloat16
    means where it is made of whole pages.
    """

    def mean_of(start: int, tokens: int) -> torch.Tensor:
        if tokens > PAGE and tokens % PAGE == 0:
            mean = sum(mean_of(page, PAGE) for page in range(start, start + tokens, PAGE)) / (tokens // PAGE)
        else:
            block = slice(start, start + tokens)
            mean = (row.keys[block] * row.scales[block, None]).sum(0) / tokens
        return mean.float().bfloat16().double()

    return [mean_of(start, size) for start in range(0, row.length - size + 1, size)]


def routed_heads(row: Row, route_block: int, statistic: str, active_heads: int) -> list[int]:
    means = full_block_means(row, route_block)
    joined = {"sum": sum, "max": max}[statistic]
    importance = [
        joined(abs(float(row.weights[h]) * max(0.0, float(row.q[h] @ mean))) for mean in means)
        for h in range(len(row.weights))
    ]
    return sorted(range(len(importance)), key=lambda h: (-importance[h], h))[:active_heads]


def best_blocks(row: Row, size: int, top_blocks: int, local_tokens: int) -> set[int]:
    scores = {
        b: sum(float(w) * max(0.0, float(q @ mean)) for q, w in zip(row.q, row.weights))
        for b, mean in enumerate(full_block_means(row, size))
    }
    forced = {j // size for j in range(max(0, row.length - local_tokens), row.length)} | ({0} if row.length else set())
    others = sorted(scores.keys() - forced, key=lambda b: (-scores[b], b))
    kept = forced | set(others[: max(0, top_blocks - len(forced))])
    return {j for j in range(row.length) if j // size in kept}


def best_pages(scores: Sequence[float], length: int, num_pages: int, local_tokens: int) -> set[int]:
    value: dict[int, float] = {}
    for j in range(length):
        value[j // PAGE] = max(value.get(j // PAGE, float("-inf")), scores[j])
    forced = {j // PAGE for j in forced_tokens(length, local_tokens)}
    others = sorted(value.keys() - forced, key=lambda p: (-value[p], p))
    kept = forced | set(others[: max(0, num_pages - len(forced))])
    return {j for j in range(length) if j // PAGE in kept}
