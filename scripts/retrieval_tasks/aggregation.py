"""Common and frequent words (RULER's cwe and fwe, arXiv 2404.06654): what occurs most often in a long list.

cwe: 10 common words, 30 times each, among uncommon ones 3 times each. Lengths below 4096 tokens (new tokens included)
have room for less: 6 and 1 times as published, and, our own, 3 and 1 times below 1024. Words are word pairs: the single
words would not suffice for long lists. Neither this task nor vt begins with the published worked example.
fwe: coded words of 6 random letters, the k-th of them with a share proportional to k^-2 (Zipf, alpha 2.0); the first is
written as dots and does not count, the next 3 are asked. Both have one question per context.
"""

import random
from itertools import islice

from retrieval_tasks.case import Question
from retrieval_tasks.drawing import Split, draw_distinct, draw_letters, draw_pair, num_pairs
from retrieval_tasks.fitting import Builder

COMMON_WORDS = 10
FULL_TOKENS = 4096 - 120  # of prompt and answer, where the length leaves the task's new tokens free
ALPHA = 2.0
CODED_LENGTH = 6
FREQUENT_WORDS = 3
CODED_WORDS = 500
CWE_HEAD = "The numbered list below repeats some words often. Remember the words that appear most often.\n"
FWE_HEAD = "The text below is made of coded words. Remember how often each of them appears; leave out the dots.\n"


def cwe_repeats(num_tokens: int) -> tuple[int, int]:
    """How often common and uncommon words occur in a prompt of num_tokens tokens."""
    if num_tokens >= FULL_TOKENS:
        return 30, 3
    return (6, 1) if num_tokens >= 1024 else (3, 1)


def cwe_builder(num_tokens: int, seed: str, split: Split) -> Builder:
    """Builds the list with any number of uncommon words."""
    often, seldom = cwe_repeats(num_tokens)
    stream = random.Random(seed + "/words")
    common = draw_distinct(lambda: draw_pair(stream, split), COMMON_WORDS)
    words = dict.fromkeys(common)  # distinct, in the order drawn
    text = f"\nQuestion: what are the {COMMON_WORDS} most common words in the list?\nAnswer: The most common words are"
    question = Question(text, tuple(common))
    num_chars = 20  # of an entry such as "1234. amber-falcon\n", on average

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        uncommon = max(1, (chars // num_chars - COMMON_WORDS * often) // seldom)
        if uncommon > num_pairs(split) // 2:
            raise ValueError(f"num_tokens is too large for cwe: {num_tokens} leave room for {uncommon} uncommon words")
        while len(words) < COMMON_WORDS + uncommon:
            words[draw_pair(stream, split)] = None
        entries = common * often + list(islice(words, COMMON_WORDS, COMMON_WORDS + uncommon)) * seldom
        random.Random(seed + "/order").shuffle(entries)
        return CWE_HEAD + "\n".join(f"{n}. {word}" for n, word in enumerate(entries, 1)), (question,)

    return build


def fwe_builder(seed: str, split: Split) -> Builder:
    """Builds the text with any number of coded words; the counts of the asked ones are distinct and the largest."""
    stream = random.Random(seed + "/words")
    letters = "abcdefghijklmnopqrstuvwxyz"
    coded = draw_distinct(lambda: draw_letters(stream, split, CODED_LENGTH, letters), CODED_WORDS)
    frequent = coded[:FREQUENT_WORDS]
    asked = f"what are the {FREQUENT_WORDS} most frequent coded words?"
    text = f"\nQuestion: {asked}\nAnswer: The most frequent coded words are"
    question = Question(text, tuple(frequent))
    ranked = ["...", *coded]
    shares = [rank**-ALPHA for rank in range(1, len(ranked) + 1)]
    total = sum(shares)

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        num_words = max(64, chars // 6)  # from 64 words on, the counts of the first five differ
        entries = [word for word, share in zip(ranked, shares) for _ in range(int(num_words * share / total))]
        random.Random(seed + "/order").shuffle(entries)
        return FWE_HEAD + " ".join(entries), (question,)

    return build
