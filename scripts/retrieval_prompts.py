"""Writes prompts for `scripts/capture_traces.py`: retrieval tasks of the evaluation split, one JSON object per line.

    python scripts/retrieval_prompts.py --tokenizer MODEL_PATH --tasks niah_multikey_2 --lengths 8192 32768 --out FILE

Each line has "text", "task", "tokens" and "seed". The text is context, question and the ideal answer: the rows that
write an answer are those that look for the needle, and prefill sees them only where they are in the prompt.
"""

import argparse
import json
import sys
from pathlib import Path

from openai_client import LocalTokenizer
from retrieval_tasks import QA_TASKS, TASKS, answer_text, make_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="local model directory")
    tasks = [task for task in TASKS if task not in QA_TASKS]  # those need files of their own
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=["niah_multikey_2"], metavar="TASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens of prompt and answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    count = LocalTokenizer(args.tokenizer).count
    lines = []
    for length in args.lengths:
        for task in args.tasks:
            case = make_case(task, length, count, args.seed)
            text = case.prompt() + answer_text(case.questions[0])
            lines.append(json.dumps({"text": text, "task": task, "tokens": length, "seed": args.seed}))
    args.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} prompts to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
