"""Variable tracking (RULER's vt, arXiv 2404.06654): a chain of assignments in noise; all names of one value are asked.

Published: 1 chain of 4 hops, so 5 variables with names of 5 letters and a 5-digit value. Each further question gets a
chain of its own.
"""

import random

from retrieval_tasks.case import Question
from retrieval_tasks.drawing import Split, draw_distinct, draw_letters, draw_number
from retrieval_tasks.fitting import Builder
from retrieval_tasks.haystack import Filler, noise

HOPS = 4
NAME_LENGTH = 5
VALUE_DIGITS = 5
HEAD = "The text below gives values to variables. Remember which variables have the same value.\n"


def chain_sentences(names: list[str], value: str) -> list[str]:
    """The first name gets the value, each later one its predecessor."""
    sources = [value, *(f"Variable {name}" for name in names)]
    return [f"Variable {name} is {source}." for name, source in zip(names, sources)]


def ask_chain(names: list[str], value: str) -> Question:
    text = f"\nQuestion: which variables have the value {value}?\nAnswer: The variables with the value {value} are"
    return Question(text, tuple(names))


def tracking_builder(seed: str, split: Split, num_questions: int) -> Builder:
    """Builds the task around any amount of noise; assignments of a chain keep their order."""
    stream = random.Random(seed + "/chains")
    length = HOPS + 1
    names = draw_distinct(lambda: draw_letters(stream, split, NAME_LENGTH), length * num_questions)
    values = draw_distinct(lambda: draw_number(stream, split, VALUE_DIGITS), num_questions)
    chains = [names[start : start + length] for start in range(0, len(names), length)]
    hidden = []
    for chain, value in zip(chains, values):
        places = sorted(stream.random() for _ in chain)
        hidden += list(zip(places, chain_sentences(chain, value)))
    hidden.sort(key=lambda entry: entry[0])
    questions = tuple(ask_chain(chain, value) for chain, value in zip(chains, values))
    filler = Filler(noise())

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        units = filler.take(chars)
        parts, done = [HEAD], 0
        for place, sentence in hidden:
            until = round(place * len(units))
            parts += [*units[done:until], sentence + " "]
            done = until
        parts += units[done:]
        return "".join(parts).rstrip(), questions

    return build
