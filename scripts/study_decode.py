"""What does it do to answers if decode ranks only some of the tokens? Asked of the small model, on a CPU.

    python scripts/study_decode.py --model tests/data/small_dsa --json OUT.json [--tasks niah_multikey_2]
                                   [--length 32768] [--questions 12] [--seed 1]    (minutes a task on 2 cores)

One context a task and several questions about it. Context and question are read with native's selection; the rows that
say the answer, which decode would run, choose candidates in each of the ways below and read the 2048 best of them by
the full indexer's scores. Answers are forced, and counted right where every token of one is the most likely; first
tokens are prefill's. Beside them: the share of native's tokens that was read, and of its 8 best, by layer.

    blocks B, N      the N / B blocks of B tokens whose mean key scores best (hisa: B = 128, N = 8192)
    signs, N         the N tokens that score best by sign(key) * mean|key|: one bit a dimension and a scale a token
    signs, A heads   by the A heads of largest |gate| * max over blocks of 128 of relu(q . mean)
    signs, A by norm by the A heads of largest |gate| * |q|, which needs no block
    half signs       of the first 64 dimensions (which a Hadamard matrix has mixed)

The first 64 tokens and the last 128 are candidates anyway, as in the kernels. bytes: what is read per token of context
to choose (2 for a scale), beside 132 of its key.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from retrieval_tasks import QA_TASKS, TASKS, answer_text, make_case
from run_record import run_record
from small_dsa.architecture import SmallDsa
from small_dsa.decode_pass import IndexRow, decode_pass, read_context
from small_dsa.export import load_exported
from study_routing import FORCED, TOP_K

BEST = 8


def block_scores(row: IndexRow, size: int) -> torch.Tensor:
    """relu(q . mean) of each head and full block, as decode stores means: [H, blocks]."""
    count = len(row.keys) // size
    means = row.keys[: count * size].view(count, size, -1).mean(1).bfloat16().float()
    return torch.relu(row.q @ means.T)


def blocks(size: int, budget: int) -> Callable[[IndexRow], torch.Tensor]:
    def candidates(row: IndexRow) -> torch.Tensor:
        scores = (block_scores(row, size) * row.w[:, None]).sum(0)
        best = scores.topk(min(budget // size, len(scores))).indices
        return (best[:, None] * size + torch.arange(size)).flatten()

    return candidates


def all_heads(row: IndexRow) -> torch.Tensor:
    return torch.arange(len(row.w))


def by_means(heads: int) -> Callable[[IndexRow], torch.Tensor]:
    return lambda row: (block_scores(row, 128).amax(1) * row.w.abs()).topk(heads).indices


def by_norm(heads: int) -> Callable[[IndexRow], torch.Tensor]:
    return lambda row: (row.q.norm(dim=1) * row.w.abs()).topk(heads).indices


def signs(
    budget: int, heads: Callable[[IndexRow], torch.Tensor] = all_heads, dims: int = 128
) -> Callable[[IndexRow], torch.Tensor]:
    def candidates(row: IndexRow) -> torch.Tensor:
        used = heads(row)
        sketch = row.keys.sign()[:, :dims] * row.keys.abs().mean(1, keepdim=True)
        scores = (torch.relu(row.q[used][:, :dims] @ sketch.T) * row.w[used][:, None]).sum(0)
        return scores.topk(min(budget, len(scores))).indices

    return candidates


# name -> (bytes a token, candidates)
CHOICES: dict[str, tuple[float, Callable[[IndexRow], torch.Tensor]]] = {
    "blocks 128, 8192": (2, blocks(128, 8192)),
    "blocks 128, 16384": (2, blocks(128, 16384)),
    "blocks 64, 8192": (4, blocks(64, 8192)),
    "blocks 16, 8192": (16, blocks(16, 8192)),
    "blocks 8, 8192": (32, blocks(8, 8192)),
    "signs, 8192": (18, signs(8192)),
    "signs, 4096": (18, signs(4096)),
    "signs, 16 heads, 8192": (20, signs(8192, by_means(16))),
    "signs, 8 heads, 8192": (20, signs(8192, by_means(8))),
    "signs, 8 heads, 4096": (20, signs(4096, by_means(8))),
    "signs, 16 by norm, 8192": (18, signs(8192, by_norm(16))),
    "signs, 8 by norm, 8192": (18, signs(8192, by_norm(8))),
    "half signs, 8192": (10, signs(8192, dims=64)),
}


@dataclass(slots=True)
class Found:
    """What one way of choosing led to."""

    questions: int = 0
    answers: int = 0
    tokens: int = 0
    right: int = 0
    shares: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def entry(self) -> dict:
        layers = {
            str(layer): {
                "recall": sum(share for share, _ in found) / len(found),
                "best": sum(best for _, best in found) / len(found),
            }
            for layer, found in self.shares.items()
        }
        counts = {name: getattr(self, name) for name in ("questions", "answers", "tokens", "right")}
        return {**counts, "layers": layers}


def chooser(found: Found, candidates: Callable[[IndexRow], torch.Tensor] | None) -> Callable[[IndexRow], torch.Tensor]:
    """Native's selection, or the best of the candidates, its shares noted in `found`."""

    def choose(row: IndexRow) -> torch.Tensor:
        native = row.scores.topk(min(TOP_K, len(row.scores))).indices
        if candidates is None:
            return native
        scores = torch.full_like(row.scores, float("-inf"))
        for kept in (candidates(row), slice(0, FORCED[0]), slice(-FORCED[1], None)):
            scores[kept] = row.scores[kept]
        best = scores.topk(len(native))
        chosen = best.indices[best.values > float("-inf")]
        read = torch.zeros(len(scores), dtype=torch.bool)
        read[chosen] = True
        hits = read[native].float()
        found.shares.setdefault(row.layer, []).append((float(hits.mean()), float(hits[:BEST].mean())))
        return chosen

    return choose


