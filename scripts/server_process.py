"""An SGLang server as a child process: start it with the plugin, talk to it, end it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

ARGUMENTS = [
    "--host=127.0.0.1",
    "--context-length=140000",
    "--chunked-prefill-size=8192",
    "--mem-fraction-static=0.6",
    "--kv-cache-dtype=fp8_e4m3",
    "--dsa-prefill-backend=flashmla_sparse",
    "--dsa-decode-backend=flashmla_kv",
    "--sampling-backend=pytorch",
    "--max-running-requests=32",
    "--cuda-graph-max-bs-decode=8",
    "--disable-prefill-cuda-graph",
    "--watchdog-timeout=900",
]
START_LIMIT_S = 420
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
SERVE = (sys.executable, "-m", "sglang_ext.cli", "serve")


def arguments_without(*flags: str) -> list[str]:
    """ARGUMENTS but these flags."""
    return [one for one in ARGUMENTS if one.partition("=")[0] not in flags]


class Server:
    """A running server. start_s: seconds from launch to healthy."""

    def __init__(self, url: str, start_s: float) -> None:
        self.url = url
        self.start_s = start_s

    def check_alive(self) -> None:
        """RuntimeError with the end of its log where the server is a process of ours and has ended."""

    def call(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 600) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            text = reply.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def generate(self, input_ids: list[int], new_tokens: int) -> list[int]:
        """Greedy continuation, exactly new_tokens long."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return self.call("/generate", {"input_ids": input_ids, "sampling_params": sampling})["output_ids"]

    def flush(self) -> None:
        """Forget all cached prefixes. SGLang refuses for the milliseconds in which it books the last request off."""
        for attempt in range(100):
            try:
                self.call("/flush_cache", {})
                return
            except urllib.error.HTTPError:
                if attempt == 99:
                    raise
                time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        """The plugin's part of /server_info; KeyError where the plugin is not active."""
        return self.call("/server_info")["internal_states"][0]["sglang_ext"]

    def switch_prefill(self, mode: str) -> None:
        number = self.status()["mode_numbers"][mode]
        reply = self.call("/set_internal_state", {"server_args": {"sglang_ext_prefill_mode": number}})
        if self.status()["modes"]["prefill"] != mode:
            raise RuntimeError(f"the server did not switch its prefill to {mode}: {reply}")


class LaunchedServer(Server):
    """A server that is a child process of ours. log: the file its output goes to."""

    def __init__(self, url: str, start_s: float, process: subprocess.Popen, log: Path) -> None:
        super().__init__(url, start_s)
        self.process = process
        self.log = log

    def check_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"
            raise RuntimeError(f"the server {how}; the end of {self.log}:\n{end_of(self.log)}")


def end_of(log: Path, lines: int = 40) -> str:
    """The last lines of a text file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def launch(
    model: Path,
    log: Path,
    settings: Mapping[str, str],
    extra: Sequence[str],
    environ: Mapping[str, str],
    port: int = 30000,
    dummy_weights: bool = True,
    arguments: Sequence[str] = ARGUMENTS,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[LaunchedServer]:
    """`sglang-ext serve` on the model; ended by its own process group when the block ends.

    dummy_weights: the model folder holds none, SGLang makes them up. arguments: what every server gets, before `extra`.
    RuntimeError with the end of the log where the server is not healthy after start_limit_s seconds.
    """
    command = [*SERVE]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command += ["--model-path", str(model), f"--port={port}", *arguments]
    command += ["--load-format=dummy"] * dummy_weights + [*extra]
    began = time.perf_counter()
    with running(command, log, environ) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log, began, start_limit_s)
        yield LaunchedServer(url, time.perf_counter() - began, process, log)


@contextmanager
def running(
    command: Sequence[str], log: Path, environ: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen]:
    """The command as a process group of its own, output in `log`; it and its workers are ended when the block ends.

    environ: added to this process's variables. Call from the main thread, which alone takes signals.
    """
    process = None
    try:
        with log.open("w") as output, _interrupts_held():
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
            )
        yield process
    finally:
        if process is not None:
            _end(process)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """SIGINT and SIGTERM come when the block ends: raised inside Popen they would lose the child it has just forked."""
    held: list[int] = []
    handlers = {sent: signal.signal(sent, lambda number, _: held.append(number)) for sent in INTERRUPTS}
    try:
        yield
    finally:
        for sent, handler in handlers.items():
            signal.signal(sent, handler)
        for number in held:
            signal.raise_signal(number)


def _end(process: subprocess.Popen) -> None:
    """End the process and its workers, which are one process group of ours."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(15)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _wait_until_healthy(url: str, process: subprocess.Popen, log: Path, began: float, limit_s: float) -> None:
    while time.perf_counter() - began < limit_s:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url + "/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not become healthy (exit code {process.poll()}):\n{end_of(log)}")
