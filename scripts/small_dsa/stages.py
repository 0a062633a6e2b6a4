"""What is trained when: dense attention at growing length, the indexers alone, then both on selected tokens."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

Kind = Literal["dense", "indexer", "sparse"]
WARM_STEPS = 20


@dataclass(frozen=True, slots=True)
class Stage:
    """Batches of `batch` sequences of `length` tokens for `share` of the training time.

    rate: peak learning rate, reached after WARM_STEPS steps. decay: it falls to a tenth by cosine within the stage;
    else it holds and the next stage goes on from there. rows: rows per sequence at which the KL loss looks.
    """

    kind: Kind
    length: int
    batch: int
    share: float
    rate: float
    decay: bool = False
    rows: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.length}"

    def rate_at(self, step: int, progress: float) -> float:
        """The learning rate of the step-th step, after `progress` (0 to 1) of the stage's time."""
        fall = 0.1 + 0.45 * (1 + cos(pi * min(1.0, progress))) if self.decay else 1.0
        return self.rate * fall * min(1.0, (step + 1) / WARM_STEPS)


# DeepSeek-V3.2's order (the indexer's dense warm-up against frozen attention, then sparse training), after a dense
# pretraining since there is no model to start from. About 128K tokens a step while attention is dense.
STAGES = (
    Stage("dense", 256, 512, 0.20, 2e-3),
    Stage("dense", 1024, 128, 0.14, 2e-3),
    Stage("dense", 4096, 32, 0.14, 1.5e-3),
    Stage("dense", 16384, 8, 0.11, 1e-3),
    Stage("dense", 32768, 4, 0.13, 7e-4, decay=True),
    Stage("indexer", 2048, 16, 0.05, 3e-3, rows=64),
    Stage("indexer", 8192, 8, 0.07, 2e-3, rows=64),
    Stage("indexer", 32768, 2, 0.11, 1.5e-3, decay=True, rows=96),
    Stage("sparse", 8192, 4, 0.05, 2e-4, decay=True, rows=48),
)
# For tests: every kind once, at a size a CPU trains.
TINY_STAGES = (
    Stage("dense", 256, 8, 0.6, 2e-3),
    Stage("indexer", 256, 4, 0.2, 1e-3, decay=True, rows=8),
    Stage("sparse", 256, 2, 0.2, 1e-4, decay=True, rows=8),
)
