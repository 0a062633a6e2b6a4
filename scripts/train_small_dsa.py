"""Trains a small DeepSeek-V3.2 (latent attention, lightning indexer, top-k 2048) on generated retrieval tasks.

    python scripts/train_small_dsa.py --out DIR [--minutes 9] [--budget 9]     again with the same DIR: it goes on

--budget is the training time of the whole plan, of which each stage has its share; --minutes ends this run early.

Stages (scripts/small_dsa/stages.py): dense attention at growing length; the indexers alone, by KL divergence against
the attention they must predict, as DeepSeek-V3.2 does; both over the tokens the indexers select. DIR holds the state to
resume from, curves.json and curves.png, and, from the first indexer stage on, the exported model in DIR/model, which
SGLang serves. Needs one GPU with 80 GB; on a CPU it runs for tests (--tiny).
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from run_record import run_record
from small_dsa.architecture import ModelShape, SmallDsa
from small_dsa.curves import plot_curves
from small_dsa.examples import Example, batches, tokenizer
from small_dsa.export import export_model
from small_dsa.measure import answer_accuracy, attention_kept
from small_dsa.passes import dense_pass, indexer_pass, language_loss, sparse_pass
from small_dsa.stages import STAGES, TINY_STAGES, Stage

SEEDS_PER_STAGE = 10**8


class Trainer:
    """Model, optimisers, curves, and the place in the plan; saved and read as one file."""

    def __init__(
        self, stages: tuple[Stage, ...], budget_s: float, shape: ModelShape, out: Path, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.stages, self.budget_s, self.out, self.device = stages, budget_s, out, device
        self.model = SmallDsa(shape).to(device)
        self.stage, self.step, self.sequence = 0, 0, 0
        self.seconds, self.stage_seconds = 0.0, 0.0
        self.curves: list[dict] = []
        self.results: list[dict] = []
        self.runs: list[dict] = []
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() != 2 or "embed" in name]
        # Orthogonalised momentum for matrices learns to look back in a fraction of AdamW's steps.
        self.optimisers = [
            torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"),
        ]

    @property
    def state_path(self) -> Path:
        return self.out / "state.pt"

    def resume(self) -> bool:
        """Reads the state of an earlier run; False where there is none. ValueError for one of another plan."""
        if not self.state_path.is_file():
            return False
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        plan = [dataclasses.asdict(stage) for stage in self.stages]
        if (state["plan"], state["budget_s"], state["shape"]) != (plan, self.budget_s, self.model.shape.as_dict()):
            raise ValueError(f"{self.state_path} was written with another plan, budget or shape; choose another --out")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        for name in ("stage", "step", "sequence", "seconds", "stage_seconds", "curves", "results", "runs"):
            setattr(self, name, state[name])
        return True

    def save(self) -> None:
        """The state (written beside, then renamed: an interrupted write loses nothing), curves, exported model."""
        state = {
            "plan": [dataclasses.asdict(stage) for stage in self.stages],
            "budget_s": self.budget_s,
            "shape": self.model.shape.as_dict(),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        names = ("stage", "step", "sequence", "seconds", "stage_seconds", "curves", "results", "runs")
        beside = self.state_path.with_suffix(".part")
        torch.save(state | {name: getattr(self, name) for name in names}, beside)
        beside.replace(self.state_path)
        record = {
            "plan": state["plan"],
            "budget_s": self.budget_s,
            "shape": state["shape"],
            "seconds": self.seconds,
            "runs": self.runs,
        }
        record |= {"results": self.results, "curves": self.curves}
        (self.out / "curves.json").write_text(json.dumps(record, indent=1) + "\n")
        plot_curves(self.curves, self.out / "curves.png")
        if self.stage >= len(self.stages) or self.stages[self.stage].kind != "dense":
            export_model(self.model, self.out / "model")

    def run_stage(self, deadline: float, workers: int) -> bool:
        """Train the current stage until its time is used or the deadline (time.perf_counter()); whether it ended."""
        stage = self.stages[self.stage]
        limit_s = stage.share * self.budget_s
        first_seed = (self.stage + 1) * SEEDS_PER_STAGE + self.sequence
        source = batches(stage.length, stage.batch, max(1, stage.rows), first_seed, workers)
        before, began, tokens_done = self.stage_seconds, time.perf_counter(), 0
        shown = tqdm(total=round(limit_s), initial=round(before), desc=stage.name, unit="s", disable=None)
        while self.stage_seconds < limit_s and time.perf_counter() < deadline:
            example = Example(*(part.to(self.device, non_blocking=True) for part in next(source)))
            rate = stage.rate_at(self.step, self.stage_seconds / limit_s)
            language, index = self._train_step(stage, rate, example)
            self.step += 1
            self.sequence += stage.batch
            tokens_done += example.tokens.numel()
            if self.step % 10 == 1:
                # Reading the losses waits for the GPU: only then does the clock show what the steps took.
                point: dict = {"stage": stage.name, "step": self.step}
                point |= {"language": _value(language), "index": _value(index), "rate": rate}
                spent = time.perf_counter() - began
                point |= {"seconds": round(self.seconds + spent, 1), "tokens_per_s": round(tokens_done / spent)}
                self.curves.append(point)
                if shown.disable and self.step % 100 == 1:  # no terminal to draw a bar on
                    print(json.dumps(point), flush=True)
                shown.set_postfix({name: f"{point[name]:.3g}" for name in ("language", "index") if point[name]})
            self.stage_seconds = before + time.perf_counter() - began
            shown.n = round(self.stage_seconds)
        shown.close()
        self.seconds += self.stage_seconds - before
        return self.stage_seconds >= limit_s

    def finish_stage(self) -> None:
        """Measure what the stage has taught, and move on."""
        stage = self.stages[self.stage]
        result: dict = {"after": stage.name, "steps": self.step, "seconds": round(self.seconds, 1)}
        result["loss"] = self.curves[-1]
        with torch.no_grad(), self._autocast():
            if stage.kind != "indexer":
                sparse = stage.kind == "sparse"
                result["answers_right"] = answer_accuracy(self.model, stage.length, self.device, sparse)
            if stage.kind != "dense":
                result["attention_kept"] = attention_kept(self.model, stage.length, self.device)
        print(json.dumps(result), flush=True)
        self.results.append(result)
        self.stage, self.step, self.sequence, self.stage_seconds = self.stage + 1, 0, 0, 0.0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _train_step(
        self, stage: Stage, rate: float, example: Example
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """One step; (language loss, KL loss), None where the stage has none."""
        tokens, weight, rows = example
        language, index = None, None
        with self._autocast():
            if stage.kind == "dense":
                language = language_loss(self.model, dense_pass(self.model, tokens), tokens, weight)
            elif stage.kind == "indexer":
                index = indexer_pass(self.model, tokens, rows)
            else:
                hidden, index = sparse_pass(self.model, tokens, rows)
                language = language_loss(self.model, hidden, tokens, weight)
        torch.stack([part for part in (language, index) if part is not None]).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()  # parameters without a gradient (a stage does not train them) are left alone
            optimiser.zero_grad(set_to_none=True)
        return language, index


def _value(loss: torch.Tensor | None) -> float | None:
    return None if loss is None else loss.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="end this run after so long (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=9.0, help="minutes of the whole plan (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=12, help="processes that make examples (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model and plan for tests on a CPU")
    args = parser.parse_args()
    deadline = time.perf_counter() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    # cuDNN's attention refuses some of these shapes in some versions; flash attention takes them all.
    torch.backends.cuda.enable_cudnn_sdp(False)
    vocabulary = -(-tokenizer().get_vocab_size() // 64) * 64
    stages: tuple[Stage, ...] = STAGES
    shape = ModelShape(vocabulary)
    if args.tiny:
        stages = TINY_STAGES
        shape = ModelShape(vocabulary, 2, 64, 64, num_heads=2, q_lora_rank=32, index_heads=4, index_top_k=64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(stages, 60 * args.budget, shape, args.out, device)
    try:
        resumed = trainer.resume()
    except ValueError as error:
        parser.error(str(error))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{'resumed at' if resumed else 'starts with'} stage {trainer.stage}; {parameters / 1e6:.1f} M parameters")
    trainer.runs.append(run_record())
    while trainer.stage < len(stages) and trainer.run_stage(deadline, args.workers):
        trainer.finish_stage()
        trainer.save()
    trainer.save()
    ended = trainer.stage >= len(stages)
    where = "all stages done" if ended else f"stopped in stage {stages[trainer.stage].name}, step {trainer.step}"
    print(f"{where} after {trainer.seconds:.0f} s of training", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
