"""What SGLang hands the stage in a forward, and the stage called with it. Needs no SGLang."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sglang_ext.forwards import Forward
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.support.inputs import Batch, make_batch

# Prunes contexts of a few hundred tokens: misa differs from native from the first full block on.
MISA = Settings(mode="misa", decode_mode="misa", backend="reference", route_block=64, active_heads=2)


def stage_batch() -> Batch:
    """The batch that `prefill` is called for."""
    return make_batch([300, 40, 70], [9, 3, 1], num_heads=8, seed=5)


@dataclass(frozen=True)
class Attention:
    """Frozen like SGLang's metadata."""

    page_size: int = 64


class Asked:
    """An `unsupported` that counts how often it is asked."""

    def __init__(self, answer: str | None = None) -> None:
        self.answer, self.times = answer, 0

    def __call__(self) -> str | None:
        self.times += 1
        return self.answer


def prefill(stage: Stage, batch: Batch, attention: object = None, **changes: Any) -> Forward:
    """stage.prefill of stage_batch()."""
    arguments: dict[str, Any] = {
        "attention": Attention() if attention is None else attention,
        "extend_lengths": [9, 3, 1],
        "lengths": lambda: torch.tensor([300, 40, 70]),
        "page_table": batch.page_table,
        "q": batch.q,
        "layer_id": 0,
        "unsupported": Asked(),
    }
    return stage.prefill(**arguments | changes)


def decode(stage: Stage, **changes: Any) -> Forward:
    """stage.decode of two requests in a batch padded to four rows."""
    arguments: dict[str, Any] = {
        "attention": Attention(),
        "lengths": torch.tensor([130, 7], dtype=torch.int32),
        "page_table": torch.zeros((2, 3), dtype=torch.int32),
        "num_rows": 2,
        "q": torch.zeros((4, 8, 128)).to(torch.float8_e4m3fn),
        "layer_id": 0,
        "unsupported": Asked(),
    }
    return stage.decode(**arguments | changes)


def calls(stage: Stage) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(phase, mode, reason) -> (calls, rows)."""
    listed = stage.counters.snapshot()["calls"]
    return {(one["phase"], one["mode"], one["reason"]): (one["calls"], one["rows"]) for one in listed}


def log_lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]
