"""One entry for all 13 tasks."""

from collections.abc import Callable
from pathlib import Path

from retrieval_tasks.aggregation import cwe_builder, fwe_builder
from retrieval_tasks.case import Case
from retrieval_tasks.drawing import Split, check_split
from retrieval_tasks.fitting import fit
from retrieval_tasks.niah import NIAH_SHAPES, niah_builder
from retrieval_tasks.reading import reading_builder
from retrieval_tasks.tracking import tracking_builder

# Published new tokens of each task (RULER, arXiv 2404.06654).
NEW_TOKENS = {**dict.fromkeys(NIAH_SHAPES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
TASKS = tuple(NEW_TOKENS)
QA_TASKS = ("qa_1", "qa_2")


def make_case(
    task: str,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    seed: int,
    split: Split = "eval",
    num_questions: int = 1,
    depth: float | None = None,
    essay: str | None = None,
    qa_file: Path | None = None,
) -> Case:
    """A generated case whose context, longest question and answer have at most num_tokens tokens, and nearly that many.

    seed: the same arguments give the same case on any machine; another num_tokens keeps needles and questions, except
    in the tasks whose haystack is needles. num_questions: questions about one context, each with needles of its own;
    cwe, fwe, qa_1 and qa_2 have only one. depth: 0..1, where the asked needles of a NIAH task stand; None: at random.
    essay: text of the essay haystacks; None: prose generated from the word lists. qa_file: local file of qa_1 or qa_2.
    count_tokens is called at most four times. ValueError for a value that is not allowed, or too few num_tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    check_split(split)
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    if depth is not None and (task not in NIAH_SHAPES or not 0 <= depth <= 1):
        raise ValueError(f"depth must be None, or in 0..1 for a NIAH task; got {depth} for {task}")
    stream = f"{task}/{split}/{seed}"
    if task in NIAH_SHAPES:
        build = niah_builder(task, stream, split, num_questions, depth, essay)
    elif task == "vt":
        build = tracking_builder(stream, split, num_questions)
    elif task == "cwe":
        build = cwe_builder(num_tokens, stream, split)
    elif task == "fwe":
        build = fwe_builder(stream, split)
    else:
        build = reading_builder(task, stream, split, qa_file)
    return fit(task, build, num_tokens, count_tokens)
