"""Traces of the small model without a server or a GPU: the same tensors that `scripts/capture_traces.py` gets from one.

    python scripts/make_small_traces.py --model DIR --lengths 8192 --out FILE.npz   (minutes at 32768 on 2 cores)

The prompt is a retrieval task of the evaluation split with its question and the ideal answer, whose rows are those that
look for the needle (as `scripts/retrieval_prompts.py` writes them). How much of it the model predicts is printed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from indexer_kernels.traces import Trace, sample_rows, save_traces
from retrieval_tasks import QA_TASKS, TASKS, answer_text, make_case
from small_dsa.export import load_exported
from small_dsa.serving_pass import IndexInputs, serving_pass
from small_dsa.vocabulary import BOS

CHUNK = 8192  # of a prefill: rows are sampled from the last one, as the plugin does


def traces_of(model_path: Path, name: str, task: str, length: int, seed: int, rows: int) -> list[Trace]:
    """One trace per layer, of a prompt of at most `length` tokens."""
    model = load_exported(model_path)
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    case = make_case(task, length, lambda text: len(tokenizer.encode(text).ids), seed)
    answer = tokenizer.encode(answer_text(case.questions[0]), add_special_tokens=False).ids
    tokens = torch.tensor(tokenizer.encode(case.prompt()).ids + answer)
    if tokens[0] != tokenizer.token_to_id(BOS):
        raise ValueError(f"the tokenizer of {model_path} does not begin a prompt with {BOS}")
    first = (len(tokens) - 1) // CHUNK * CHUNK
    chosen = sample_rows(len(tokens) - first, rows, first=max(0, model.shape.index_top_k - first))
    positions = torch.tensor(chosen) + first
    description = {"task": task, "tokens": length, "seed": seed, "source": "scripts/make_small_traces.py"}
    traces: list[Trace] = []
    began = time.perf_counter()

    def note(layer: int, inputs: Callable[[slice], IndexInputs]) -> None:
        parts = [inputs(slice(position, position + 1)) for position in positions.tolist()]
        q = torch.cat([part.q.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        weights = torch.cat([part.weights for part in parts])
        keys = (parts[0].k.contiguous(), parts[0].k_scale.contiguous())
        traces.append(Trace(name, layer, len(tokens), q, weights, *keys, positions, description))
        print(f"{task} {len(tokens)} tokens, layer {layer}: {time.perf_counter() - began:.0f} s", flush=True)

    logits = serving_pass(model, tokens, note, len(answer) + 1)
    right = (logits[:-1].argmax(-1) == tokens[-len(answer) :]).sum()
    print(f"{right} of the answer's {len(answer)} tokens are the model's", flush=True)
    return traces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory that train_small_dsa.py exported")
    parser.add_argument("--name", default="small-dsa", help="the model's name in the traces (default: %(default)s)")
    tasks = [task for task in TASKS if task not in QA_TASKS]  # those need files of their own
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=["niah_multikey_2"], metavar="TASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    args = parser.parse_args()
    if args.out.suffix != ".npz" or not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out} must end in .npz, in a folder that exists")
    traces = [
        trace
        for length in args.lengths
        for task in args.tasks
        for trace in traces_of(args.model, args.name, task, length, args.seed, args.rows)
    ]
    size = save_traces(args.out, traces)
    print(f"wrote {args.out}: {len(traces)} traces, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
