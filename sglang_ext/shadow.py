"""Shadow sampling: of a share of forwards, what native would have selected for a few rows, and nothing else changes."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_ext.forwards import capturing
from sglang_ext.guard import Agree, Guard
from sglang_ext.overlap import Key, Overlaps, row_overlap
from sglang_ext.sampling import Sampler, pick_rows
from sglang_ext.settings import Settings
from sglang_ext.stage_times import Mark, StageTimes, Timed

logger = logging.getLogger("sglang_ext")

KEPT = "sglang_ext_sample"  # attribute of SGLang's per-forward metadata

# What became of a forward that a mode ran in. One that was not chosen is not counted.
SAMPLED = "sampled"
SHORT = "short"  # no row sees more tokens than the model selects: nothing to measure, and not a candidate
GRAPH = "cuda_graph"  # recorded once and replayed without Python: never a candidate
FAILED = "error"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The rows of one forward that native selects too, in every layer. S rows.

    rows [S] int64 in the forward; lengths [S] int32: tokens each sees; request: theirs, which sees `seen` tokens, with
    spans [2, 2] int32 = [[0, S], [0, seen]] (None, 0, None: one row per request, of a decode); counts [S] bool: rows
    that have something to choose (None: all).
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    request: int | None = None
    seen: int = 0
    spans: torch.Tensor | None = None
    counts: torch.Tensor | None = None


class Shadow:
    """Chooses forwards and rows, compares, and sums up. Never waits for the device, never touches an answer.

    Decisions are made from host values that all tensor-parallel ranks share. The first error ends the measuring on this
    rank and leaves serving as it was.
    """

    def __init__(self, settings: Settings) -> None:
        self.overlaps = Overlaps()
        self.times = StageTimes()
        self.guard = Guard(settings.guard_overlap, settings.guard_min_samples) if settings.guard_overlap else None
        self.forwards: Counter[tuple[str, str]] = Counter()
        self.prefill_comes = True  # whether the batch that was made last is one of prompts, as far as is known
        self._rows = settings.shadow_rows
        self._samplers = {phase: Sampler(settings.shadow_rate) for phase in ("prefill", "decode")}
        self._compared: set[Key] = set()
        self._recorded: int | None = None
        self._failed = False

    @staticmethod
    def of(settings: Settings) -> "Shadow | None":
        """None where nothing is to be sampled."""
        return Shadow(settings) if settings.shadow_rate else None

    def plan_prefill(
        self, seen: Sequence[int], extend: Sequence[int], ends: Sequence[int], top_k: int, device: torch.device
    ) -> Sample | None:
        """What to compare of a prefill that runs a mode: rows of one request, picked by `pick_rows`."""
        sampler = self._samplers["prefill"]
        picked = pick_rows(seen, extend, ends, top_k, self._rows, sampler.fraction())
        if picked is None:
            self.forwards[("prefill", SHORT)] += 1
            return None
        if not sampler.next() or not self._may("prefill"):
            return None
        request, positions = picked
        before = sum(extend[:request]) - (seen[request] - extend[request])
        count = len(positions)
        values = torch.tensor([*positions, 0, count, 0, seen[request]]).to(device, non_blocking=True)
        return Sample(
            rows=values[:count] + before,
            lengths=values[:count].int() + 1,
            request=request,
            seen=seen[request],
            spans=values[count:].int().view(2, 2),
        )

    def plan_decode(self, num_rows: int, lengths: torch.Tensor, top_k: int) -> Sample | None:
        """What to compare of an eager decode: rows spread over the batch. lengths [num_rows] int32 stay on the device,
        so whether a row has something to choose is found out there.
        """
        if num_rows == 0 or not self._samplers["decode"].next() or not self._may("decode"):
            return None
        count = min(num_rows, self._rows)
        rows = torch.arange(count, device=lengths.device) * num_rows // count
        picked = lengths[rows]
        return Sample(rows=rows, lengths=picked, counts=picked > top_k)

    def watch(
        self,
        attention: object,
        key: Key,
        device: torch.device,
        plan: Callable[[], Sample | None],
        select: Callable[[], torch.Tensor],
        native: Callable[[Sample], torch.Tensor],
    ) -> torch.Tensor:
        """select() of one layer that runs a mode, measured where its forward is sampled.

        attention: SGLang's per-forward metadata, on which the sample is kept: plan() makes it once for all layers. Its
        attributes outlive the eager runs before a graph's capture, so a graph's forwards are told apart here.
        native(sample) [S, K]: what SGLang's own method selects for the sample's rows, in the form of select().
        """
        if capturing(device):
            self._count_graph(key)
            return select()
        sample = getattr(attention, KEPT, attention)
        if sample is attention:
            sample = plan()
            object.__setattr__(attention, KEPT, sample)
        if not isinstance(sample, Sample):
            return select()
        start = Mark(device)
        chosen = select()
        self._time(key, "selection", start)
        self.compare(sample, key, chosen, native)
        return chosen

    def compare(self, sample: Sample, key: Key, ours: torch.Tensor, native: Callable[[Sample], torch.Tensor]) -> None:
        """One layer of a sampled forward; ours [>= M, K] is the forward's selection. Never raises."""
        if self._failed:
            return
        try:
            start = Mark(ours.device)
            self.overlaps.add(key, row_overlap(ours[sample.rows], native(sample)), sample.counts)
            self._time(key, "shadow", start)
            self._compared.add(key)
            if key.layer == self._last_layer(key.phase):
                self.overlaps.send()
        except Exception:  # whatever it is, an answer must not depend on being watched
            self._failed = True
            self.forwards[(key.phase, FAILED)] += 1
            logger.exception("shadow sampling ends after an error in layer %d of %s", key.layer, key.phase)

    def returned(self, phase: str, mode: str, layer: int) -> bool:
        """Whether the guard has taken the layer back to native."""
        return self.guard is not None and (phase, mode, layer) in self.guard.native

    def all_returned(self, phase: str, mode: str) -> list[int]:
        """The layers that `returned` is true of."""
        native = self.guard.native if self.guard is not None else ()
        return [key.layer for key in native if (key.phase, key.mode) == (phase, mode)]

    def poll_guard(self, agree: Agree) -> None:
        """Called at every batch, whatever it runs: the ranks that share it agree on layers that return to native."""
        if self.guard is not None:
            self.guard.poll(self.overlaps.read, agree)

    def status(self) -> dict[str, object]:
        """Plain values for /server_info. Waits for the device."""
        guard = self.guard
        return {
            "forwards": {f"{phase}/{why}": number for (phase, why), number in sorted(self.forwards.items())},
            "overlap": [
                {**key._asdict(), "rows": total.rows, "mean": total.mean}
                for key, total in sorted(self.overlaps.read(wait=True).items())
            ],
            "guard": [list(key) for key in sorted(guard.native)] if guard else None,
        }

    def _may(self, phase: str) -> bool:
        """A chosen forward: earlier totals are sent before it adds to them. False after an error.

        The samplers count on after an error, as those of the other ranks do.
        """
        if self._failed:
            return False
        self.overlaps.send()
        self.forwards[(phase, SAMPLED)] += 1
        return True

    def _time(self, key: Key, part: str, start: Mark) -> None:
        """What was queued on the current stream since start."""
        self.times.add(Timed(key.phase, key.mode, part), start, Mark(start.device))

    def _last_layer(self, phase: str) -> int:
        """After which a forward's totals are whole, as far as earlier forwards tell."""
        return max(key.layer for key in self._compared if key.phase == phase and not self.returned(*key))

    def _count_graph(self, key: Key) -> None:
        """One forward that a graph records; it begins with a layer that is not above the last: they ascend."""
        if self._recorded is None or key.layer <= self._recorded:
            self.forwards[(key.phase, GRAPH)] += 1
        self._recorded = key.layer
