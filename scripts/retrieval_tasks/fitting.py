"""Finds the context size whose prompt and answer just fit a number of tokens, with at most four counts."""

from collections.abc import Callable

from retrieval_tasks.case import Case, Question, answer_text

# Characters of filler -> context and questions; asked for more characters it must not become shorter.
Builder = Callable[[int], tuple[str, tuple[Question, ...]]]
MAX_COUNTS = 4
SMALLEST_SHARE = 0.95  # a first hit below it is tried again while counts are left
QUESTION_RESERVE = 8  # tokens by which the longest of several questions in tokens may pass the longest in characters


def longest_tail(questions: tuple[Question, ...]) -> str:
    """The longest question with its answer, in characters."""
    return max((question.text + answer_text(question) for question in questions), key=len)


def fit(task: str, build: Builder, num_tokens: int, count_tokens: Callable[[str], int]) -> Case:
    """The largest case found whose context, longest question and answer have at most num_tokens tokens.

    Tokens are taken to be affine in characters: the first count gives a rate, each later one the secant through the
    last two. ValueError where not even the smallest case fits.
    """
    limit = num_tokens
    chars, aim = min(2 * num_tokens, 8192), 0.97
    best: tuple[str, tuple[Question, ...]] | None = None
    best_tokens = 0
    points: list[tuple[int, int]] = []
    for _ in range(MAX_COUNTS):
        context, questions = build(chars)
        if len(questions) > 1:
            limit = num_tokens - QUESTION_RESERVE
        text = context + longest_tail(questions)
        if any(length == len(text) for length, _ in points):
            if best is not None:
                break  # the next unit is too large: nothing new to count
            chars = chars * 3 // 4
            continue
        tokens = count_tokens(text)
        if best_tokens < tokens <= limit:
            best, best_tokens = (context, questions), tokens
        if SMALLEST_SHARE * limit <= tokens <= limit:
            break
        points.append((len(text), tokens))
        rate = tokens / len(text)
        if len(points) > 1:
            (length_0, tokens_0), (length_1, tokens_1) = points[-2:]
            if (tokens_1 - tokens_0) * (length_1 - length_0) > 0:
                rate = (tokens_1 - tokens_0) / (length_1 - length_0)
            aim = 0.985
        chars = max(0, chars + int((aim * limit - tokens) / rate))
    if best is None:
        raise ValueError(
            f"num_tokens is too small for {task}: got {num_tokens}, its smallest prompt and answer have about "
            f"{min(tokens for _, tokens in points)} tokens"
        )
    return Case(task, *best)
