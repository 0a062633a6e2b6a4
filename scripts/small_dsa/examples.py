"""Training sequences: a context, several questions with their answers, and what each token's prediction weighs."""

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from retrieval_tasks import Split, answer_text, make_case
from small_dsa.vocabulary import BOS, EOS, PAD, SPECIAL, build_tokenizer

# Share of the sequences by task. Copying is not one of RULER's: it supervises half of its tokens, and teaches to
# look back within the first hundreds of steps.
MIXTURE = {
    "copy": 0.15,
    "niah_single_1": 0.05,
    "niah_single_2": 0.07,
    "niah_single_3": 0.05,
    "niah_multikey_1": 0.12,
    "niah_multikey_2": 0.22,
    "niah_multikey_3": 0.08,
    "niah_multivalue": 0.08,
    "niah_multiquery": 0.08,
    "vt": 0.06,
    "cwe": 0.02,
    "fwe": 0.02,
}
ONE_QUESTION = ("cwe", "fwe")
ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.05
# Tokens a question with its answer takes at most; contexts are made that much shorter.
QUESTION_TOKENS = {"niah_single_3": 60, "niah_multikey_3": 90, "niah_multivalue": 50, "niah_multiquery": 130, "vt": 60}
CHARS_PER_TOKEN = {
    "niah_single_1": 3.7,
    "niah_multikey_2": 3.24,
    "niah_multikey_3": 1.57,
    "vt": 3.65,
    "cwe": 2.85,
    "fwe": 1.1,
}
# Below LONG_FROM tokens the shortest case of these tasks does not fit; an easier task stands in.
LONG_FROM = 512
STAND_INS = {
    "niah_multiquery": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_2",
    "cwe": "copy",
    "vt": "copy",
    "fwe": "copy",
}


class Example(NamedTuple):
    """Token ids [L] int64, weight [L] f32 of predicting each token, and the rows [M] whose index scores are trained."""

    tokens: torch.Tensor
    weight: torch.Tensor
    rows: torch.Tensor


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """One per process."""
    return build_tokenizer()


def num_questions(task: str, length: int) -> int:
    """More questions in longer sequences, so that the share of supervised tokens does not fall to nothing."""
    if task in ONE_QUESTION:
        return 1
    most = max(1, (length // 3) // QUESTION_TOKENS.get(task, 40))
    return min(most, 2 + length // 512, 24)


def fits(task: str, length: int) -> bool:
    """Whether the task has cases of this length."""
    return length >= LONG_FROM or task not in STAND_INS


def token_parts(
    task: str, length: int, seed: int, split: Split, questions: int
) -> tuple[list[int], list[list[list[int]]]]:
    """(ids of the context, [ids of the question, ids of the answer] of each question)."""
    rate = CHARS_PER_TOKEN.get(task, 4.5)
    room = length - 2 - (questions - 1) * QUESTION_TOKENS.get(task, 40)
    case = make_case(task, room, lambda text: int(len(text) / rate), seed, split, questions)
    pieces = [case.context]
    for question in case.questions:
        pieces += [question.text, answer_text(question)]
    ids = [encoding.ids for encoding in tokenizer().encode_batch_fast(pieces, add_special_tokens=False)]
    return ids[0], [[ids[n], ids[n + 1]] for n in range(1, len(ids), 2)]


def task_example(task: str, length: int, seed: int, split: Split, sampled_rows: int) -> Example:
    """A sequence of exactly `length` tokens: <bos> context, then questions and answers, each answer closed by <eos>."""
    bos, eos, pad = (SPECIAL.index(name) for name in (BOS, EOS, PAD))
    context, asked = token_parts(task, length, seed, split, num_questions(task, length))
    tail: list[int] = []
    weights: list[float] = []
    for question, answer in asked:
        more = [*question, *answer, eos]
        if 1 + len(tail) + len(more) > length // 2 and tail:
            break  # the rate was off: fewer questions
        tail += more
        weights += [TEXT_WEIGHT] * len(question) + [ANSWER_WEIGHT] * (len(answer) + 1)
    # A context that came out too long loses tokens at its start, where its needles are no likelier than elsewhere.
    context = context[max(0, len(context) - (length - 1 - len(tail))) :]
    ids = [bos, *context, *tail]
    weight = [0.0] + [TEXT_WEIGHT] * len(context) + weights
    filled = len(ids)
    ids += [pad] * (length - filled)
    weight += [0.0] * (length - filled)
    return Example(
        torch.tensor(ids), torch.tensor(weight), index_rows(torch.tensor(weight), filled, sampled_rows, seed)
    )


def copy_example(length: int, seed: int, sampled_rows: int) -> Example:
    """Random tokens, a part of them again, and again: what comes next stands behind the same tokens before."""
    stream = random.Random(f"copy/{seed}")
    size = tokenizer().get_vocab_size()
    period = min(length // 2, int(2 ** (4 + 8 * stream.random())))
    part = [300 + int(stream.random() * (size - 300)) for _ in range(period)]
    ids = (part * (length // period + 1))[:length]
    weight = torch.zeros(length)
    weight[period + 1 :] = 0.3
    return Example(torch.tensor(ids), weight, index_rows(weight, length, sampled_rows, seed))


def index_rows(weight: torch.Tensor, filled: int, count: int, seed: int) -> torch.Tensor:
    """`count` rows: half of them predict an answer's tokens, the others lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    answers = (weight >= 0.3).nonzero()[:, 0] - 1
    anywhere = torch.randint(filled, (count,), generator=generator)
    if not len(answers):
        return anywhere
    picked = answers[torch.randint(len(answers), (count // 2,), generator=generator)]
    return torch.cat([picked, anywhere[count // 2 :]]).clamp_min(0)


def make_example(length: int, seed: int, sampled_rows: int) -> Example:
    """The training sequence of a seed, its task drawn from MIXTURE."""
    stream = random.Random(seed)
    task = stream.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    if not fits(task, length):
        task = STAND_INS[task]
    if task == "copy":
        return copy_example(length, seed, sampled_rows)
    return task_example(task, length, seed, "train", sampled_rows)


class Batches(IterableDataset):
    """Endless batches of one length; every worker of a loader makes its own seeds."""

    def __init__(self, length: int, batch: int, sampled_rows: int, first_seed: int) -> None:
        self.length, self.batch, self.sampled_rows, self.first_seed = length, batch, sampled_rows, first_seed

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            seeds = range(self.first_seed + number * self.batch, self.first_seed + (number + 1) * self.batch)
            made = [make_example(self.length, seed, self.sampled_rows) for seed in seeds]
            yield Example(*(torch.stack(parts) for parts in zip(*made)))
            number += step


def batches(length: int, batch: int, sampled_rows: int, first_seed: int, workers: int) -> Iterator[Example]:
    """Batches of `batch` sequences of `length` tokens from `workers` processes (0: this one)."""
    pinned = torch.cuda.is_available()
    loader = DataLoader(
        Batches(length, batch, sampled_rows, first_seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
    )
    return iter(loader)
