"""Question answering among distracting documents (RULER's qa_1 and qa_2, arXiv 2404.06654), from a local file.

qa_1 reads SQuAD's published JSON (data, paragraphs, qas), qa_2 HotpotQA's (a list with question, answer and context).
Nothing is downloaded.
"""

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from retrieval_tasks.case import Question
from retrieval_tasks.drawing import Split, split_of
from retrieval_tasks.fitting import Builder

HEAD = "Answer the question from the documents below. Give only the answer.\n"


@dataclass(frozen=True, slots=True)
class Item:
    """A question, the answers that count, and the texts that hold them."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_squad(tree: Any) -> list[Item]:
    """Answerable questions of SQuAD's JSON."""
    return [
        Item(qa["question"], tuple(dict.fromkeys(answer["text"] for answer in qa["answers"])), (part["context"],))
        for article in tree["data"]
        for part in article["paragraphs"]
        for qa in part["qas"]
        if not qa.get("is_impossible") and qa["answers"]
    ]


def read_hotpot(tree: Any) -> list[Item]:
    """Questions of HotpotQA's JSON, with all paragraphs each of them comes with."""
    return [
        Item(
            entry["question"],
            (entry["answer"],),
            tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]),
        )
        for entry in tree
    ]


@lru_cache(maxsize=4)
def read_items(task: str, path: Path) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """(questions, distinct documents) of the file; ValueError where it does not have the published form."""
    try:
        items = (read_squad if task == "qa_1" else read_hotpot)(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        form = "SQuAD" if task == "qa_1" else "HotpotQA"
        raise ValueError(f"qa_file {path} does not have the published {form} form: {error!r}") from error
    return tuple(items), tuple(dict.fromkeys(document for item in items for document in item.documents))


def reading_builder(task: str, seed: str, split: Split, qa_file: Path | None) -> Builder:
    """Builds the gold documents among any number of others; ValueError without a file."""
    if qa_file is None:
        form = "SQuAD" if task == "qa_1" else "HotpotQA"
        raise ValueError(f"{task} needs qa_file, a local JSON file in the published form of {form}; got none")
    items, documents = read_items(task, qa_file)
    own = [item for item in items if split_of(item.question) == split]
    if not own:
        raise ValueError(f"qa_file {qa_file} has no question of split {split}")
    stream = random.Random(seed + "/question")
    item = own[stream.randrange(len(own))]
    others = [document for document in documents if document not in item.documents]
    stream.shuffle(others)
    question = Question(f"\nQuestion: {item.question}\nAnswer:", item.answers, "part")

    def build(chars: int) -> tuple[str, tuple[Question, ...]]:
        shown, room = list(item.documents), chars - sum(map(len, item.documents))
        for document in others:
            room -= len(document) + 14
            if room < 0:
                break
            shown.append(document)
        random.Random(seed + "/order").shuffle(shown)
        return HEAD + "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(shown, 1)), (question,)

    return build
