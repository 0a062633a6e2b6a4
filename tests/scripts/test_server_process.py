"""A process started by the scripts never outlives them, whenever they are interrupted."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import server_process

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_the_process_starts(sent, tmp_path, monkeypatch):
    """The signal comes after the fork and before Popen returns, when nobody holds the child yet."""
    started = []

    def start(*args, **kwargs):
        started.append(Popen(*args, **kwargs))
        signal.raise_signal(sent)
        return started[0]

    Popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), server_process.running(SLEEP, tmp_path / "log"):
            pytest.fail("the block must not run")
        assert started[0].poll() == -signal.SIGTERM
        assert signal.getsignal(sent) is signal.default_int_handler
    finally:
        signal.signal(sent, before)
        started[0].kill()


def test_workers_end_with_their_process(tmp_path):
    """Also where the process itself is gone before them."""
    worker = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True)"
    log = tmp_path / "log"
    with server_process.running((sys.executable, "-c", worker, *SLEEP), log) as process:
        assert process.wait(60) == 0
        pid = int(log.read_text())
        assert running(pid)
    limit = time.monotonic() + 30
    while running(pid):  # the kernel takes a moment to carry a signal out
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_process_has_the_variables_added(tmp_path):
    show = (sys.executable, "-c", "import os; print(os.environ['ADDED'], 'PATH' in os.environ)")
    with server_process.running(show, tmp_path / "log", {"ADDED": "1"}) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "log").read_text() == "1 True\n"


def running(pid: int) -> bool:
    """False for a zombie, which whoever adopted it has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
