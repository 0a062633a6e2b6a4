"""Batches for tests, in both layouts, with poison wherever a correct selection never looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from indexer_kernels.page_layout import HEAD_DIM, KEY_BYTES, PAGE_BYTES, PAGE_TOKENS
from indexer_kernels.row_plan import RowPlan, plan_extend

NAN_BYTE = 0x7F  # float8_e4m3fn NaN
GARBAGE_PAGES = (2**30, -1, -(2**31))
SPARE_PAGES = 5  # pool pages that no request owns
SPARE_COLUMNS = 3  # page-table entries past the longest request's last page

Values = Literal["normal", "small_ints"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The last rows of several requests. M rows, R requests, N = all tokens.

    q [M, H, 128] fp8 e4m3, weights [M, H] f32
    k, k_scale              per request: [length, 128] fp8 e4m3, [length] f32
    k_pages [P, 8448] uint8, page_table [R, W] int32, plan: the paged layout; unused pages and the unused rest of a
                            last page are NaN, table entries past a request's last page are no page ids
    k_all [N, 128], k_scale_all [N], ks, ke [M] int32: the ragged layout, requests one after the other
    row_request, lengths    per row, host ints: request, and tokens the row sees
    """

    q: torch.Tensor
    weights: torch.Tensor
    k: list[torch.Tensor]
    k_scale: list[torch.Tensor]
    k_pages: torch.Tensor
    page_table: torch.Tensor
    plan: RowPlan
    k_all: torch.Tensor
    k_scale_all: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    row_request: list[int]
    lengths: list[int]

    @property
    def ragged(self) -> tuple[torch.Tensor, ...]:
        """The tensors of `select_ragged`, in its order."""
        return self.q, self.weights, self.k_all, self.k_scale_all, self.ks, self.ke

    @property
    def paged(self) -> tuple[torch.Tensor | RowPlan, ...]:
        """The tensors and the plan of `select_rows`, in its order."""
        return self.q, self.weights, self.k_pages, self.page_table, self.plan


def make_batch(
    request_lengths: Sequence[int],
    rows_per_request: int | Sequence[int],
    num_heads: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    values: Values = "normal",
) -> Batch:
    """Random batch; its rows are the last rows_per_request rows of each request.

    "normal": Gaussian q and k, gates of mixed sign, key scales in [0.5, 1.5]. "small_ints": q and k entries in -2 .. 2,
    gates and scales powers of two, so that scores are exact in float32 in any order of summation, and ties are
    frequent. Equal arguments give equal values on every device.
    """
    counts = [rows_per_request] * len(request_lengths) if isinstance(rows_per_request, int) else list(rows_per_request)
    if len(counts) != len(request_lengths) or any(n > length for n, length in zip(counts, request_lengths)):
        raise ValueError(f"rows_per_request={counts} must be one count per request, at most {list(request_lengths)}")
    random = torch.Generator().manual_seed(seed)
    q = _fp8((sum(counts), num_heads, HEAD_DIM), values, random)
    weights = _factors((sum(counts), num_heads), values, random) * _signs((sum(counts), num_heads), random)
    k = [_fp8((length, HEAD_DIM), values, random) for length in request_lengths]
    k_scale = [_factors((length,), values, random) for length in request_lengths]
    k_pages, page_table = _scatter_pages(k, k_scale, random)

    row_request = [r for r, count in enumerate(counts) for _ in range(count)]
    prefixes = [length - count for length, count in zip(request_lengths, counts)]
    lengths = [prefix + i + 1 for prefix, count in zip(prefixes, counts) for i in range(count)]
    starts = [sum(request_lengths[:r]) for r in row_request]
    ends = [start + length for start, length in zip(starts, lengths)]
    k_all = torch.cat([part.view(torch.uint8) for part in k] or [torch.empty((0, HEAD_DIM), dtype=torch.uint8)])
    k_scale_all = torch.cat(k_scale or [torch.empty(0)])
    return Batch(
        q=q.to(device),
        weights=weights.to(device),
        k=[part.to(device) for part in k],
        k_scale=[part.to(device) for part in k_scale],
        k_pages=k_pages.to(device),
        page_table=page_table.to(device),
        plan=plan_extend(prefixes, counts, device),
        k_all=k_all.view(torch.float8_e4m3fn).to(device),
        k_scale_all=k_scale_all.to(device),
        ks=torch.tensor(starts, dtype=torch.int32, device=device),
        ke=torch.tensor(ends, dtype=torch.int32, device=device),
        row_request=row_request,
        lengths=lengths,
    )


def slots_of(batch: Batch, row: int, positions: Sequence[int]) -> list[int]:
    """Cache slots of positions in the request of a row."""
    pages = batch.page_table[batch.row_request[row]].tolist()
    return [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in positions]


def _fp8(shape: tuple[int, ...], values: Values, random: torch.Generator) -> torch.Tensor:
    if values == "small_ints":
        return torch.randint(-2, 3, shape, generator=random).float().to(torch.float8_e4m3fn)
    return torch.randn(shape, generator=random).to(torch.float8_e4m3fn)


def _factors(shape: tuple[int, ...], values: Values, random: torch.Generator) -> torch.Tensor:
    """Positive float32: a power of two in 0.5 .. 2, or anything in 0.5 .. 1.5."""
    if values == "small_ints":
        return 2.0 ** torch.randint(-1, 2, shape, generator=random).float()
    return torch.rand(shape, generator=random) + 0.5


def _signs(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Three quarters +1, the rest -1."""
    return torch.where(torch.rand(shape, generator=random) < 0.75, 1.0, -1.0)


def _scatter_pages(
    k: Sequence[torch.Tensor], k_scale: Sequence[torch.Tensor], random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_pages, page_table) with the requests' pages shuffled over a pool of poisoned pages."""
    num_pages = [-(-len(part) // PAGE_TOKENS) for part in k]
    pool_pages, width = sum(num_pages) + SPARE_PAGES, max(num_pages, default=0) + SPARE_COLUMNS
    pool_keys = torch.full((pool_pages, PAGE_TOKENS, HEAD_DIM), NAN_BYTE, dtype=torch.uint8)
    pool_scales = torch.full((pool_pages, PAGE_TOKENS), float("nan"))
    garbage = torch.tensor(GARBAGE_PAGES, dtype=torch.int32)
    page_table = garbage[torch.arange(len(k) * width) % len(garbage)].view(len(k), width).clone()
    free = torch.randperm(pool_pages, generator=random).tolist()
    for request, (keys, scales) in enumerate(zip(k, k_scale)):
        for column in range(num_pages[request]):
            page, tokens = free.pop(), slice(column * PAGE_TOKENS, (column + 1) * PAGE_TOKENS)
            page_table[request, column] = page
            pool_keys[page, : len(keys[tokens])] = keys[tokens].view(torch.uint8)
            pool_scales[page, : len(scales[tokens])] = scales[tokens]
    k_pages = torch.empty((pool_pages, PAGE_BYTES), dtype=torch.uint8)
    k_pages[:, :KEY_BYTES] = pool_keys.view(pool_pages, KEY_BYTES)
    k_pages[:, KEY_BYTES:] = pool_scales.view(torch.uint8).view(pool_pages, PAGE_TOKENS * 4)
    return k_pages, page_table
