"""Draws keys, numbers, codes and names that belong to one split, so that nothing evaluated was ever trained on.

A string belongs to "eval" where its CRC-32 is 0 modulo 4, else to "train" (a uuid by its first 8 digits). Only
methods of random.Random are used whose results are the same in every supported Python.
"""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args
from zlib import crc32

from retrieval_tasks.words import ADJECTIVES, NOUNS

Split = Literal["train", "eval"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def split_of(text: str) -> Split:
    """The split a string belongs to, on any machine."""
    return "train" if crc32(text.encode()) % 4 else "eval"


def check_split(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")


@lru_cache(maxsize=2)
def pairs_of(split: Split) -> tuple[str, ...]:
    """Every "adjective-noun" of the split."""
    pairs = (f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)
    return tuple(pair for pair in pairs if split_of(pair) == split)


def num_pairs(split: Split) -> int:
    return len(pairs_of(split))


def draw_pair(stream: random.Random, split: Split) -> str:
    """One pair of the split."""
    pool = pairs_of(split)
    return pool[int(stream.random() * len(pool))]


def draw_until(draw: Callable[[], str], split: Split) -> str:
    """The first drawn string of the split."""
    while split_of(text := draw()) != split:
        pass
    return text


def draw_number(stream: random.Random, split: Split, digits: int) -> str:
    """A number of exactly `digits` digits."""
    low = 10 ** (digits - 1)
    return draw_until(lambda: str(low + int(stream.random() * 9 * low)), split)


def draw_uuid(stream: random.Random, split: Split) -> str:
    """A version-4 uuid, 8-4-4-4-12 lowercase hexadecimal digits."""
    head = draw_until(lambda: f"{int(stream.random() * 2**32):08x}", split)
    tail = f"{int(stream.random() * 2**48):012x}{int(stream.random() * 2**48):012x}"
    return f"{head}-{tail[:4]}-4{tail[4:7]}-{'89ab'[int(tail[7], 16) % 4]}{tail[8:11]}-{tail[12:]}"


def draw_letters(stream: random.Random, split: Split, length: int, letters: str = LETTERS) -> str:
    """A word of `length` random letters."""
    return draw_until(lambda: "".join(letters[int(stream.random() * len(letters))] for _ in range(length)), split)


def draw_distinct(draw: Callable[[], str], count: int) -> list[str]:
    """`count` distinct strings, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