def study(model: SmallDsa, tokenizer: Tokenizer, task: str, length: int, questions: int, seed: int) -> dict[str, dict]:
    """{choice: what it led to} on one context."""
    case = make_case(task, length, lambda text: len(tokenizer.encode(text).ids), seed, num_questions=questions)
    caches = read_context(model, torch.tensor(tokenizer.encode(case.context).ids))
    results = {name: Found() for name in ("native", *CHOICES)}
    for question in tqdm(case.questions, desc=task):
        asked, answer = (
            torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
            for text in (question.text, answer_text(question))
        )
        _, then = decode_pass(model, caches, asked, chooser(Found(), None))
        for name, found in results.items():
            candidates = CHOICES[name][1] if name in CHOICES else None
            logits, _ = decode_pass(model, then, answer[:-1], chooser(found, candidates))
            right = logits.argmax(-1) == answer[1:]
            found.questions += 1
            found.answers += bool(right.all())
            found.tokens += len(right)
            found.right += int(right.sum())
    return {name: found.entry() for name, found in results.items()}


def table(results: dict[str, dict]) -> str:
    lines = []
    for name, entry in results.items():
        layers = "  ".join(f"{one['recall']:.3f}/{one['best']:.3f}" for one in entry["layers"].values())
        counts = (
            f"{entry['answers']:3d} of {entry['questions']} answers, {entry['right']:3d} of {entry['tokens']} tokens"
        )
        lines.append(f"{name:24s} {counts}  {layers}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory that train_small_dsa.py exported")
    tasks = [task for task in TASKS if task not in QA_TASKS]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=["niah_multikey_2"], metavar="TASK")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=12, help="about each context")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="written anew after every task")
    args = parser.parse_args(argv)
    model, tokenizer = load_exported(args.model), Tokenizer.from_file(str(args.model / "tokenizer.json"))
    record = {
        "run": run_record(),
        "length": args.length,
        "seed": args.seed,
        "bytes": {name: read for name, (read, _) in CHOICES.items()},
        "tasks": {},
    }
    for task in args.tasks:
        record["tasks"][task] = study(model, tokenizer, task, args.length, args.questions, args.seed)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{task}\n{table(record['tasks'][task])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
