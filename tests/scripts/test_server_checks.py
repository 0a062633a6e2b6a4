"""The checks of check_server.py against a stand-in: what fails them, and which answers say nothing."""

import json

import pytest

import check_server
import needle_checks
import server_checks
from needle_checks import check_answers, check_needle_decode, needle_prompt
from server_checks import MODES, Check, answers_tell, check_modes


class Model:
    """A server that answers prompts by a rule. stuck: a mode that never runs; lossy: one that answers otherwise."""

    def __init__(self, rule, stuck: str = "", lossy: str = "") -> None:
        self.rule, self.stuck, self.lossy = rule, stuck, lossy
        self.mode, self.ran = "native", dict.fromkeys(("prefill/misa", "decode/hisa"), 0)
        self.cached: list[list[int]] = []

    def switch_prefill(self, mode: str) -> None:
        self.mode = mode

    def flush(self) -> None:
        self.cached.clear()

    def status(self) -> dict:
        return {"device_runs": self.ran, "integrity_checked": 7, "integrity_mismatches": 0}

    def generate(self, ids: list[int], new_tokens: int) -> list[int]:
        self.cached.append(ids)
        for key, runs in ((f"prefill/{self.mode}", 1), ("decode/hisa", new_tokens - 1)):
            self.ran[key] = self.ran.get(key, 0) + (runs if self.mode != self.stuck else 0)
        answer = self.rule(ids)[:new_tokens]
        return [1] * new_tokens if self.mode == self.lossy else answer


def last_token(ids: list[int]) -> list[int]:
    """As dummy weights answer."""
    return [ids[-1], 2, 3, 4] * 8


def context(ids: list[int]) -> list[int]:
    return [sum(place * token for place, token in enumerate(ids)) % 4001, 2, 3, 4] * 8


@pytest.fixture
def needles():
    return {tuple(one.ids[-30:]): one for one in map(needle_prompt, (2500, 7000), (2500, 7000))}


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    return [server_checks.prompt(n, n) for n in (200, 300)], [server_checks.prompt(500, 500)]


@pytest.mark.parametrize(("rule", "tell"), [(last_token, False), (context, True)])
def test_a_record_says_whether_answers_show_what_was_selected(rule, tell):
    check = Check("modes")
    check_modes(Model(rule), check, MODES, *prompts())
    assert check.record["failures"] == [] and check.record["answers_tell"] is tell
    assert answers_tell(Model(rule), server_checks.prompt(200, 1), 4) is tell


def test_what_fails():
    check = Check("modes")
    check_modes(Model(context, stuck="misa"), check, ("native", "misa"), *prompts())
    assert check.record["failures"] == ["misa: the device ran it"]
    check = Check("modes")
    check_modes(Model(context, lossy="hisa"), check, ("native", "hisa"), *prompts())
    assert check.record["failures"] == ["hisa: native's answers to prompts of [200, 300] tokens"]
    check = Check("modes")
    check_modes(Model(context, lossy="misa"), check, ("native", "misa"), *prompts())
    assert check.record["failures"] == [], "misa promises nothing beyond 2048 tokens"


def test_a_needle_is_no_part_of_its_prompt_s_question():
    one = needle_prompt(2500, 1)
    assert 2000 < len(one.ids) <= 2500 and len(one.answer) > 1
    places = [n for n in range(len(one.ids)) if one.ids[n : n + len(one.answer)] == one.answer]
    assert len(places) == 1 and places[0] < len(one.ids) - len(one.answer)


def test_answers_must_be_the_needles(monkeypatch, needles):
    monkeypatch.setattr(needle_checks, "BEYOND", ())
    check = Check("answers")

    def reads(ids: list[int]) -> list[int]:
        """Finds the needle where it is in the prompt, in one piece."""
        one = needles[tuple(ids[-30:])]
        there = any(ids[n : n + len(one.answer)] == one.answer for n in range(len(ids)))
        return one.answer if there else [0] * 8

    check_answers(Model(reads), check, ("native", "misa_rerank"))
    assert check.record["failures"] == [] and check.record["answers"]["native"]["needles_found"] == "2 of 2"
    check = Check("answers")
    check_answers(Model(last_token), check, ("native", "misa_rerank"))
    failures = " ".join(check.record["failures"])
    assert "another context has another answer" in failures and "native: 0 of 2 needles found" in failures


@pytest.mark.parametrize(
    ("counts", "failures"),
    [
        ([0, 0, 7, 7], []),
        ([0, 0, 0, 0], ["0 forwards sampled"]),
        ([3, 3, 9, 9], ["3 forwards sampled before the first prompt"]),
    ],
)
def test_forwards_of_graph_captures_must_not_be_sampled(monkeypatch, counts, failures):
    monkeypatch.setattr(needle_checks, "check_answers", lambda *_: None)
    server, said = Model(context), iter(counts)
    monkeypatch.setattr(server, "status", lambda: {"shadow": {"forwards": {"prefill/sampled": next(said)}}})
    check = Check("answers_graph")
    needle_checks.check_graph_answers(server, check, MODES)
    assert check.record["failures"] == failures


def test_decode_must_name_the_needles(needles):
    check = Check("answers_decode")
    check_needle_decode(Model(lambda ids: needles[tuple(ids[-30:])].answer), check)
    assert check.record["failures"] == [] and check.record["integrity"]["checked"] == 7
    check = Check("answers_decode")
    check_needle_decode(Model(last_token), check)
    assert check.record["failures"] == ["decode/hisa: the needles are named"]


def test_a_comparison_that_could_not_be_made_is_said(tmp_path, capsys):
    record = {"decode_answers": [[1], [2], [3], [4]]}
    (tmp_path / "decode_graph.json").write_text(json.dumps(record))
    assert check_server.compare_decode(tmp_path) == []
    assert "decode_graph: not compared with native" in capsys.readouterr().out
    native = {"answers": {"native": {"alone": [[1], [2], [9]]}}, "answers_tell": True}
    (tmp_path / "modes.json").write_text(json.dumps(native))
    assert check_server.compare_decode(tmp_path) == ["decode_graph: other answers than native's within the budget"]
    written = json.loads((tmp_path / "decode_graph.json").read_text())
    assert written["equals_native_within_budget"] is False and written["answers_tell"] is True
