"""A client of an OpenAI-compatible server, with the plugin's counters and its runtime switch, and a local tokenizer."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server_process import Server

ATTEMPTS = 5
FIRST_PAUSE_S = 0.5  # before the second attempt; doubles each time


@dataclass(frozen=True, slots=True)
class Completion:
    """A greedy answer. prompt_tokens: as the server counted them, None where it did not say."""

    text: str
    prompt_tokens: int | None
    seconds: float


class Client(Server):
    """A server that runs already, at `url` (with or without a final /v1). timeout: seconds of one request."""

    def __init__(self, url: str, model: str | None = None, timeout: float = 1800) -> None:
        super().__init__(url.rstrip("/").removesuffix("/v1"), start_s=0.0)
        self.timeout = timeout
        self._model = model

    def call(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Server.call, tried again while the connection is refused; ConnectionError with the server's own words."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return super().call(path, body, timeout or self.timeout)
            except urllib.error.HTTPError as error:
                if path == "/flush_cache":
                    raise  # Server.flush waits for the server to become idle
                raise self._answered(path, error) from error
            except OSError as error:
                reason = getattr(error, "reason", error)
                if not isinstance(reason, ConnectionRefusedError):
                    raise ConnectionError(f"{self.url}{path} failed: {reason}") from error
        raise ConnectionError(f"no server at {self.url}: the connection was refused {ATTEMPTS} times")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer as they come. ConnectionError with the server's own words where it fails."""
        for line in self._lines(path, json.dumps({**body, "stream": True}).encode()):
            said = line.decode().removeprefix("data: ").strip()
            if said and said != "[DONE]":
                chunk = json.loads(said)
                if "error" in chunk:
                    raise ConnectionError(f"{self.url}{path} answered: {chunk['error']}")
                yield chunk

    def _lines(self, path: str, data: bytes) -> Iterator[bytes]:
        """The lines of an answer as they come."""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                yield from reply
        except urllib.error.HTTPError as error:
            raise self._answered(path, error) from error
        except (OSError, http.client.HTTPException) as error:  # an answer that breaks off is of either kind
            raise ConnectionError(f"{self.url}{path} failed: {getattr(error, 'reason', error)!r}") from error

    def _answered(self, path: str, error: urllib.error.HTTPError) -> ConnectionError:
        said = error.read().decode(errors="replace")[:500]
        return ConnectionError(f"{self.url}{path} answered {error.code} {error.reason}: {said}")

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        return self.call("/v1/models")["data"]

    @cached_property
    def model(self) -> str:
        """The model asked for: the constructor's, else the first that the server lists."""
        return self._model or self.models()[0]["id"]

    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer that the server accepts, None where /v1/models does not say."""
        return next((entry.get("max_model_len") for entry in self.models() if entry["id"] == self.model), None)

    def complete(self, prompt: str, max_tokens: int, stop: Sequence[str] = ()) -> Completion:
        """The greedy completion of a prompt text through /v1/completions."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        if stop:
            body["stop"] = list(stop)
        began = time.perf_counter()
        reply = self.call("/v1/completions", body)
        seconds = time.perf_counter() - began
        return Completion(reply["choices"][0]["text"], (reply.get("usage") or {}).get("prompt_tokens"), seconds)

    def plugin_status(self) -> dict[str, Any] | None:
        """The plugin's part of /server_info, None where the server runs without it."""
        try:
            return self.status()
        except (KeyError, IndexError, TypeError):
            return None
        except ConnectionError as error:
            if " answered 404 " in str(error):
                return None
            raise


class LocalTokenizer:
    """Counts and cuts text with the tokenizer of a local model directory, loaded when first used; thread-safe."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        with self._lock:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def cut_middle(self, text: str, limit: int) -> str:
        """The text, or its first and last limit // 2 tokens where it has more than `limit`."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return text
        half = limit // 2
        with self._lock:
            parts = [self._tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])]
        return "".join(parts)
