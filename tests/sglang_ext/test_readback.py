"""Copies that nobody waits for: what is read while one is under way, and that none is overwritten."""

import torch

from sglang_ext.readback import Readback


class Event:
    """A CUDA event whose arrival the test decides."""

    def __init__(self) -> None:
        self.recorded, self.arrived = 0, False

    def record(self) -> None:
        self.recorded, self.arrived = self.recorded + 1, False

    def query(self) -> bool:
        return self.arrived


def test_a_copy_is_read_only_after_it_has_arrived():
    source, event = torch.tensor([1, 2]), Event()
    readback = Readback(source, lambda: event)
    assert readback.read().tolist() == [0, 0] and event.recorded == 0
    assert readback.start() and event.recorded == 1
    assert readback.read().tolist() == [0, 0]
    event.arrived = True
    assert readback.read().tolist() == [1, 2]


def test_a_copy_under_way_is_not_overwritten():
    source, event = torch.tensor([1]), Event()
    readback = Readback(source, lambda: event)
    assert readback.start()
    source.fill_(2)
    assert not readback.start() and event.recorded == 1
    event.arrived = True
    assert readback.start() and readback.read().tolist() == [1], "the first arrived before the second began"
    event.arrived = True
    assert readback.read().tolist() == [2]


def test_what_was_read_stays_as_it_was():
    source = torch.tensor([1])
    readback = Readback(source)
    readback.start()
    first = readback.read()
    source.fill_(5)
    assert first.tolist() == [1] and readback.read().tolist() == [1]
    readback.start()
    assert first.tolist() == [1] and readback.read().tolist() == [5]
