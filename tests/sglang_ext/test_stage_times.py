"""Times of sampled work: summed once they are over, in their order, and never without bound."""

import pytest

from sglang_ext import stage_times
from sglang_ext.stage_times import StageTimes, Timed

KIND = Timed("prefill", "misa", "selection")


class Mark:
    """A moment of which the test says when the device reaches it."""

    def __init__(self, seconds: float, over: bool = True) -> None:
        self.seconds, self.over = seconds, over

    def passed(self) -> bool:
        return self.over

    def seconds_since(self, start: "Mark") -> float:
        assert self.over and start.over, "elapsed time of an event that is not over raises"
        return self.seconds - start.seconds


def test_only_what_is_over_is_summed():
    times, late = StageTimes(), Mark(5.0, over=False)
    times.add(KIND, Mark(1.0), Mark(1.5))
    times.add(KIND, Mark(2.0), late)
    assert times.read() == {KIND: (1, pytest.approx(0.5))} == times.read()
    late.over = True
    times.add(KIND._replace(part="shadow"), Mark(0.0), Mark(0.25))
    assert times.read() == {KIND: (2, pytest.approx(3.5)), KIND._replace(part="shadow"): (1, pytest.approx(0.25))}


def test_no_more_than_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(stage_times, "PENDING", 3)
    times = StageTimes()
    for _ in range(5):
        times.add(KIND, Mark(0.0), Mark(1.0))
    assert times.dropped == 2 and times.read() == {KIND: (3, pytest.approx(3.0))}
