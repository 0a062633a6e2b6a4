"""Checks of a server with the small trained model, whose answers show what was selected: needles, and their names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from openai_client import LocalTokenizer
from retrieval_tasks import answer_text, make_case
from server_checks import Check, check_integrity, check_modes, runs, shadow_forwards
from server_process import Server

SMALL_MODEL = Path(__file__).resolve().parent.parent / "tests" / "data" / "small_dsa"
TASK = "niah_multikey_2"  # every sentence is a needle; the small model finds all, to the 32768 tokens it was trained on
WITHIN, BEYOND = (2500, 7000), (20000, 32000)  # tokens of prompts within the budget of the re-ranking modes and decode


class Needle(NamedTuple):
    """Token ids of a prompt that ends with the question, and of the answer that follows."""

    ids: list[int]
    answer: list[int]


def needle_prompt(num_tokens: int, seed: int, model: Path = SMALL_MODEL) -> Needle:
    """A prompt of nearly num_tokens tokens. ValueError where the answer changes how the prompt's end is cut up."""
    tokenizer = LocalTokenizer(str(model))
    case = make_case(TASK, num_tokens, tokenizer.count, seed)
    ids = tokenizer.encode(case.prompt())
    whole = tokenizer.encode(case.prompt() + answer_text(case.questions[0]))
    if whole[: len(ids)] != ids:
        raise ValueError(f"{TASK} of {num_tokens} tokens: prompt and answer share a token of {model}'s tokenizer")
    return Needle(ids, whole[len(ids) :])


def check_answers(server: Server, check: Check, modes: Sequence[str]) -> None:
    """`check_modes` on needles, which native finds, and whose answers show what was selected."""
    short, long = ([needle_prompt(n, seed=n) for n in lengths] for lengths in (WITHIN, BEYOND))
    needles = [*short, *long]
    new_tokens = min(len(one.answer) for one in needles)
    check_modes(server, check, modes, [one.ids for one in short], [one.ids for one in long], new_tokens)
    check.expect(check.record["answers_tell"], "another context has another answer: answers show what was selected")
    for mode, found in check.record["answers"].items():
        right = sum(got == one.answer[:new_tokens] for got, one in zip(found["alone"], needles))
        found["needles_found"] = f"{right} of {len(needles)}"
        if mode in ("native", "misa_rerank"):
            check.expect(right == len(needles), f"{mode}: {right} of {len(needles)} needles found")


def check_graph_answers(server: Server, check: Check, modes: Sequence[str]) -> None:
    """`check_answers` on a server that captures prefill graphs and samples every forward, but none of those that SGLang
    makes up for its graphs.
    """

    def sampled() -> int:
        return shadow_forwards(server.status()).get("prefill/sampled", 0)

    check.expect(sampled() == 0, f"{sampled()} forwards sampled before the first prompt")
    check_answers(server, check, modes)
    check.expect(sampled() > 0, f"{sampled()} forwards sampled")


def check_needle_decode(server: Server, check: Check) -> None:
    """decode_mode=hisa on the needles within its budget: it ran, under graphs, and named them."""
    needles = [needle_prompt(n, seed=n) for n in WITHIN]
    before = runs(server, "decode/hisa")
    answers = []
    for one in needles:
        server.flush()
        answers.append(server.generate(one.ids, len(one.answer)))
    check.record["decode_answers"] = answers
    ran, expected = runs(server, "decode/hisa") - before, sum(len(one.answer) - 1 for one in needles)
    check.expect(ran >= expected, f"decode/hisa: {ran} runs on the device for {expected} decode steps")
    check.expect(answers == [one.answer for one in needles], "decode/hisa: the needles are named")
    check_integrity(server, check)
