"""Generated retrieval tasks: RULER's 13 (arXiv 2404.06654) in our own wording, for training and for evaluation.

from retrieval_tasks import make_case, answer_text, score
case = make_case("niah_multikey_2", 4096, count_tokens, seed=0)
prompt, ideal = case.prompt(), answer_text(case.questions[0])
"""

from retrieval_tasks.case import Case, Question, answer_text, score
from retrieval_tasks.drawing import Split, split_of
from retrieval_tasks.make import NEW_TOKENS, QA_TASKS, TASKS, make_case

__all__ = [
    "NEW_TOKENS",
    "QA_TASKS",
    "TASKS",
    "Case",
    "Question",
    "Split",
    "answer_text",
    "make_case",
    "score",
    "split_of",
]
