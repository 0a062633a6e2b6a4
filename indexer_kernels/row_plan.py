"""Which request each query row belongs to and how many of its tokens it sees: built once per forward, shared by all
layers.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.row_groups import RowGroups, first_seen, group_rows
from indexer_kernels.upload import upload

Derived = TypeVar("Derived")
TILE_ROWS = 32  # rows that share one scan of the keys in the gpu backend; a tile never mixes requests


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """Rows of one forward over a paged key cache.

    row_request [M] int32   page-table row of each query row
    row_lengths [M] int32   tokens each row sees, its own included; 0: none
    request_lengths [R] int32  tokens the request's longest row sees (0 for a request without rows)
    max_length              host bound on row_lengths (exact unless planned from device lengths: then the page table's
    reach)
    tile_request [T] int32  page-table row of each tile of at most TILE_ROWS consecutive rows (longest tiles first)
    tile_rows [T, TILE_ROWS] int32 the rows of each tile, filled from the front, then -1
    tile_length [T] int32   tokens the tile's longest row sees
    row_place [M] int32     where a row sits in tile order: tile * TILE_ROWS + position
    host_rows               (request, length) of each row as int64 [M] on the CPU; None where only the device knows the
    lengths, which are then those of one row per request
    one_forward             whether the plan lives for one forward alone (`for_one_forward`)
    """

    row_request: torch.Tensor
    row_lengths: torch.Tensor
    request_lengths: torch.Tensor
    max_length: int
    tile_request: torch.Tensor
    tile_rows: torch.Tensor
    tile_length: torch.Tensor
    row_place: torch.Tensor
    host_rows: tuple[torch.Tensor, torch.Tensor] | None = None
    one_forward: bool = False
    _groups: dict[int, RowGroups] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.row_request.shape[0]

    @property
    def num_tiles(self) -> int:
        return self.tile_request.shape[0]

    def kept(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What make() derives from the plan alone, made once for all layers; `key` names it.

        Of a plan made from device lengths it is made at every call: they may be written anew under the plan. Unless the
        plan lives for one forward.
        """
        if self.host_rows is None and not self.one_forward:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def for_one_forward(self) -> "RowPlan":
        """The same plan for the layers of one forward: what they derive from the lengths is made by the first of them.

        Call it once per forward, before its first layer, and give its result to every layer's `select_rows`. Inside
        CUDA graph capture call it inside the capture, and drop it at the capture's end: what the first layer makes is
        captured, so every replay makes it anew from the lengths of that replay. Lengths that change while the result is
        in use are not seen.
        """
        return replace(self, one_forward=True)

    def groups(self, group: int) -> RowGroups:
        """The rows by groups that share one scan, on the plan's device. Made and uploaded once, for all layers.

        Of a plan made from device lengths every row is a group by itself, and nothing is read back.
        """
        if group not in self._groups:
            if self.host_rows is None:
                places = torch.arange(self.num_rows, dtype=torch.int32, device=self.row_lengths.device)
                return RowGroups(places[:, None], places)
            rows, row_place = self._host_groups(*self.host_rows, group)
            flat, row_place = _upload_together([rows.flatten(), row_place], self.row_lengths.device)
            self._groups[group] = RowGroups(flat.view(-1, group), row_place)
        return self._groups[group]

    def scans(self, group: int) -> "RowPlan":
        """The scans that the groups of `groups` share, as rows: row g sees what group g's first position sees, whether
        that row is in the call or not (0: a group of rows without tokens). Made once, for all layers.
        """
        return self.kept(("scans", group), lambda: self._plan_scans(group))

    def _host_groups(self, request: torch.Tensor, lengths: torch.Tensor, group: int) -> RowGroups:
        return self.kept(("host groups", group), lambda: group_rows(request, lengths, group))

    def _plan_scans(self, group: int) -> "RowPlan":
        if self.host_rows is None:
            plan = plan_decode(first_seen(self.row_lengths, group), self.max_length // PAGE_TOKENS)
            return replace(plan, one_forward=self.one_forward)
        request, lengths = self.host_rows
        first = self._host_groups(request, lengths, group).rows[:, 0].long()
        seen = first_seen(lengths[first], group)
        return plan_rows(request[first], seen, self.request_lengths.shape[0], self.row_lengths.device)


def plan_rows(
    row_request: torch.Tensor, row_lengths: torch.Tensor, num_requests: int, device: torch.device | str = "cpu"
) -> RowPlan:
    """Plan for any rows, from host values: row m belongs to request row_request[m] and sees row_lengths[m] tokens.

    Both are int64 [M] on the CPU. One small upload, no device read. Rows of a request should be consecutive: a tile
    ends where the request changes.
    """
    num_rows = row_request.shape[0]
    row = torch.arange(num_rows)
    new_run = torch.ones(num_rows, dtype=torch.bool)
    new_run[1:] = row_request[1:] != row_request[:-1]
    run_start = row[new_run][new_run.cumsum(0) - 1]
    new_tile = (row - run_start) % TILE_ROWS == 0
    tile_of_row = new_tile.cumsum(0) - 1
    num_tiles = int(new_tile.sum())
    position = (row - run_start) % TILE_ROWS
    tile_length = torch.zeros(num_tiles, dtype=torch.int64).scatter_reduce_(0, tile_of_row, row_lengths, "amax")
    # Longest first, so that the last tiles to be handed out are the short ones.
    order = torch.argsort(tile_length, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(num_tiles)
    place = rank[tile_of_row] * TILE_ROWS + position
    tile_rows = torch.full((num_tiles * TILE_ROWS,), -1, dtype=torch.int64)
    tile_rows[place] = row
    request_lengths = torch.zeros(num_requests, dtype=torch.int64).scatter_reduce_(0, row_request, row_lengths, "amax")

    parts = [
        row_request,
        row_lengths,
        request_lengths,
        row_request[new_tile][order],
        tile_rows,
        tile_length[order],
        place,
    ]
    request, lengths, per_request, tile_request, tile_rows, tile_length, place = _upload_together(parts, device)
    return RowPlan(
        row_request=request,
        row_lengths=lengths,
        request_lengths=per_request,
        max_length=int(row_lengths.max()) if num_rows else 0,
        tile_request=tile_request,
        tile_rows=tile_rows.view(-1, TILE_ROWS),
        tile_length=tile_length,
        row_place=place,
        host_rows=(row_request, row_lengths),
    )


def _upload_together(parts: list[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """int32 copies of the parts on `device`, by one transfer; each starts on a 128-byte border for vector loads."""
    padded = [(len(part) + 31) // 32 * 32 for part in parts]
    buffer = torch.zeros(sum(padded), dtype=torch.int32)
    for part, piece in zip(parts, buffer.split(padded)):
        piece[: len(part)] = part
    return [piece[: len(part)] for part, piece in zip(parts, upload(buffer, device).split(padded))]


def plan_extend(
    prefix_lengths: Sequence[int], extend_lengths: Sequence[int], device: torch.device | str = "cpu"
) -> RowPlan:
    """Plan for prefill: request r brings extend_lengths[r] consecutive rows; its row i sees prefix_lengths[r] + i + 1
    tokens.

    Raises ValueError for unequal counts or negative lengths.
    """
    if len(prefix_lengths) != len(extend_lengths):
        raise ValueError(
            f"prefix_lengths has {len(prefix_lengths)} entries, extend_lengths {len(extend_lengths)}; they must agree"
        )
    for name, lengths in (("prefix_lengths", prefix_lengths), ("extend_lengths", extend_lengths)):
        if any(length < 0 for length in lengths):
            raise ValueError(f"{name}={list(lengths)} must not be negative")
    counts = torch.tensor(extend_lengths, dtype=torch.int64)
    prefixes = torch.tensor(prefix_lengths, dtype=torch.int64)
    row_request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(len(row_request)) - (counts.cumsum(0) - counts)[row_request]
    return plan_rows(row_request, prefixes[row_request] + within + 1, len(counts), device)


def plan_decode(row_lengths: torch.Tensor, table_pages: int) -> RowPlan:
    """Plan for decode: row r is page-table row r and sees row_lengths[r] tokens ([R] int32, stays on its device).

    Reads nothing back, so it may run inside CUDA graph capture; max_length is the reach of the page table.
    """
    if row_lengths.dtype != torch.int32 or row_lengths.dim() != 1:
        raise ValueError(f"row_lengths must be int32 [R], got {row_lengths.dtype} {list(row_lengths.shape)}")
    rows = torch.arange(row_lengths.shape[0], dtype=torch.int32, device=row_lengths.device)
    tile_rows = torch.full((rows.shape[0], TILE_ROWS), -1, dtype=torch.int32, device=row_lengths.device)
    tile_rows[:, 0] = rows
    lengths = row_lengths.contiguous()
    return RowPlan(
        row_request=rows,
        row_lengths=lengths,
        request_lengths=lengths,
        max_length=table_pages * PAGE_TOKENS,
        tile_request=rows,
        tile_rows=tile_rows,
        tile_length=lengths,
        row_place=rows * TILE_ROWS,
    )
