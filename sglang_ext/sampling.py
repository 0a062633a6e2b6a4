"""Which forwards and which of their rows are sampled: pure functions of host values, the same on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

# Forward numbers are permuted within blocks of so many (a power of two), so that no rate falls into step with the
# chunks of a prompt, and every whole block holds its exact share.
BLOCK = 1024
# Scores of a sample at most: SGLang asks the driver for free memory, and may wait for it, from 8,000,000 on.
MAX_SCORES = 7_500_000


class Picked(NamedTuple):
    """Rows of one request of a prefill: their positions in it, ascending."""

    request: int
    positions: list[int]


class Sampler:
    """Counts forwards and chooses a fixed share of them.

    Of the first n forwards it has chosen floor(n * rate) wherever n is a multiple of BLOCK. The choice depends on the
    count alone: ranks that run the same forwards choose the same ones.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.count = 0

    def next(self) -> bool:
        """Whether the forward that comes now is chosen."""
        block, within = divmod(self.count, BLOCK)
        self.count += 1
        bits = _mixed(block)
        place = block * BLOCK + (within * (bits % BLOCK | 1) + bits // BLOCK) % BLOCK
        return int((place + 1) * self.rate) > int(place * self.rate)

    def fraction(self) -> float:
        """In [0, 1), another one for every forward: where its rows are picked."""
        return _mixed(self.count + (1 << 40)) / (1 << 64)


def pick_rows(
    seen: Sequence[int], extend: Sequence[int], ends: Sequence[int], top_k: int, limit: int, fraction: float
) -> Picked | None:
    """At most `limit` rows of one request among those that have something to choose; None where no row has.

    seen, extend: per request the tokens its last row sees, and the rows it brings. A row at position p sees p + 1
    tokens; it counts where p >= top_k, and p < ends[r]. fraction in [0, 1) chooses the request, in proportion to the
    rows that count, and where in it the evenly spaced rows begin. Fewer than `limit` where their scores would be more
    than MAX_SCORES.
    """
    first = [max(length - rows, top_k) for length, rows in zip(seen, extend)]
    counts = [max(0, min(length, end) - start) for length, end, start in zip(seen, ends, first)]
    place = int(fraction * sum(counts))
    for request, count in enumerate(counts):
        if place < count:
            wanted = max(1, min(count, limit, MAX_SCORES // seen[request]))
            return Picked(request, [first[request] + (i * count + place) // wanted for i in range(wanted)])
        place -= count
    return None


def _mixed(number: int) -> int:
    """64 bits that differ in about half for neighbouring numbers (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    bits = (number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
    return bits ^ bits >> 31
