"""Mixed traffic on a running server: prompts of all lengths, conversations that go on, requests that are given up."""

import http.client
import json
import math
import random
import threading
import time
import urllib.parse
from dataclasses import asdict, dataclass, field
from typing import Any

from openai_client import Client

CANCEL_SHARE, TURN_SHARE = 0.2, 0.5  # of all requests; of the others, where a conversation is waiting
MAX_CONVERSATIONS = 64
FIRST_ID = 2  # below it are special tokens
GIVE_UP_AFTER = 20  # errors in a row: the server is gone, and what follows says nothing more


@dataclass(slots=True)
class Outcome:
    """One request. kind: fresh, turn or cancel; retractions: how often the server took it off its batch."""

    kind: str
    prompt_tokens: int
    new_tokens: int
    seconds: float = 0.0
    cached_tokens: int = 0
    retractions: int = 0
    error: str | None = None


@dataclass(slots=True)
class Totals:
    """What a run's requests add up to."""

    requests: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    retractions: int = 0
    longest_prompt: int = 0
    longest_s: float = 0.0
    errors: int = 0
    first_errors: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.requests[outcome.kind] = self.requests.get(outcome.kind, 0) + 1
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        self.new_tokens += outcome.new_tokens
        self.retractions += outcome.retractions
        self.longest_prompt = max(self.longest_prompt, outcome.prompt_tokens)
        self.longest_s = max(self.longest_s, outcome.seconds)
        if outcome.error is not None:
            self.errors += 1
            if len(self.first_errors) < 10:
                self.first_errors.append(f"{outcome.kind} of {outcome.prompt_tokens} tokens: {outcome.error}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Traffic:
    """`concurrency` workers that send requests until the deadline.

    Lengths of prompts and answers are log-uniform: most are short, every size up to max_tokens (prompt and answer)
    comes. A conversation's next prompt is all of it so far, the answer included, and some new tokens.

    endless_share: of the requests, whose answers ignore their end. SGLang reserves what these may still ask (up to 4096
    tokens each), so that their own growth seldom makes it retract; where it does, it takes them as well.
    """

    def __init__(
        self,
        client: Client,
        concurrency: int,
        max_tokens: int,
        max_new_tokens: int,
        vocabulary: int,
        endless_share: float,
        seed: int,
    ) -> None:
        self.client = client
        self.concurrency, self.max_tokens, self.max_new_tokens = concurrency, max_tokens, max_new_tokens
        self.vocabulary, self.endless_share, self.seed = vocabulary, endless_share, seed
        self.totals = Totals()
        self._conversations: list[list[int]] = []
        self._errors_in_a_row = 0
        self._lock = threading.Lock()

    def run(self, seconds: float) -> Totals:
        """Send requests for so long, and wait for the last answers."""
        deadline = time.monotonic() + seconds
        workers = [threading.Thread(target=self._work, args=(i, deadline)) for i in range(self.concurrency)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return self.totals

    def _work(self, worker: int, deadline: float) -> None:
        draws = random.Random(self.seed * 1009 + worker)
        while time.monotonic() < deadline and self._errors_in_a_row < GIVE_UP_AFTER:
            outcome = self._request(draws)
            with self._lock:
                self.totals.add(outcome)
                self._errors_in_a_row = 0 if outcome.error is None else self._errors_in_a_row + 1

    def _request(self, draws: random.Random) -> Outcome:
        new_tokens = _log_uniform(draws, self.max_new_tokens)
        longest = self.max_tokens - new_tokens
        kind, ids = "fresh", self._new_ids(draws, _log_uniform(draws, longest))
        if draws.random() < CANCEL_SHARE:
            kind = "cancel"
        elif draws.random() < TURN_SHARE and (before := self._take_conversation(draws)) is not None:
            ids = (before + ids[: draws.randint(1, 2000)])[-longest:] if len(before) < longest else ids
            kind = "turn" if ids[0] == before[0] and len(ids) > len(before) else "fresh"
        outcome = Outcome(kind, len(ids), new_tokens)
        body = {
            "input_ids": ids,
            "sampling_params": {
                "temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": draws.random() < self.endless_share
            },
        }  # fmt: skip
        began = time.monotonic()
        try:
            if kind == "cancel":
                self._give_up(draws, body)
            else:
                self._finish(outcome, body)
        except Exception as error:  # whatever goes wrong with a request is the soak's result
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - began
        return outcome

    def _finish(self, outcome: Outcome, body: dict[str, Any]) -> None:
        reply = self.client.call("/generate", body)
        answer, meta = reply["output_ids"], reply["meta_info"]
        reason = meta.get("finish_reason") or {}
        ended = reason.get("type") == "stop" and not body["sampling_params"]["ignore_eos"]
        if len(answer) != outcome.new_tokens and not (ended and 0 < len(answer) < outcome.new_tokens):
            raise ValueError(f"{len(answer)} of {outcome.new_tokens} tokens came: {reason}")
        outcome.new_tokens = len(answer)
        outcome.cached_tokens = meta.get("cached_tokens") or 0
        outcome.retractions = meta.get("num_retractions") or 0
        with self._lock:
            if len(self._conversations) < MAX_CONVERSATIONS:
                self._conversations.append([*body["input_ids"], *answer])

    def _give_up(self, draws: random.Random, body: dict[str, Any]) -> None:
        """Close the connection while the request waits, is prefilled or is answered. OSError where none was made."""
        parts = urllib.parse.urlsplit(self.client.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        connection.connect()
        try:
            connection.request(
                "POST", "/generate", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
            )
            if connection.sock is not None:
                connection.sock.settimeout(draws.uniform(0.01, 5.0))
            reply = connection.getresponse()
            if reply.status != 200:
                raise ValueError(f"the server answered {reply.status} {reply.reason}")
            for _ in range(draws.randint(0, 16)):
                if not reply.readline():
                    return
        except TimeoutError:
            return  # given up while it waited
        finally:
            connection.close()

    def _take_conversation(self, draws: random.Random) -> list[int] | None:
        with self._lock:
            if not self._conversations:
                return None
            return self._conversations.pop(draws.randrange(len(self._conversations)))

    def _new_ids(self, draws: random.Random, count: int) -> list[int]:
        return [draws.randrange(FIRST_ID, self.vocabulary) for _ in range(count)]


def _log_uniform(draws: random.Random, most: int) -> int:
    """1 .. most, every power of ten as often."""
    return min(most, max(1, round(math.exp(draws.uniform(0.0, math.log(most))))))
