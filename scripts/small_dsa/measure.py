"""What the model has learned, by teacher forcing on the evaluation split: no text it was trained on."""

import torch

from small_dsa.architecture import SmallDsa
from small_dsa.examples import ANSWER_WEIGHT, MIXTURE, fits, task_example
from small_dsa.passes import dense_pass, indexer_coverage, sparse_pass

MEASURED_TOKENS = 1 << 17  # per task
ONE_PASS_TOKENS = 1 << 16
ROWS = 64


def answer_accuracy(model: SmallDsa, length: int, device: torch.device, sparse: bool) -> dict[str, float]:
    """Task -> share of answers of which every token is the most likely one, given those before it."""
    shares = {}
    for task in MIXTURE:
        if task == "copy" or not fits(task, length):
            continue
        right = total = 0
        count = max(2, min(64, MEASURED_TOKENS // length))
        step = max(1, ONE_PASS_TOKENS // length)
        for start in range(0, count, step):
            made = [task_example(task, length, seed, "eval", ROWS) for seed in range(start, min(count, start + step))]
            tokens, weight, rows = (torch.stack(parts).to(device) for parts in zip(*made))
            hidden = sparse_pass(model, tokens, rows)[0] if sparse else dense_pass(model, tokens)
            answer = weight[:, 1:] >= ANSWER_WEIGHT
            hits = torch.zeros_like(answer)
            hits[answer] = model.logits(hidden[:, :-1][answer]).argmax(-1) == tokens[:, 1:][answer]
            # Consecutive answer tokens are one answer; a question's tokens stand between two of them.
            starts = answer & ~torch.nn.functional.pad(answer, (1, 0))[:, :-1]
            number = starts.flatten().cumsum(0) - 1
            wrong = torch.zeros(int(starts.sum()), device=device)
            wrong.index_add_(0, number[answer.flatten()], (~hits)[answer].float())
            right += int((wrong == 0).sum())
            total += len(wrong)
        shares[task] = round(right / total, 4)
    return shares


def attention_kept(model: SmallDsa, length: int, device: torch.device) -> dict[str, list[float]]:
    """Task -> per layer, the share of dense attention that the indexer's top-k keeps at sampled rows."""
    kept = {}
    for task in ("niah_single_2", "niah_multikey_2", "niah_multiquery"):
        if not fits(task, length):
            continue
        example = task_example(task, length, 7, "eval", ROWS)
        shares = indexer_coverage(model, example.tokens[None].to(device), example.rows[None].to(device))
        kept[task] = [round(share, 4) for share in shares]
    return kept
