"""Writes prompts for `scripts/capture_traces.py`: retrieval tasks of the evaluation split, one JSON object per line.

    python scripts/retrieval_prompts.py --tokenizer MODEL_PATH --tasks niah_multikey_2 --lengths 8192 32768 --out FILE

Each line has "text" (context, question and lead-in: the answer would follow), "task", "tokens" and "seed".
"""

import argparse
import json
import sys
from pathlib import Path

from openai_client import LocalTokenizer
from retrieval_tasks import TASKS, make_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="local model directory")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["niah_multikey_2"], metavar="TASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768], help="tokens of prompt and answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    count = LocalTokenizer(args.tokenizer).count
    lines = []
    for length in args.lengths:
        for task in args.tasks:
            case = make_case(task, length, count, args.seed)
            lines.append(json.dumps({"text": case.prompt(), "task": task, "tokens": length, "seed": args.seed}))
    args.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {len(lines)} prompts to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
