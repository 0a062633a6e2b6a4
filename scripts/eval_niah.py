"""Needle in a haystack: score by context length and depth, as a heatmap with one panel per mode.

    python scripts/eval_niah.py --tokenizer MODEL_PATH --modes native misa_rerank --lengths 16384 65536 131072
    python scripts/eval_niah.py --tokenizer MODEL_PATH --task niah_multikey_2 --depths 0 50 100

Writes OUT/niah.png, OUT/niah.json (cells, run record, counters) and OUT/samples.jsonl, from which the same command goes
on after an interruption. A mode whose device counter did not rise fails the run. Needs matplotlib.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from eval_loop import Job, add_arguments, check_at_least_one, evaluate, haystack_name, run_main
from eval_report import table
from openai_client import Client, LocalTokenizer
from retrieval_tasks import NEW_TOKENS, TASKS, make_case, score

NIAH_TASKS = tuple(task for task in TASKS if task.startswith("niah_"))
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
DEPTHS = tuple(range(0, 101, 10))


def make_prompt(
    count: Callable[[str], int], task: str, length: int, depth: float, seed: int, essay: str | None
) -> tuple[str, Callable[[str], float]]:
    case = make_case(task, length - NEW_TOKENS[task], count, seed, depth=depth / 100, essay=essay)
    return case.prompt(), functools.partial(score, case.questions[0])


def niah_jobs(
    count: Callable[[str], int],
    task: str,
    lengths: list[int],
    depths: list[float],
    samples: int,
    seed: int,
    essay: str | None,
) -> list[Job]:
    """One job per length, depth (percent) and sample."""
    return [
        Job(
            key=f"{task}/{length}/{depth:g}/{number}",
            cell=f"{length}/{depth:g}",
            size=length,
            new_tokens=NEW_TOKENS[task],
            make=functools.cache(functools.partial(make_prompt, count, task, length, depth, seed + number, essay)),
        )
        for length in lengths
        for depth in depths
        for number in range(samples)
    ]


def grid(cells: list[dict], mode: str, lengths: list[int], depths: list[float]) -> list[list[float | None]]:
    """Scores in percent, a row per depth and a column per length; None where nothing ran."""
    scores = {cell["cell"]: cell["score"] for cell in cells if cell["mode"] == mode}
    return [[scores.get(f"{length}/{depth:g}") for length in lengths] for depth in depths]


def draw_heatmap(
    path: Path, cells: list[dict], modes: list[str], lengths: list[int], depths: list[float], title: str
) -> None:
    """A panel per mode, all on one scale from 0 to 100, each cell with its score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 1.5 + len(modes) * (1.5 + 0.6 * len(lengths))
    figure, axes = pyplot.subplots(
        1, len(modes), figsize=(width, 1.8 + 0.35 * len(depths)), squeeze=False, layout="constrained"
    )
    for axis, mode in zip(axes[0], modes):
        values = grid(cells, mode, lengths, depths)
        filled = [[float("nan") if value is None else value for value in row] for row in values]
        image = axis.imshow(filled, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for row, of_depth in enumerate(values):
            for column, value in enumerate(of_depth):
                axis.text(column, row, "-" if value is None else f"{value:.0f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
        axis.set(title=mode, xlabel="context (tokens)", ylabel="depth of the needle")
    figure.colorbar(image, ax=axes[0].tolist(), label="score")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run(args: argparse.Namespace) -> None:
    check_at_least_one(samples=args.samples)
    wrong = [depth for depth in args.depths if not 0 <= depth <= 100]
    if wrong:
        raise ValueError(f"--depths must be percentages from 0 to 100, got {wrong}")
    client, tokenizer = Client(args.url, args.model), LocalTokenizer(args.tokenizer)
    essay = args.essay.read_text() if args.essay else None
    settings = {"task": args.task, "seed": args.seed, "haystack": haystack_name(args.essay)}
    jobs = niah_jobs(tokenizer.count, args.task, args.lengths, args.depths, args.samples, args.seed, essay)
    cells, modes = evaluate(client, args, "niah", settings, jobs, {})
    draw_heatmap(args.out / "niah.png", cells, modes, args.lengths, args.depths, f"{args.task}, {client.model}")
    for mode in modes:
        rows = [
            [f"{depth:g}%", *values] for depth, values in zip(args.depths, grid(cells, mode, args.lengths, args.depths))
        ]
        print(table([mode, *map(str, args.lengths)], rows) + "\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out="niah_results")
    parser.add_argument("--task", choices=NIAH_TASKS, default="niah_single_2", help="default: %(default)s")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of prompt and answer")
    parser.add_argument("--depths", nargs="+", type=float, default=list(DEPTHS), help="percent; default: every 10")
    parser.add_argument("--samples", type=int, default=5, help="per length and depth (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: %(default)s)")
    parser.add_argument("--essay", type=Path, help="text of the essay haystacks; default: prose from word lists")
    args = parser.parse_args(argv)
    return run_main(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
