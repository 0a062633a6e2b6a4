"""What a retrieval task hands out: a context, questions whose text ends where the answer begins, and the score."""

from dataclasses import dataclass
from typing import Literal

Match = Literal["all", "part"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a context.

    text: question and lead-in; the answer follows it directly, without a trailing blank.
    answers: strings that a completion must contain: "all" of them, or a "part" (any one).
    continuation: the ideal completion where it is more than the answers joined by commas.
    """

    text: str
    answers: tuple[str, ...]
    match: Match = "all"
    continuation: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A context and the questions about it; a prompt is context + question.text."""

    task: str
    context: str
    questions: tuple[Question, ...]

    def prompt(self, number: int = 0) -> str:
        """The prompt of question `number`."""
        return self.context + self.questions[number].text


def answer_text(question: Question) -> str:
    """The ideal completion, starting with a blank: it contains every answer (of a "part" question, the first)."""
    if question.continuation is not None:
        return question.continuation
    if question.match == "part":
        return " " + question.answers[0]
    return " " + ", ".join(question.answers)


def score(question: Question, completion: str) -> float:
    """String match of RULER (arXiv 2404.06654), case-insensitive, 0 to 1.

    "all": share of the answers that the completion contains. "part": 1 where it contains any of them.
    """
    found = [answer.lower() in completion.lower() for answer in question.answers]
    return float(any(found)) if question.match == "part" else sum(found) / len(found)
