"""Training sequences of the small model: what is weighed, how long they are, and that the splits share nothing."""

import itertools
import re

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers (it comes with SGLang) is not installed")

from retrieval_tasks import answer_text, split_of  # noqa: I001
from small_dsa import examples
from small_dsa.examples import (
    ANSWER_WEIGHT,
    LONG_FROM,
    MIXTURE,
    STAND_INS,
    TEXT_WEIGHT,
    Example,
    batches,
    copy_example,
    make_example,
    task_example,
    tokenizer,
)
from small_dsa.vocabulary import BOS, EOS, PAD, SPECIAL

TASKS = tuple(task for task in MIXTURE if task != "copy")
ROWS = 8
BOS_ID, EOS_ID, PAD_ID = (SPECIAL.index(name) for name in (BOS, EOS, PAD))


def text_of(ids: torch.Tensor) -> str:
    return tokenizer().decode(ids.tolist(), skip_special_tokens=False)


def filled(example: Example) -> int:
    """Tokens before the padding."""
    return int((example.tokens != PAD_ID).sum())


@pytest.fixture
def cases(monkeypatch):
    """The cases that task_example draws, as they come."""
    drawn = []

    def drawing(*arguments):
        drawn.append(make_case(*arguments))
        return drawn[-1]

    make_case = examples.make_case
    monkeypatch.setattr(examples, "make_case", drawing)
    return drawn


def test_shares_of_the_mixture_are_one():
    assert sum(MIXTURE.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_weights_mark_exactly_the_answers(cases, task, length):
    for seed in range(3):
        example = task_example(task, length, seed, "train", ROWS)
        case, tokens, weight = cases[-1], example.tokens, example.weight
        runs = itertools.groupby(range(length), key=lambda n: float(weight[n]) == ANSWER_WEIGHT)  # noqa: B023
        marked = [text_of(tokens[list(run)]) for answer, run in runs if answer]
        assert marked == [answer_text(question) + EOS for question in case.questions[: len(marked)]]
        assert len(marked) >= 1
        end = filled(example)
        tail = "".join(question.text + said for question, said in zip(case.questions, marked))
        text = text_of(tokens[1:end])
        assert text.endswith(tail) and case.context.endswith(text.removesuffix(tail))
        assert len(text) - len(tail) > 0.8 * len(case.context)
        assert tokens[0] == BOS_ID and weight[0] == 0.0 and not weight[end:].any()
        others = weight[1:end][weight[1:end] != ANSWER_WEIGHT]
        assert torch.equal(others, torch.full_like(others, TEXT_WEIGHT))


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_length_is_exact_and_rows_lie_inside(task, length):
    for seed in range(3):
        example = task_example(task, length, seed, "train", ROWS)
        end = filled(example)
        assert example.tokens.shape == example.weight.shape == (length,) and 0.6 * length < end <= length
        assert (example.tokens[end:] == PAD_ID).all() and int(example.tokens.min()) >= 0
        assert int(example.tokens.max()) < tokenizer().get_vocab_size()
        assert example.rows.shape == (ROWS,)
        assert int(example.rows.min()) >= 0 and int(example.rows.max()) < end
        assert (example.weight[example.rows[: ROWS // 2] + 1] == ANSWER_WEIGHT).all()


@pytest.mark.parametrize("length", [512, 2048])
def test_answers_can_be_found_in_the_sequence(cases, length):
    """The context is cut at its start where it came out too long: that must not cost the needles."""
    for task in TASKS:
        found = asked = 0
        for seed in range(3):
            example = task_example(task, length, seed, "train", ROWS)
            context = text_of(example.tokens).split("\nQuestion:")[0]
            answers = [answer for question in cases[-1].questions for answer in question.answers]
            asked, found = asked + len(answers), found + sum(answer in context for answer in answers)
        assert found >= 0.9 * asked, task


NEEDLE = (r"secret (?:number|code) of (\S+) is [0-9a-f]", r"secret (?:number|code) of \S+ is ([0-9a-f-]+)\.")
DRAWN = {
    "cwe": (r"\n\d+\. ([a-z]+-[a-z]+)\n",),
    "fwe": (r" ([a-z]{6})(?= )",),
    "vt": (r"Variable ([A-Z]{5}) is", r" is (\d{5})\."),
}


def drawn_strings(task: str, split: str) -> set[str]:
    """Keys, values and names in the text of some sequences; of a uuid the digits by which its split is drawn."""
    found: list[str] = []
    for seed in range(4):
        text = text_of(task_example(task, 1024, seed, split, ROWS).tokens)
        if task == "fwe":  # its wording has words of six letters too
            text = text.split("leave out the dots.\n")[1].split("\nQuestion:")[0]
        found += [string for pattern in DRAWN.get(task, NEEDLE) for string in re.findall(pattern, text)]
    return {string[:8] if string.count("-") == 4 else string for string in found}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_string(task):
    train, held = drawn_strings(task, "train"), drawn_strings(task, "eval")
    assert len(train) >= 4 and len(held) >= 4 and not train & held
    assert {split_of(string) for string in train} == {"train"} and {split_of(string) for string in held} == {"eval"}


def test_the_two_splits_of_a_seed_are_two_texts():
    train, held = (task_example("niah_multikey_2", 512, 3, split, ROWS).tokens for split in ("train", "eval"))
    assert not torch.equal(train, held)


@pytest.mark.parametrize("length", [256, 512, 2048])
def test_copies_repeat_with_a_period(length):
    for seed in range(6):
        example = copy_example(length, seed, ROWS)
        weighed = example.weight.nonzero()[:, 0]
        period = int(weighed[0]) - 1  # what comes first in the second copy cannot be known
        assert 16 <= period <= length // 2 and example.tokens.shape == (length,)
        assert torch.equal(example.tokens[period:], example.tokens[:-period])
        assert torch.equal(weighed, torch.arange(period + 1, length))
        assert len(set(example.tokens[:period].tolist())) > 0.8 * period
        assert int(example.rows.min()) >= 0 and int(example.rows.max()) < length
        assert int(example.rows[: ROWS // 2].min()) >= period


def test_a_seed_is_one_sequence_and_short_ones_have_stand_ins(monkeypatch):
    tasks = []
    drawn = examples.task_example
    monkeypatch.setattr(examples, "task_example", lambda task, *rest: tasks.append(task) or drawn(task, *rest))
    for seed in range(40):
        first, again = make_example(256, seed, ROWS), make_example(256, seed, ROWS)
        assert all(torch.equal(one, other) for one, other in zip(first, again)) and len(first.tokens) == 256
    assert len(set(tasks)) > 3 and not set(tasks) & set(STAND_INS)
    tasks.clear()
    for seed in range(40):
        make_example(LONG_FROM, seed, ROWS)
    assert set(tasks) & set(STAND_INS)


def test_batches_go_on_where_an_earlier_run_ended():
    stream = batches(256, 3, ROWS, 1000, workers=0)
    first, second = next(stream), next(stream)
    assert first.tokens.shape == (3, 256) and first.rows.shape == (3, ROWS)
    assert torch.equal(next(batches(256, 3, ROWS, 1003, workers=0)).tokens, second.tokens)
    assert torch.equal(first.tokens[1], make_example(256, 1001, ROWS).tokens)
