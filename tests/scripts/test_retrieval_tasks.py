"""Generated cases: the same everywhere, as long as asked, and with exactly the needles their task defines."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from unittest.mock import Mock
from zlib import crc32

import pytest

from retrieval_tasks import NEW_TOKENS, QA_TASKS, TASKS, Question, answer_text, make_case, score, split_of
from retrieval_tasks.drawing import draw_number, draw_uuid, pairs_of
from retrieval_tasks.niah import NIAH_SHAPES
from retrieval_tasks.words import ADJECTIVES, NOUNS
from tests.scripts.conftest import SCRIPTS

GENERATED = tuple(task for task in TASKS if task not in QA_TASKS)
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def count(text: str) -> int:
    """Words, digits in threes and marks, much as tokenizers of large models cut text."""
    return len(re.findall(r"\d{1,3}|[^\W\d]+|[^\w\s]", text))


def test_the_13_tasks_and_their_published_new_tokens():
    assert len(TASKS) == 13
    assert {task: NEW_TOKENS[task] for task in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")} == {
        "niah_single_1": 128,
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
    }


def test_words():
    assert len(ADJECTIVES) >= 250 and len(NOUNS) >= 350
    both = [*ADJECTIVES, *NOUNS]
    assert len(set(both)) == len(both)
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in both)


def test_splits_are_disjoint_and_both_large():
    train, held = set(pairs_of("train")), set(pairs_of("eval"))
    assert not train & held
    assert len(train | held) == len(ADJECTIVES) * len(NOUNS)
    assert len(held) > 28_000  # needles of 131072 tokens and more


@pytest.mark.parametrize("split", ["train", "eval"])
def test_values_belong_to_their_split(split):
    stream = random.Random("values")
    for _ in range(200):
        number, code = draw_number(stream, split, 7), draw_uuid(stream, split)
        assert re.fullmatch(r"[1-9]\d{6}", number) and split_of(number) == split
        assert re.fullmatch(UUID, code) and split_of(code[:8]) == split
        assert (crc32(number.encode()) % 4 == 0) == (split == "eval")


@pytest.mark.parametrize("task", GENERATED)
def test_same_arguments_same_case(task):
    first = make_case(task, 1500, count, 5, "train", 2)
    assert first == make_case(task, 1500, count, 5, "train", 2)
    assert first.context != make_case(task, 1500, count, 6, "train", 2).context
    assert first.context != make_case(task, 1500, count, 5, "eval", 2).context


def test_same_case_in_another_process():
    """Nothing depends on the process: hash seeds, dictionary of strings, earlier calls."""
    program = (
        "import sys, zlib; from retrieval_tasks import make_case, TASKS\n"
        "print([zlib.crc32(repr(make_case(t, 900, lambda s: len(s.split()), 3)).encode()) for t in TASKS[:-2]])"
    )
    here = [crc32(repr(make_case(task, 900, lambda s: len(s.split()), 3)).encode()) for task in GENERATED]
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("num_tokens", [1024, 4096, 32768])
@pytest.mark.parametrize("num_questions", [1, 4])
def test_length_is_just_below_the_limit_with_few_counts(task, num_tokens, num_questions):
    for seed in range(3 if num_tokens < 32768 else 1):
        counter = Mock(side_effect=count)
        case = make_case(task, num_tokens, counter, seed, "eval", num_questions)
        longest = max(count(case.context + question.text + answer_text(question)) for question in case.questions)
        assert 0.93 * num_tokens <= longest <= num_tokens
        assert 1 <= counter.call_count <= 4


@pytest.mark.parametrize("task", GENERATED)
def test_questions_end_where_the_answer_begins(task):
    case = make_case(task, 1500, count, 1, "train", 2)
    for question in case.questions:
        assert question.text == question.text.rstrip() and question.text.startswith("\nQuestion: ")
        assert answer_text(question).startswith(" ") and score(question, answer_text(question)) == 1.0
        assert all(answer in case.context and answer == answer.strip() for answer in question.answers)


@pytest.mark.parametrize("task", NIAH_SHAPES)
def test_needles_continue_the_question(task):
    shape = NIAH_SHAPES[task]
    case = make_case(task, 2000, count, 2, "train", 3)
    assert len({question.text for question in case.questions}) == 3
    needles = re.findall(r"The secret (number|code) of (\S+) is (\S+)\.", case.context)
    by_key: dict[str, list[str]] = {}
    for thing, key, value in needles:
        assert thing == shape.value
        by_key.setdefault(key, []).append(value)
    for question in case.questions:
        assert len(question.answers) == shape.asked * shape.values
        if shape.asked == 1:
            lead = question.text.split("\nAnswer: ")[1]
            assert case.context.count(lead + " ") == shape.values
            assert tuple(by_key[lead.split()[-2]]) == question.answers  # in their order in the context
        else:
            told = re.findall(r" The secret number of (\S+) is (\d+)\.", answer_text(question))
            assert tuple(value for _, value in told) == question.answers
            assert all(by_key[key] == [value] and key in question.text for key, value in told)


@pytest.mark.parametrize("task,num_needles", [("niah_single_1", 1), ("niah_multikey_1", 4), ("niah_multivalue", 4)])
def test_published_number_of_needles(task, num_needles):
    assert make_case(task, 2000, count, 0).context.count("The secret number of") == num_needles


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_haystack_of_needles_has_distinct_keys(task):
    case = make_case(task, 8192, count, 0, num_questions=20)
    lines = case.context.split("\n")[1:]
    found = [re.fullmatch(r"The secret (?:number|code) of (\S+) is (\S+)\.", line) for line in lines]
    assert all(found) and len({match[1] for match in found}) == len(lines) > 50
    assert len({question.text for question in case.questions}) == 20


@pytest.mark.parametrize("task", NIAH_SHAPES)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_needle_stands_at_its_depth(task, depth):
    case = make_case(task, 4096, count, 0, depth=depth)
    places = [case.context.index(answer) / len(case.context) for answer in case.questions[0].answers]
    assert all(abs(place - depth) < 0.04 for place in places), places


def test_chain_of_five_variables():
    case = make_case("vt", 1024, count, 0)
    assigned = re.findall(r"Variable ([A-Z]{5}) is (?:Variable )?(\w+)\.", case.context)
    names = [name for name, _ in assigned]
    assert tuple(names) == case.questions[0].answers and len(set(names)) == 5
    assert [source for _, source in assigned][1:] == names[:-1]
    assert re.fullmatch(r"\d{5}", assigned[0][1]) and assigned[0][1] in case.questions[0].text


@pytest.mark.parametrize(
    "num_tokens,often,seldom", [(8192, 30, 3), (4096 - NEW_TOKENS["cwe"], 30, 3), (2048, 6, 1), (800, 3, 1)]
)
def test_common_words(num_tokens, often, seldom):
    case = make_case("cwe", num_tokens, count, 0)
    counts = Counter(line.split(". ")[1] for line in case.context.split("\n")[1:])
    assert {word for word, n in counts.items() if n == often} == set(case.questions[0].answers)
    assert Counter(counts.values())[often] == 10 and set(counts.values()) == {often, seldom}


def test_frequent_words():
    case = make_case("fwe", 4096, count, 0)
    counts = Counter(re.findall(r"\b[a-z]{6}\b", case.context.split("\n")[1])).most_common(4)
    assert tuple(word for word, _ in counts[:3]) == case.questions[0].answers
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
    assert counts[0][1] / counts[1][1] == pytest.approx((3 / 2) ** 2, rel=0.02)  # ranks 2 and 3, alpha 2


def test_essay_of_the_caller():
    essay = "Alpha went out.  Beta\nstayed in! Gamma laughed?"
    case = make_case("niah_single_2", 600, count, 0, essay=essay)
    assert "Beta stayed in! Gamma laughed? Alpha went out. Beta" in case.context.replace("  ", " ")
    with pytest.raises(ValueError, match="essay has no sentence"):
        make_case("niah_single_2", 600, count, 0, essay="  ")


def test_question_answering_from_local_files(tmp_path):
    squad = tmp_path / "squad.json"
    paragraphs = [
        {
            "context": f"Item {n} lies in town {n}. " * 5,
            "qas": [{"question": f"Where is item {n}?", "answers": [{"text": f"town {n}"}, {"text": f"in town {n}"}]}],
        }
        for n in range(40)
    ]
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    case = make_case("qa_1", 500, count, 0, qa_file=squad)
    question = case.questions[0]
    assert question.match == "part" and question.answers[0] in case.context
    assert count(case.context) < 500 and case.context.count("Document ") > 3
    hotpot = tmp_path / "hotpot.json"
    entries = [
        {"question": f"Who is {n}?", "answer": f"No. {n}", "context": [["T", [f"He is No. {n}."]]]} for n in range(40)
    ]
    hotpot.write_text(json.dumps(entries))
    assert make_case("qa_2", 200, count, 0, qa_file=hotpot).questions[0].answers[0].startswith("No. ")
    with pytest.raises(ValueError, match="published SQuAD form"):
        make_case("qa_1", 500, count, 0, qa_file=hotpot)
    with pytest.raises(ValueError, match="qa_2 needs qa_file"):
        make_case("qa_2", 500, count, 0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"task": "niah"}, "task must be one of niah_single_1"),
        ({"split": "test"}, "split must be one of train, eval, got 'test'"),
        ({"num_questions": 0}, "num_questions must be at least 1, got 0"),
        ({"depth": 1.5}, "depth must be None, or in 0..1"),
        ({"task": "vt", "depth": 0.5}, "got 0.5 for vt"),
        ({"num_tokens": 20}, "num_tokens is too small for niah_single_1: got 20"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_case(**{"task": "niah_single_1", "num_tokens": 600, "count_tokens": count, "seed": 0, **arguments})


def test_score():
    every = Question("q", ("123", "AbC", "789"))
    assert score(every, "789 and 123, then abc") == 1.0
    assert score(every, "12 3 789") == pytest.approx(1 / 3)
    assert score(every, "") == 0.0
    part = Question("q", ("in Rome", "Rome"), "part")
    assert (score(part, "It is ROME."), score(part, "Paris")) == (1.0, 0.0)


def test_a_long_case_takes_little_time():
    make_case("niah_single_2", 2000, lambda text: len(text) // 4, 0)  # builds the word pairs
    for task in GENERATED:
        spent = []
        for seed in range(3):
            began = time.process_time()
            make_case(task, 32768, lambda text: len(text) // 4, seed)
            spent.append(time.process_time() - began)
        assert min(spent) < 0.06, (task, spent)
