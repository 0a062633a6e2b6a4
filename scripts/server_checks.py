"""What the scenarios of `check_server.py` share: the outcome of one, and the checks of a server's answers."""

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from run_record import run_record
from server_process import Server

MODES = ("native", "misa", "misa_rerank", "hisa", "group_rerank")
NEW_TOKENS = 8
KEPT_TAIL = 64  # last tokens that stay where the context is exchanged


class Check:
    """Collects outcomes of one scenario; a failed one is printed at once and fails the run at the end."""

    def __init__(self, name: str) -> None:
        self.record: dict = {"scenario": name, "run": run_record(), "failures": []}

    def expect(self, holds: bool, what: str) -> None:
        print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
        if not holds:
            self.record["failures"].append(what)


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Token ids that no other seed shares a page with."""
    letters = random.Random(seed)
    return [letters.randrange(2, 4000) for _ in range(num_tokens)]


def runs(server: Server, key: str) -> int:
    return server.status()["device_runs"].get(key, 0)


def shadow_forwards(status: Mapping[str, Any]) -> dict[str, int]:
    """{phase/outcome: forwards} of shadow sampling, from the plugin's status; empty where it is off."""
    return status.get("shadow", {}).get("forwards", {})


def answers_tell(server: Server, ids: list[int], new_tokens: int) -> bool:
    """Whether the greedy answer depends on what the prompt's last rows attend to: it changes where all but the last
    KEPT_TAIL tokens change places. Where it does not, as with dummy weights, equal answers prove no equal selection.
    """
    head = ids[:-KEPT_TAIL]
    shuffled = random.Random(0).sample(head, len(head)) + ids[-KEPT_TAIL:]
    answers = []
    for prompt in (ids, shuffled):
        server.flush()
        answers.append(server.generate(prompt, new_tokens))
    return answers[0] != answers[1]


def check_modes(
    server: Server,
    check: Check,
    modes: Sequence[str],
    short: Sequence[list[int]],
    long: Sequence[list[int]],
    new_tokens: int = NEW_TOKENS,
) -> None:
    """Each prefill mode: it runs, answers like native within the budget, and the same alone, cached and concurrent.

    short, long: prompts within the budget of the re-ranking modes, and beyond it.
    """
    record: dict = check.record.setdefault("answers", {})
    prompts, lengths = [*short, *long], [len(ids) for ids in short]
    for mode in modes:
        server.switch_prefill(mode)
        before = runs(server, f"prefill/{mode}")
        alone = []
        for ids in prompts:
            server.flush()
            alone.append(server.generate(ids, new_tokens))
        record[mode] = {"alone": alone}
        if mode == "native":
            check.record["answers_tell"] = answers_tell(server, short[-1], new_tokens)
            server.flush()
            server.generate(prompts[-1], new_tokens)  # its pages are cached again
        else:
            check.expect(runs(server, f"prefill/{mode}") > before, f"{mode}: the device ran it")
            if mode != "misa":  # no budget: it drops tokens from the 2049th on
                same = alone[: len(short)] == record["native"]["alone"][: len(short)]
                check.expect(same, f"{mode}: native's answers to prompts of {lengths} tokens")
            agree = sum(a == b for a, b in zip(alone, record["native"]["alone"]))
            record[mode]["agrees_with_native"] = f"{agree} of {len(alone)}"
        again = server.generate(prompts[-1], new_tokens)  # its pages are still cached
        server.flush()
        with ThreadPoolExecutor(len(alone)) as pool:
            together = list(pool.map(lambda ids: server.generate(ids, new_tokens), prompts))
        record[mode] |= {"cached": [again], "together": together}
        check.expect(again == alone[-1], f"{mode}: the same answer from the cache")
        equal = sum(a == b for a, b in zip(alone, together))
        record[mode]["together_equal"] = f"{equal} of {len(alone)}"
        check.expect(equal == len(alone), f"{mode}: {equal} of {len(alone)} answers the same when served together")
    distinct = {tuple(answer) for answer in record["native"]["alone"]}
    check.expect(len(distinct) == len(prompts), "answers differ from prompt to prompt")


def check_integrity(server: Server, check: Check) -> None:
    """The stored block statistics that were compared with the keys, and how many were wrong."""
    status = server.status()
    checked, wrong = status["integrity_checked"], status["integrity_mismatches"]
    check.record["integrity"] = {"checked": checked, "mismatches": wrong}
    check.expect(checked > 0, f"{checked} stored block means compared with their keys")
    check.expect(wrong == 0, f"{wrong} of them differ")
