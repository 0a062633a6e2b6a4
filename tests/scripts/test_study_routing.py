"""The study's routing and recall against the references."""

import json

import pytest
import torch

import study_routing
from indexer_kernels import IndexerParams, select_ragged
from indexer_kernels.reference.routing import routing_scores
from indexer_kernels.traces import Trace, save_traces

CONTEXT = 4000


@pytest.fixture(scope="module")
def trace() -> Trace:
    random = torch.Generator().manual_seed(3)

    def fp8(*shape):
        return torch.randn(shape, generator=random).to(torch.float8_e4m3fn)

    weights = torch.randn((3, 64), generator=random)
    scales = torch.rand(CONTEXT, generator=random) + 0.5
    positions = torch.tensor([3500, 3998, 3999])
    return Trace("made-up", 0, CONTEXT, fp8(3, 64, 128), weights, fp8(CONTEXT, 128), scales, positions, "noise")


@pytest.mark.parametrize(("name", "size", "statistic"), [("mean, sum, 1024", 1024, "sum"), ("mean, 128", 128, "max")])
def test_means_route_as_the_reference_does(trace, name, size, statistic):
    row = study_routing.Row(trace, 1)
    tokens = trace.k.double() * trace.k_scale[:, None].double()
    means = tokens[: CONTEXT // size * size].view(-1, size, 128).mean(1).float()  # the study's are not rounded
    blocks = torch.tensor([3999 // size])
    want = routing_scores(trace.q[1:2], trace.weights[1:2], means, blocks, statistic)[0]
    torch.testing.assert_close(study_routing.STATISTICS[name](row), want, rtol=1e-4, atol=1e-4)


def test_the_share_is_what_misa_rerank_finds(trace):
    params = IndexerParams(candidates=2560, route_block=128, active_heads=8)
    native, got = (
        select_ragged(mode, *trace.case(), params, backend="reference") for mode in ("native", "misa_rerank")
    )
    for number in range(3):
        row = study_routing.Row(trace, number)
        share = study_routing.found(row, study_routing.STATISTICS["mean, 128"](row), 8, 2560)
        both = set(native[number].tolist()) & set(got[number].tolist())
        assert abs(share - len(both) / 2048) < 0.002, "float32 sums may move a token at a boundary"
        assert 0.5 < share < 0.99


def test_knowing_the_bounds_of_a_block_never_scores_below_its_keys(trace):
    """bounds: no key of a block may score higher than the block does."""
    row = study_routing.Row(trace, 2)
    keys = row.by_head[:, : CONTEXT // 128 * 128].abs().amax(1)
    assert (study_routing.STATISTICS["bounds, 128"](row) >= keys - 1e-3).all()


def test_signed_never_routes_a_negative_gate_before_a_positive_one(trace):
    row = study_routing.Row(trace, 0)
    routing = study_routing.STATISTICS["signed, 128"](row)
    assert (routing[row.w < 0] <= 0).all() and (routing[row.w > 0] >= 0).all()


def test_command(trace, tmp_path, capsys):
    save_traces(tmp_path / "t.npz", [trace])
    command = ["--traces", str(tmp_path / "t.npz"), "--candidates", "2560", "--json", str(tmp_path / "o.json")]
    assert study_routing.main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(study_routing.STATISTICS)
    entries = json.loads((tmp_path / "o.json").read_text())["entries"]
    assert [entry["statistic"] for entry in entries] == list(study_routing.STATISTICS)
    assert study_routing.main(["--traces", str(tmp_path / "t.npz"), "--candidates", "8192"]) == 2
    assert "sees more than 8192 tokens" in capsys.readouterr().err
