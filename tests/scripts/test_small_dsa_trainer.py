"""The trainer on a CPU: it ends, goes on where it stopped, and refuses a folder of another plan.

A clock that ticks once per look makes the number of steps the same on every machine.
"""

import dataclasses
import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers (it comes with SGLang) is not installed")
pytest.importorskip("transformers", reason="transformers (it comes with SGLang) is not installed")
pytest.importorskip("matplotlib", reason="the plot extra is not installed")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("this PyTorch has no Muon", allow_module_level=True)

import train_small_dsa
from small_dsa import measure
from small_dsa.architecture import ModelShape
from small_dsa.curves import plot_curves
from small_dsa.export import load_exported
from small_dsa.stages import STAGES, TINY_STAGES, WARM_STEPS, Stage

FOREVER = 1e9
SHAPE = ModelShape(3264, 2, 64, 64, num_heads=2, q_lora_rank=32, index_heads=4, index_top_k=64)


@pytest.fixture(autouse=True)
def small_and_reproducible(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(train_small_dsa, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(measure, "MEASURED_TOKENS", 512)  # two sequences a task
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def train(monkeypatch, out, seconds: float, budget: float) -> None:
    flags = ["--tiny", "--workers", "0", "--minutes", str(seconds / 60), "--budget", str(budget / 60)]
    monkeypatch.setattr(sys, "argv", ["train_small_dsa.py", "--out", str(out), *flags])
    assert train_small_dsa.main() == 0


def trainer_in(out, stages: tuple[Stage, ...] = TINY_STAGES, shape: ModelShape = SHAPE) -> train_small_dsa.Trainer:
    out.mkdir(exist_ok=True)
    return train_small_dsa.Trainer(stages, 1000.0, shape, out, torch.device("cpu"))


def run_steps(trainer: train_small_dsa.Trainer, count: int) -> None:
    """`count` steps of the current stage; the first looks at the clock once more, to note a point of the curve."""
    before = trainer.step
    while trainer.step < before + count:
        now = train_small_dsa.time.perf_counter()
        assert not trainer.run_stage(now + 3, workers=0)


def test_a_run_ends_with_curves_and_a_model_and_may_stop_between(monkeypatch, tmp_path, capsys):
    train(monkeypatch, tmp_path, seconds=8, budget=20)
    stopped = torch.load(tmp_path / "state.pt", weights_only=True)
    assert stopped["stage"] == 0 and stopped["step"] > 0 and stopped["stage_seconds"] < 12
    assert stopped["sequence"] == stopped["step"] * TINY_STAGES[0].batch
    assert "stopped in stage dense 256, step" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()  # nothing to serve before an indexer is trained

    train(monkeypatch, tmp_path, seconds=FOREVER, budget=20)
    said = capsys.readouterr().out
    assert "resumed at stage 0" in said and "all stages done" in said
    record = json.loads((tmp_path / "curves.json").read_text())
    assert [result["after"] for result in record["results"]] == ["dense 256", "indexer 256", "sparse 256"]
    assert len(record["runs"]) == 2 and record["results"][0]["steps"] > stopped["step"]
    assert set(record["results"][0]["answers_right"]) and set(record["results"][2]["attention_kept"])
    seconds = [point["seconds"] for point in record["curves"]]
    assert len(seconds) >= 3 and seconds == sorted(seconds) and seconds[-1] <= record["seconds"]
    kinds = {point["stage"]: (point["language"] is None, point["index"] is None) for point in record["curves"]}
    assert kinds == {"dense 256": (False, True), "indexer 256": (True, False), "sparse 256": (False, False)}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))

    trained = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = load_exported(tmp_path / "model").state_dict()
    for name, tensor in trained["model"].items():
        assert torch.equal(loaded[name], tensor if ".k_norm." in name else tensor.bfloat16().float())

    train(monkeypatch, tmp_path, seconds=FOREVER, budget=20)  # nothing is left to do
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert again["seconds"] == trained["seconds"] and again["curves"] == trained["curves"]
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in trained["model"].items())


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(tmp_path):
    whole = trainer_in(tmp_path / "whole")
    run_steps(whole, 5)
    first = trainer_in(tmp_path / "parts")
    run_steps(first, 3)
    first.save()
    second = trainer_in(tmp_path / "parts")
    assert second.resume() and (second.stage, second.step, second.sequence) == (0, 3, 24)
    assert (second.seconds, second.stage_seconds) == (first.seconds, first.stage_seconds)
    run_steps(second, 2)
    assert second.step == whole.step and second.sequence == whole.sequence
    weights = whole.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.model.state_dict().items())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in first.model.state_dict().items())


def test_training_lowers_the_loss(tmp_path):
    stage = dataclasses.replace(TINY_STAGES[0], length=128, batch=4)
    trainer = trainer_in(tmp_path / "run", (stage,))
    run_steps(trainer, 31)
    losses = [point["language"] for point in trainer.curves]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize(
    "stages,shape",
    [(TINY_STAGES[:2], SHAPE), (TINY_STAGES, dataclasses.replace(SHAPE, index_top_k=32))],
)
def test_a_folder_of_another_plan_or_shape_is_refused(tmp_path, stages, shape):
    trainer_in(tmp_path).save()
    assert trainer_in(tmp_path).resume()
    with pytest.raises(ValueError, match=r"state\.pt was written with another plan, budget or shape; choose another"):
        trainer_in(tmp_path, stages, shape).resume()


def test_a_folder_of_another_budget_is_refused(tmp_path):
    """Its stages end, and its rates fall, at other times."""
    trainer_in(tmp_path).save()
    other = trainer_in(tmp_path)
    other.budget_s *= 2
    with pytest.raises(ValueError, match="another plan, budget or shape"):
        other.resume()


def test_the_command_refuses_with_a_message(monkeypatch, tmp_path, capsys):
    trainer_in(tmp_path, TINY_STAGES[:1]).save()
    before = (tmp_path / "state.pt").read_bytes()
    flags = ["--tiny", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["train_small_dsa.py", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        train_small_dsa.main()
    assert ended.value.code == 2 and "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "state.pt").read_bytes() == before


def test_without_a_state_there_is_nothing_to_resume(tmp_path):
    assert not trainer_in(tmp_path).resume()


def test_rates_warm_up_hold_and_decay():
    stage = Stage("dense", 256, 8, 1.0, 2e-3)
    assert stage.rate_at(0, 0.0) == pytest.approx(2e-3 / WARM_STEPS)
    assert stage.rate_at(WARM_STEPS - 1, 0.5) == stage.rate_at(500, 0.99) == 2e-3
    falling = dataclasses.replace(stage, decay=True)
    rates = [falling.rate_at(WARM_STEPS + n, n / 50) for n in range(60)]
    assert rates[0] == pytest.approx(2e-3) and rates[50:] == pytest.approx([2e-4] * 10)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("stages", [STAGES, TINY_STAGES])
def test_stages_use_the_whole_time_in_deepseeks_order(stages):
    assert sum(stage.share for stage in stages) == pytest.approx(1.0)
    kinds = [stage.kind for stage in stages]
    assert kinds == sorted(kinds, key=("dense", "indexer", "sparse").index) and set(kinds) >= {"indexer", "sparse"}
    assert all((stage.rows > 0) == (stage.kind != "dense") for stage in stages)


@pytest.mark.parametrize("curves", [[], [{"stage": "dense 256", "seconds": 1.0, "language": 2.0, "index": None}]])
def test_curves_of_a_run_that_has_just_begun_are_drawn(tmp_path, curves):
    plot_curves(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
