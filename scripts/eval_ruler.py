"""Scores a running server on the 13 retrieval tasks of RULER (arXiv 2404.06654; generated, in our own wording).

    python scripts/eval_ruler.py --tokenizer MODEL_PATH --modes native misa_rerank hisa --lengths 32768 131072
    python scripts/eval_ruler.py --tokenizer MODEL_PATH --tasks niah_multikey_3 vt --samples 20

Every mode answers the same prompts; --modes switches one server from mode to mode, and a mode whose device counter
did not rise fails the run. OUT/samples.jsonl holds finished samples, from which the same command goes on after an
interruption; OUT/ruler.json holds the averages, the run record and the counters. qa_1 and qa_2 need a local file of
SQuAD's and HotpotQA's published form (--qa-file) and are skipped without one. A length counts prompt and answer. Our
wording, word lists and haystack differ from the published ones: scores compare modes, not leaderboards.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from eval_loop import Job, add_arguments, check_at_least_one, evaluate, haystack_name, run_main
from eval_report import table
from openai_client import Client, LocalTokenizer
from retrieval_tasks import NEW_TOKENS, QA_TASKS, TASKS, make_case, score

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


def qa_files(given: list[str]) -> dict[str, Path]:
    """{task: file} of TASK=FILE arguments; ValueError for another form or a missing file."""
    files = {}
    for text in given:
        task, _, name = text.partition("=")
        if task not in QA_TASKS or not Path(name).is_file():
            raise ValueError(f"--qa-file must be TASK=FILE with a task of {', '.join(QA_TASKS)}, got {text!r}")
        files[task] = Path(name)
    return files


def make_prompt(
    count: Callable[[str], int], task: str, length: int, seed: int, essay: str | None, qa_file: Path | None
) -> tuple[str, Callable[[str], float]]:
    case = make_case(task, length - NEW_TOKENS[task], count, seed, essay=essay, qa_file=qa_file)
    return case.prompt(), functools.partial(score, case.questions[0])


def ruler_jobs(
    count: Callable[[str], int],
    tasks: list[str],
    lengths: list[int],
    samples: int,
    seed: int,
    essay: str | None,
    files: dict[str, Path],
) -> list[Job]:
    """One job per task, length and sample."""
    return [
        Job(
            key=f"{task}/{length}/{number}",
            cell=f"{task}/{length}",
            size=length,
            new_tokens=NEW_TOKENS[task],
            # Once for all modes: making a long prompt takes longer than answering it.
            make=functools.cache(
                functools.partial(make_prompt, count, task, length, seed + number, essay, files.get(task))
            ),
        )
        for length in lengths
        for task in tasks
        for number in range(samples)
    ]


def report(cells: list[dict], modes: list[str], tasks: list[str], lengths: list[int]) -> str:
    """One table per mode: tasks by lengths, and their average."""
    scores = {(cell["mode"], cell["cell"]): cell["score"] for cell in cells}
    parts = []
    for mode in modes:
        rows: list[list[float | str | None]] = [
            [task, *(scores.get((mode, f"{task}/{length}")) for length in lengths)] for task in tasks
        ]
        average: list[float | str | None] = ["average"]
        for length in lengths:
            values = [scores[mode, f"{task}/{length}"] for task in tasks if (mode, f"{task}/{length}") in scores]
            average.append(sum(values) / len(values) if values else None)
        parts.append(table([mode, *map(str, lengths)], [*rows, average]))
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> None:
    check_at_least_one(samples=args.samples)
    files = qa_files(args.qa_file)
    skipped = {task: "no --qa-file" for task in args.tasks if task in QA_TASKS and task not in files}
    for task, reason in skipped.items():
        print(f"{task} is skipped: {reason}", flush=True)
    tasks = [task for task in args.tasks if task not in skipped]
    client, tokenizer = Client(args.url, args.model), LocalTokenizer(args.tokenizer)
    essay = args.essay.read_text() if args.essay else None
    settings = {
        "seed": args.seed,
        "haystack": haystack_name(args.essay),
        "qa_files": {task: path.name for task, path in files.items()},
    }
    jobs = ruler_jobs(tokenizer.count, tasks, args.lengths, args.samples, args.seed, essay, files)
    cells, modes = evaluate(client, args, "ruler", settings, jobs, skipped)
    print(report(cells, modes, tasks, args.lengths), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out="ruler_results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of prompt and answer")
    parser.add_argument("--samples", type=int, default=100, help="per task and length (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: %(default)s)")
    parser.add_argument("--essay", type=Path, help="text of the essay haystacks; default: prose from word lists")
    parser.add_argument("--qa-file", nargs="+", default=[], metavar="TASK=FILE", help="as qa_1=dev-v2.0.json")
    args = parser.parse_args(argv)
    return run_main(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
