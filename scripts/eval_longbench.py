"""Scores a running server on LongBench (arXiv 2308.14508) from local files, each mode on the same prompts.

    python scripts/eval_longbench.py --data FOLDER --tokenizer MODEL_PATH --modes native misa_rerank
    python scripts/eval_longbench.py --data FOLDER --tokenizer MODEL_PATH --datasets hotpotqa trec --samples 50

FOLDER holds <dataset>.jsonl in the published form (input, context, answers, all_classes, length, dataset, language,
_id); nothing is downloaded. Prompts longer than --max-length lose their middle, as published; the wording is our own,
so scores compare modes, not leaderboards. Chinese datasets are skipped: their metrics need a word segmenter.
OUT/samples.jsonl holds finished samples, from which the same command goes on; OUT/longbench.json the averages, the run
record and the counters. A mode whose device counter did not rise fails the run.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval_loop import Job, add_arguments, check_at_least_one, evaluate, run_main
from eval_report import table
from longbench_metrics import METRICS, sample_score
from openai_client import Client, LocalTokenizer

CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
FIELDS = ("input", "context", "answers", "all_classes", "_id")
SPECIAL_TOKENS = 8  # the server may add some to a prompt

_ONE_TEXT = "{context}\n\nUsing only the text above, answer in as few words as you can.\nQuestion: {input}\nAnswer:"
_PASSAGES = "{context}\n\nUsing only the passages above, answer in as few words as you can.\nQuestion: {input}\nAnswer:"
_SUMMARY = "{context}\n\nSummarize the text above on one page.\nSummary:"
_EXAMPLES = "{context}\n{input}"  # the published contexts are worked examples that the input goes on with
PROMPTS = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en"), _ONE_TEXT),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), _PASSAGES),
    **dict.fromkeys(("gov_report", "multi_news"), _SUMMARY),
    "qmsum": "{context}\n\nThe text above is a meeting. Answer in a few sentences.\nQuestion: {input}\nAnswer:",
    **dict.fromkeys(("trec", "triviaqa", "samsum"), _EXAMPLES),
    "passage_count": "{context}\n\nSome paragraphs above are copies. How many different ones are there? Number:",
    "passage_retrieval_en": (
        "{context}\n\nWhich paragraph above does this summary belong to? Answer as in: Paragraph 7\n"
        "Summary: {input}\nAnswer:"
    ),
    "lcc": "{context}",
    "repobench-p": "{context}{input}",
}
# Published new tokens of each dataset.
NEW_TOKENS = {
    **dict.fromkeys(("narrativeqa", "qasper", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "trec", "lcc", "repobench-p"), 64),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en"), 32),
}


def read_dataset(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """The samples of <dataset>.jsonl; ValueError for a missing file or field."""
    path = folder / f"{dataset}.jsonl"
    if not path.is_file():
        raise ValueError(f"--data {folder} has no {path.name}; put the published file there, nothing is downloaded")
    samples = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, sample in enumerate(samples, 1):
        missing = [name for name in FIELDS if name not in sample]
        if missing:
            raise ValueError(f"{path} line {number} lacks {', '.join(missing)}; LongBench's published form has them")
    return samples


def make_prompt(
    tokenizer: LocalTokenizer, dataset: str, sample: Mapping[str, Any], limit: int
) -> tuple[str, Callable[[str], float]]:
    text = PROMPTS[dataset].format(context=sample["context"], input=sample["input"])
    scorer = functools.partial(sample_score, dataset, answers=sample["answers"], classes=sample["all_classes"])
    return tokenizer.cut_middle(text, limit), scorer


def longbench_jobs(
    tokenizer: LocalTokenizer, folder: Path, datasets: list[str], samples: int | None, max_length: int
) -> list[Job]:
    """One job per sample of each dataset; max_length: tokens of prompt and answer."""
    jobs = []
    for dataset in datasets:
        new_tokens = NEW_TOKENS[dataset]
        limit = max_length - new_tokens - SPECIAL_TOKENS
        if limit < 2:
            raise ValueError(f"--max-length must leave room for {new_tokens} new tokens, got {max_length}")
        for number, sample in enumerate(read_dataset(folder, dataset)[:samples]):
            make = functools.partial(make_prompt, tokenizer, dataset, sample, limit)
            key = f"{dataset}/{number}/{sample['_id']}"
            jobs.append(Job(key, dataset, len(sample["context"]), new_tokens, make))
    return jobs


def chosen_datasets(folder: Path, asked: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """(datasets to run, reason of each skipped one): those asked for, else all whose files are there."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder; give one with LongBench's <dataset>.jsonl files")
    present = sorted(path.stem for path in folder.glob("*.jsonl"))
    names = asked or [name for name in (*METRICS, *CHINESE) if name in present]
    skipped = {name: "Chinese: its metric needs a word segmenter" for name in names if name in CHINESE}
    unknown = [name for name in names if name not in METRICS and name not in skipped]
    if unknown:
        raise ValueError(f"--datasets must be of {', '.join(METRICS)}; got {', '.join(unknown)}")
    datasets = [name for name in names if name not in skipped]
    if not datasets:
        raise ValueError(
            f"--data {folder} has no English or code dataset; its files are {', '.join(present) or 'none'}"
        )
    return datasets, skipped


def run(args: argparse.Namespace) -> None:
    if args.samples is not None:
        check_at_least_one(samples=args.samples)
    datasets, skipped = chosen_datasets(args.data, args.datasets)
    for dataset, reason in skipped.items():
        print(f"{dataset} is skipped: {reason}", flush=True)
    client, tokenizer = Client(args.url, args.model), LocalTokenizer(args.tokenizer)
    max_length = args.max_length or client.max_model_len()
    if max_length is None:
        raise ValueError("--max-length is needed: /v1/models does not tell the model's limit")
    jobs = longbench_jobs(tokenizer, args.data, datasets, args.samples, max_length)
    cells, modes = evaluate(client, args, "longbench", {"max_length": max_length}, jobs, skipped)
    scores = {(cell["mode"], cell["cell"]): cell["score"] for cell in cells}
    rows: list[list[float | str | None]] = [
        [dataset, *(scores.get((mode, dataset)) for mode in modes)] for dataset in datasets
    ]
    rows.append(["average", *(sum(scores[mode, name] for name in datasets) / len(datasets) for mode in modes)])
    print(table(["dataset", *modes], rows), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out="longbench_results")
    parser.add_argument("--data", type=Path, required=True, help="folder of <dataset>.jsonl files")
    parser.add_argument(
        "--datasets", nargs="+", metavar="DATASET", help=f"default: all in FOLDER; {', '.join(METRICS)}"
    )
    parser.add_argument("--samples", type=int, help="the first ones of each dataset; default: all")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer; default: the server's limit")
    args = parser.parse_args(argv)
    return run_main(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
