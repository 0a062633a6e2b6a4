"""What bench_stage.py and bench_decode.py keep of a timed case: nothing where it selects other tokens than it should.

On a CPU the reference backend stands in for DeepGEMM and for the gpu backend, and no clock runs.
"""

import json

import pytest
import torch

pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")
pytest.importorskip("sglang.kernels.ops.attention.dsv4.topk", reason="SGLang is not installed")

import bench_decode
import bench_stage
from indexer_kernels.page_layout import PAGE_TOKENS
from sglang_ext.cli.stage_time import Timing


class StageCase(bench_stage.Case):
    """wrong: the mode whose last rows lose half of their tokens."""

    wrong: str | None = None

    def __init__(self, rows: int, keys: int, heads: int, seed: int) -> None:
        super().__init__(rows, keys, heads, seed, device="cpu")

    def native(self, turn: int) -> None:
        super().mode("native", turn, "reference", "position")
        self._spoil("native")

    def mode(self, name: str, turn: int, backend: str = "gpu", output: str = "slot") -> torch.Tensor:
        super().mode(name, turn, "reference", output)
        self._spoil(name)
        return self.out

    def _spoil(self, name: str) -> None:
        if name == self.wrong:
            self.out[-bench_stage.CHECKED_ROWS :, 1024:] = -1


class DecodeCase(bench_decode.Case):
    """wrong: the mode that answers the first rows with a page that is not theirs."""

    wrong: str | None = None

    def __init__(self, batch: int, context: int, heads: int) -> None:
        super().__init__(batch, context, heads, layers=2, device="cpu")

    def native_once(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lengths, self.lengths

    def native(self, once: tuple[torch.Tensor, torch.Tensor]) -> None:
        for layer, found in zip(self.layers, self.expected_slots("native")):
            layer.out.copy_(found)
        self._spoil("native")

    def mode(self, name: str, plan, backend: str = "gpu", output: str = "slot") -> None:
        super().mode(name, plan, "reference", output)
        self._spoil(name)

    def expected_slots(self, mode: str) -> list[torch.Tensor]:
        rows = [sorted(row) for row in self.expected(mode, len(self.lengths))]
        return [torch.tensor(rows, dtype=torch.int32) for _ in self.layers]

    def _spoil(self, name: str) -> None:
        if name == self.wrong:
            self.layers[0].out[:, :PAGE_TOKENS] = -1


class Replayed:
    """In place of a CUDA graph: the work is done again."""

    def __init__(self, work) -> None:
        self.replay = work


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    def timed(work) -> Timing:
        work()
        return Timing(2.0, 1.0)

    monkeypatch.setattr(bench_stage, "timed", timed)
    monkeypatch.setattr(bench_decode, "timed", timed)
    monkeypatch.setattr(bench_stage, "scratch_gib", lambda work: 0.0)
    monkeypatch.setattr(bench_decode, "captured", Replayed)


def stage_rows(monkeypatch, wrong: str | None, modes: list[str]) -> list[dict]:
    monkeypatch.setattr(StageCase, "wrong", wrong)
    monkeypatch.setattr(bench_stage, "Case", StageCase)
    return bench_stage.measure(24, 2600, 4, modes, rounds=1)


def test_a_timed_stage_agrees_with_the_reference_of_its_last_rows(monkeypatch):
    rows = stage_rows(monkeypatch, None, ["hisa", "group_rerank"])
    assert [(row["mode"], row["ms"], row["agreement"]) for row in rows] == [
        (mode, 2.0, 1.0) for mode in ("native", "hisa", "group_rerank")
    ]


@pytest.mark.parametrize("wrong", ["native", "hisa", "group_rerank"])
def test_a_wrong_stage_has_no_time(monkeypatch, wrong):
    with pytest.raises(bench_decode.DisagreementError, match=rf"24 rows, 2600 keys: {wrong} 0\.\d+ of the reference's"):
        stage_rows(monkeypatch, wrong, ["hisa", "group_rerank"])


def test_agreement_counts_only_what_native_selects_too():
    got, wanted = [{1, 2, 9}, {5}], [{1, 2, 3}, {7}]
    assert bench_stage.Agreement.of(got, wanted, None).mean == pytest.approx(1 / 3)
    assert bench_stage.Agreement.of(got, wanted, [{1, 2}, {8}]).mean == 1.0


def decode_rows(monkeypatch, wrong: str | None) -> list[dict]:
    monkeypatch.setattr(DecodeCase, "wrong", wrong)
    monkeypatch.setattr(bench_decode, "Case", DecodeCase)
    return bench_decode.measure(2, 2500, 4, ["hisa", "misa_rerank"], rounds=1)


def test_a_timed_decode_agrees_with_the_reference(monkeypatch):
    rows = decode_rows(monkeypatch, None)
    assert [(row["mode"], row["us"], row["agreement"]) for row in rows] == [
        (mode, 1000.0, 1.0) for mode in ("native", "hisa", "misa_rerank")
    ]


@pytest.mark.parametrize("wrong", ["native", "hisa", "misa_rerank"])
def test_a_wrong_decode_has_no_time(monkeypatch, wrong):
    with pytest.raises(bench_decode.DisagreementError, match=f"^{wrong}, 4 heads, batch 2, context 2500"):
        decode_rows(monkeypatch, wrong)


def test_the_other_cases_go_on(monkeypatch, tmp_path, capsys):
    """One case that selects wrongly costs its own times only, and the run is a failure."""
    monkeypatch.setattr(bench_decode, "agreement", lambda mode, heads: {"reference_mean": 1.0, "native_least": 1.0})
    row = {"mode": "hisa", "heads": 4, "us": 1.0, "times_native": 2.0, "once_us": 0.0}

    def measure(batch, context, heads, modes, rounds):
        if context == 2000:
            raise bench_decode.DisagreementError("hisa, context 2000: 0.5 of the reference's tokens")
        return [{**row, "batch": batch, "context": context}]

    monkeypatch.setattr(bench_decode, "measure", measure)
    out = tmp_path / "decode.json"
    flags = ["--heads", "4", "--batch", "2", "--contexts", "1000", "2000", "3000", "--modes", "hisa"]
    assert bench_decode.main([*flags, "--json", str(out)]) == 1
    record = json.loads(out.read_text())
    assert [one["context"] for one in record["results"]] == [1000, 3000]
    assert record["failures"] == ["hisa, context 2000: 0.5 of the reference's tokens"]
    assert "FAIL hisa, context 2000" in capsys.readouterr().err
