"""Needles in a haystack: the eight NIAH tasks of RULER (arXiv 2404.06654), in our own wording.

A needle is "The secret number of KEY is VALUE."; a question repeats it up to the value. Keys are word pairs or uuids,
values 7-digit numbers or uuids ("secret code").
"""

import random
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from retrieval_tasks.case import Question
from retrieval_tasks.drawing import Split, draw_distinct, draw_number, draw_pair, draw_uuid, num_pairs
from retrieval_tasks.fitting import Builder
from retrieval_tasks.haystack import Filler, essay_prose, noise

NUMBER_DIGITS = 7


@dataclass(frozen=True, slots=True)
class NiahShape:
    """One task. haystack "needles": nothing but needles. keys: needles of different keys, `values` each; `asked` keys
    are asked in one question.
    """

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuid"] = "words"
    value: Literal["number", "code"] = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1


NIAH_SHAPES = {
    "niah_single_1": NiahShape("noise"),
    "niah_single_2": NiahShape("essay"),
    "niah_single_3": NiahShape("essay", value="code"),
    "niah_multikey_1": NiahShape("essay", keys=4),
    "niah_multikey_2": NiahShape("needles"),
    "niah_multikey_3": NiahShape("needles", key="uuid", value="code"),
    "niah_multivalue": NiahShape("essay", values=4),
    "niah_multiquery": NiahShape("essay", keys=4, asked=4),
}


def needle(thing: str, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"The secret {thing} of {key} is {value}."


def ask(thing: str, keys: list[str], values: list[list[str]]) -> Question:
    """The question for all values of the keys; values[i] are key i's, in their order in the context."""
    answers = tuple(value for of_key in values for value in of_key)
    if len(keys) > 1:
        listed = ", ".join(keys[:-1]) + f" and {keys[-1]}"
        told = "".join(" " + needle(thing, key, value) for key, of_key in zip(keys, values) for value in of_key)
        return Question(f"\nQuestion: what are the secret {thing}s of {listed}?\nAnswer:", answers, "all", told)
    asked = f"are all secret {thing}s" if len(answers) > 1 else f"is the secret {thing}"
    text = f"\nQuestion: what {asked} of {keys[0]}?\nAnswer: The secret {thing} of {keys[0]} is"
    return Question(text, answers)


def draw_key(stream: random.Random, shape: NiahShape, split: Split) -> str:
    return draw_pair(stream, split) if shape.key == "words" else draw_uuid(stream, split)


def draw_value(stream: random.Random, shape: NiahShape, split: Split) -> str:
    return draw_uuid(stream, split) if shape.value == "code" else draw_number(stream, split, NUMBER_DIGITS)


def niah_builder(
    task: str, seed: str, split: Split, num_questions: int, depth: float | None, essay: str | None
) -> Builder:
    """Builds the task around any amount of haystack; the needles are the same for every amount.

    Each of several questions gets needles of its own, so there may be more than the task's published number of keys.
    """
    shape = NIAH_SHAPES[task]
    if shape.haystack == "needles":
        return _needles_only(shape, seed, split, num_questions, depth)
    return _in_text(shape, seed, split, num_questions, depth, essay)


def _in_text(
    shape: NiahShape, seed: str, split: Split, num_questions: int, depth: float | None, essay: str | None
) -> Builder:
    stream = random.Random(seed + "/needles")
    num_asked = num_questions * shape.asked
    keys = draw_distinct(lambda: draw_key(stream, shape, split), max(num_asked, shape.keys))
    owned = [draw_distinct(lambda: draw_value(stream, shape, split), shape.values) for _ in keys]
    # (place in 0..1, key): the asked keys come first in `keys`
    places = sorted(
        (stream.random() if depth is None or number >= num_asked else depth, number)
        for number in range(len(keys))
        for _ in range(shape.values)
    )
    hidden, seen = [], [0] * len(keys)
    for place, number in places:
        hidden.append((place, needle(shape.value, keys[number], owned[number][seen[number]])))
        seen[number] += 1
    asked = [slice(start, start + shape.asked) for start in range(0, num_asked, shape.asked)]
    questions = tuple(ask(shape.value, keys[part], owned[part]) for part in asked)
    filler = Filler(noise() if shape.haystack == "noise" else essay_prose(random.Random(seed + "/essay"), essay))
    head = f"The text below tells a secret {shape.value}. Remember it.\n"
    if len(places) > 1:
        head = f"The text below tells some secret {shape.value}s. Remember all of them.\n"

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        units = filler.take(chars)
        parts, done = [head], 0
        for place, sentence in hidden:
            until = round(place * len(units))
            parts += units[done:until]
            parts.append(sentence + " ")
            done = until
        parts += units[done:]
        return "".join(parts).rstrip(), questions

    return build


def _needles_only(shape: NiahShape, seed: str, split: Split, num_questions: int, depth: float | None) -> Builder:
    head = f"Every line below tells a secret {shape.value}. Remember all of them.\n"
    num_chars = len(needle(shape.value, "adjective-noun", "1234567")) if shape.key == "words" else 103
    stream = random.Random(seed + "/needles")
    drawn: dict[str, str] = {}

    def first(count: int) -> list[tuple[str, str]]:
        while len(drawn) < count:
            key = draw_key(stream, shape, split)
            if key not in drawn:
                drawn[key] = draw_value(stream, shape, split)
        return list(islice(drawn.items(), count))

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        count = max(num_questions, chars // num_chars)
        if shape.key == "words" and count > num_pairs(split) // 2:
            raise ValueError(f"num_tokens must leave at most {num_pairs(split) // 2} needles, got room for {count}")
        needles = first(count)
        if depth is None:
            chosen = random.Random(seed + "/asked").sample(range(count), num_questions)
        else:
            start = min(round(depth * (count - 1)), count - num_questions)
            chosen = list(range(start, start + num_questions))
        text = head + "\n".join(needle(shape.value, key, value) for key, value in needles)
        return text, tuple(ask(shape.value, [needles[n][0]], [[needles[n][1]]]) for n in chosen)

    return build
