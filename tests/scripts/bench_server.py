"""A server that SGLang's benchmark modules can measure: `/generate` streams, and what came is written down.

Run as a program it stands in for `sglang-ext serve`: it takes that command's arguments, and its own after them.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.scripts.fake_server import FakeServer

TOKENIZER = str(Path(__file__).resolve().parents[1] / "data" / "small_dsa")
PAUSE_S = 0.01


class BenchServer(FakeServer):
    """pause_s: before every token. decode: its decode mode, which never runs. capacity: tokens the cache holds.
    die_if: a file; where it exists, the request of that number in it removes it and ends the process (`4 kill`: is
    killed).
    """

    def __init__(self, mode: str = "native", pause_s: float = PAUSE_S, **options: Any) -> None:
        self.decode = options.pop("decode", "native")
        self.die_if: Path | None = options.pop("die_if", None)
        self.capacity = options.pop("capacity", 10**6)
        super().__init__(lambda prompt: "x", **options)
        self.mode, self.pause_s = mode, pause_s
        self.prompts: list[tuple[str, list[list[int]], int]] = []  # (mode, ids of a batch, new tokens)

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path in ("/health", "/metrics"):
            return 200, "fine"
        if path == "/model_info":
            return 200, {"tokenizer_path": TOKENIZER, "model_path": TOKENIZER}
        if path == "/server_info":
            states = [{"effective_max_running_requests_per_dp": 64, "memory_usage": {"token_capacity": self.capacity}}]
            if self.plugin:
                states[0]["sglang_ext"] = self._status()
            facts = {"tokenizer_path": TOKENIZER, "api_key": "a secret", "tp_size": 8}
            return 200, {**facts, "internal_states": states}
        if path != "/generate":
            return super().reply(path, body)
        with self._lock:
            self.calls.append(path)
            ids = body["input_ids"]
            batch = ids if isinstance(ids[0], list) else [ids]
            self.prompts.append((self.mode, batch, body["sampling_params"]["max_new_tokens"]))
            number, *how = self.die_if.read_text().split() if self.die_if and self.die_if.exists() else ["0"]
            if self.die_if and len(self.prompts) >= int(number) > 0:
                self.die_if.unlink()
                if how:
                    os.kill(os.getpid(), signal.SIGKILL)
                print("RuntimeError: the stub's memory is gone", flush=True)
                os._exit(7)
            if self.fail_after is not None and len(self.prompts) > self.fail_after:
                return 500, {"error": "out of order"}
            if self.mode not in self.stuck:
                key = f"prefill/{self.mode}"
                self.device_runs[key] = self.device_runs.get(key, 0) + len(batch)
        new_tokens = body["sampling_params"]["max_new_tokens"]
        return 200, self._tokens(batch, new_tokens) if body.get("stream") else {"text": "x"}

    def _tokens(self, batch: list[list[int]], new_tokens: int) -> Iterator[str]:
        for token in range(1, new_tokens + 1):
            time.sleep(self.pause_s)
            for index, ids in enumerate(batch):
                end = {"type": "length", "length": new_tokens} if token == new_tokens else None
                counts = {"completion_tokens": token, "prompt_tokens": len(ids), "cached_tokens": len(ids) // 2}
                chunk = {"text": "x" * token, "index": index, "meta_info": {**counts, "finish_reason": end}}
                yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    def _status(self) -> dict[str, Any]:
        status = super()._status()
        counted = Counter(mode for mode, _, _ in self.prompts)
        ran = [{"phase": "prefill", "mode": mode, "reason": "asked", "forwards": n} for mode, n in counted.items()]
        return {**status, "modes": {"prefill": self.mode, "decode": self.decode}, "forwards": ran}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--port", type=int)
    parser.add_argument("--stuck", nargs="*", default=[])
    parser.add_argument("--die-if", type=Path)
    parser.add_argument("--fail-start", action="store_true")
    args, others = parser.parse_known_args()
    settings = dict(item.split("=", 1) for item in args.set)
    print("the stub starts", settings, others, "as", os.getpid(), flush=True)
    if args.fail_start:
        sys.exit("the stub cannot start: no such weights")
    mode, decode = settings["prefill_mode"], settings["decode_mode"]
    options: dict[str, Any] = {"stuck": tuple(args.stuck), "die_if": args.die_if, "port": args.port}
    with BenchServer(mode, decode=decode, switchable=False, **options):
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
