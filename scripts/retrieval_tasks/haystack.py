"""Text that needles hide in: a few repeated sentences ("noise"), generated prose, or the caller's own essay.

A unit is one sentence with the blank or line break after it, so that any number of units joins to a text.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle

from retrieval_tasks.words import ADJECTIVES, NOUNS

NOISE = (
    "The road is long and the hills are low. ",
    "A light wind comes in from the sea. ",
    "We walk on while the day goes by. ",
    "Nobody is in a hurry. ",
    "There it is, and here we are again.\n",
)
_VERBS = """
follows finds watches carries leaves paints repairs remembers guards measures cleans crosses hides sells meets reaches
borrows admires circles forgets touches opens moves shows keeps
"""
_PLACES = "near behind above below beside beyond under around inside outside across past"
VERBS = tuple(_VERBS.split())
PLACES = tuple(_PLACES.split())
TIMES = (
    "In the morning",
    "At noon",
    "Late in the evening",
    "Once a year",
    "After the rain",
    "Before sunrise",
    "On most days",
    "Now and then",
    "Every spring",
    "When the market closes",
    "During the storm",
    "On the second day",
)
SHAPES = (
    "The {a0} {n0} {v0} the {n1} {p0} the {a1} {n2}.",
    "{t}, the {n0} {v0} one {a0} {n1}.",
    "Nobody knows why the {a0} {n0} {v0} the {n1}.",
    "{t}, every {n0} {p0} the {n1} looks {a0} and {a1}.",
    "The {n0} and the {n1} stay {p0} the {a0} {n2}.",
    "It is said that the {n0} {v0} the {a0} {n1} and then {v1} the {n2}.",
    "A story about the {a0} {n0} begins {p0} the {n1}.",
    "{t}, the {a0} {n0} {v0} the {n1}, but the {a1} {n2} {v1} it too.",
    "Is the {n0} {p0} the {n1} as {a0} as the {n2}?",
    "The {n0} was {a0}, the {n1} was {a1}, and the {n2} {v0} both.",
    "Many a {n0} {v0} the {n1} {p0} the {n2}.",
    "Without the {a0} {n0}, the {n1} {v0} nothing.",
)


class Filler:
    """Units taken from an endless iterator as they are needed; the first ones are the same for every size."""

    def __init__(self, units: Iterator[str]) -> None:
        self._source = units
        self._units: list[str] = []
        self._ends: list[int] = []  # characters up to and including each unit

    def take(self, chars: int) -> list[str]:
        """As many of the first units as have at most `chars` characters together."""
        while not self._ends or self._ends[-1] <= chars:
            self._units.append(next(self._source))
            self._ends.append(len(self._units[-1]) + (self._ends[-1] if self._ends else 0))
        return self._units[: bisect_right(self._ends, chars)]


def noise() -> Iterator[str]:
    """The repeated plain sentences."""
    return cycle(NOISE)


def generated_prose(stream: random.Random) -> Iterator[str]:
    """Sentences made from the word lists, in paragraphs of 4 to 9."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(stream.random() * len(words))]

    while True:
        for left in reversed(range(4 + int(stream.random() * 6))):
            sentence = pick(SHAPES).format(
                a0=pick(ADJECTIVES), a1=pick(ADJECTIVES), n0=pick(NOUNS), n1=pick(NOUNS), n2=pick(NOUNS),
                v0=pick(VERBS), v1=pick(VERBS), p0=pick(PLACES), t=pick(TIMES),
            )  # fmt: skip
            yield sentence + (" " if left else "\n")


@lru_cache(maxsize=4)
def essay_sentences(essay: str) -> tuple[str, ...]:
    """The sentences of the caller's essay, white space within each made single blanks; ValueError for an empty one."""
    sentences = tuple(" ".join(part.split()) + " " for part in re.split(r"(?<=[.!?])\s+", essay) if part.strip())
    if not sentences:
        raise ValueError("essay has no sentence; give a text file, or none for generated prose")
    return sentences


def essay_prose(stream: random.Random, essay: str | None) -> Iterator[str]:
    """The essay from a random sentence on, and around again at its end; generated prose for None."""
    if essay is None:
        return generated_prose(stream)
    sentences = essay_sentences(essay)
    start = int(stream.random() * len(sentences))
    return cycle(sentences[start:] + sentences[:start])
