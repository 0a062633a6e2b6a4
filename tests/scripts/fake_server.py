"""An OpenAI-compatible server in a thread, with the plugin's routes, whose answers a test chooses."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = ("native", "misa", "misa_rerank", "hisa", "auto")


class FakeServer:
    """answer: prompt -> completion. stuck: modes that answer but never run. plugin: whether /server_info knows it."""

    def __init__(
        self,
        answer: Callable[[str], str],
        stuck: tuple[str, ...] = (),
        plugin: bool = True,
        switchable: bool = True,
        port: int = 0,
    ) -> None:
        self.answer, self.stuck, self.plugin, self.switchable = answer, stuck, plugin, switchable
        self.mode, self.port = "native", port
        self.device_runs: dict[str, int] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []  # (mode, body) of completions
        self.calls: list[str] = []  # paths and switches, in order
        self.fail_after: int | None = None  # completions before the server answers 500
        self._lock = threading.Lock()

    def __enter__(self) -> "FakeServer":
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.calls.append(path)
            if path == "/v1/models":
                return 200, {"data": [{"id": "tiny", "max_model_len": 4096}]}
            if path == "/server_info":
                return 200, {"internal_states": [{"sglang_ext": self._status()} if self.plugin else {}]}
            if path == "/flush_cache":
                return 200, "flushed"
            if path == "/set_internal_state":
                self.mode = MODES[body["server_args"]["sglang_ext_prefill_mode"]]
                self.calls.append(f"switch {self.mode}")
                return 200, {"updated": True}
            if path != "/v1/completions":
                return 404, {"error": path}
            if self.fail_after is not None and len(self.requests) >= self.fail_after:
                return 500, {"error": "out of order"}
            self.requests.append((self.mode, body))
            if self.mode not in self.stuck:
                key = f"prefill/{self.mode}"
                self.device_runs[key] = self.device_runs.get(key, 0) + 1
        usage = {"prompt_tokens": len(body["prompt"].split())}
        return 200, {"choices": [{"text": self.answer(body["prompt"])}], "usage": usage}

    def _status(self) -> dict[str, Any]:
        return {
            "version": "0",
            "settings": {"active_heads": 8, "prefill_mode": self.mode},
            "modes": {"prefill": self.mode, "decode": "native"},
            "mode_numbers": {name: number for number, name in enumerate(MODES)} if self.switchable else {},
            "device_runs": self.device_runs,
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _send(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                status, body = fake.reply(self.path.partition("?")[0], json.loads(self.rfile.read(length) or "{}"))
                if isinstance(body, Iterator):
                    return self._stream(body)
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, pieces: Iterator[str]) -> None:
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                    for piece in pieces:
                        self.wfile.write(piece.encode())
                        self.wfile.flush()

            do_GET = do_POST = _send

            def log_message(self, format: str, *args: object) -> None:
                """Tests read the requests from the fake itself."""

        return Handler


class WordTokenizer:
    """In place of LocalTokenizer: words and marks are tokens."""

    def __init__(self, path: str) -> None:
        self.path = path

    def count(self, text: str) -> int:
        return len(text.split())

    def cut_middle(self, text: str, limit: int) -> str:
        words = text.split(" ")
        half = limit // 2
        return text if len(words) <= limit else " ".join(words[:half]) + " ".join(words[-half:])
