"""The metrics of LongBench's English and code datasets (arXiv 2308.14508), each from 0 to 1.

A sample's score is the best over its reference answers. Chinese datasets need a word segmenter and are left out.
rouge-l here is the balanced F of the longest common subsequence of lowercased words of the whole text, and code
similarity is difflib's ratio: published figures used packages that may differ in the last digits.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]  # (prediction, reference, all classes)


def normal_words(text: str) -> list[str]:
    """Lowercased words without punctuation and English articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def harmonic_mean(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F of precision and recall over the bags of normalized words."""
    got, want = normal_words(prediction), normal_words(reference)
    shared = sum((Counter(got) & Counter(want)).values())
    return harmonic_mean(shared / len(got), shared / len(want)) if shared else 0.0


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F of the longest common subsequence of words."""
    got, want = prediction.lower().split(), reference.lower().split()
    shared = common_subsequence(got, want)
    return harmonic_mean(shared / len(got), shared / len(want)) if shared else 0.0


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 / number of classes the prediction names, where the right one is among them.

    A class whose name is a part of the right one's is not counted.
    """
    named = [name for name in classes if name in prediction and not (name in reference and name != reference)]
    return 1 / len(named) if reference in named else 0.0


def share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that are the reference's "Paragraph N"; ValueError for another reference."""
    found = re.search(r"Paragraph (\d+)", reference)
    if found is None:
        raise ValueError(f"reference of passage retrieval must contain 'Paragraph N', got {reference!r}")
    return share_of_numbers(prediction, found[1])


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the prediction's numbers that equal the reference."""
    return share_of_numbers(prediction, reference.strip())


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the reference and the first line of the prediction that is no comment and no code fence."""
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, first, reference, autojunk=False).ratio()


METRICS: dict[str, Metric] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), qa_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "trec": classification,
    "passage_retrieval_en": retrieval,
    "passage_count": count,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum")  # few-shot answers end with their line


def sample_score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None) -> float:
    """The dataset's metric, best over the answers; ValueError for a dataset that is not covered."""
    if dataset not in METRICS:
        raise ValueError(f"dataset must be one of {', '.join(METRICS)}, got {dataset!r}")
    if dataset in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[dataset](prediction, answer, classes or ()) for answer in answers), default=0.0)
