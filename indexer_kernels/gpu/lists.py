"""Lists of candidate tokens, as the kernels fill them."""

from typing import NamedTuple

import torch


class Lists(NamedTuple):
    """Candidate tokens, a list each, ascending: positions and cache slots [lists, W] int32 (positions None where nobody
    reads them), how many [lists] int32, and unsure [lists] int32, 1 where the list is not to be used.
    """

    positions: torch.Tensor | None
    slots: torch.Tensor
    counts: torch.Tensor
    unsure: torch.Tensor

    @property
    def written(self) -> tuple[torch.Tensor, ...]:
        """positions, slots and counts as kernels take them: a place that is not written where positions are None."""
        return (self.slots if self.positions is None else self.positions, self.slots, self.counts)

    def part(self, places: slice) -> "Lists":
        positions = None if self.positions is None else self.positions[places]
        return Lists(positions, *(tensor[places] for tensor in self[1:]))


def empty_lists(places: int, width: int, with_positions: bool, device: torch.device) -> Lists:
    slots = torch.empty((places, width), dtype=torch.int32, device=device)
    positions = torch.empty_like(slots) if with_positions else None
    return Lists(positions, slots, slots.new_empty(places), slots.new_empty(places))
