"""The synthetic data has the structure it claims, is quantised as SGLang does it, and repeats by seed."""

import pytest
import torch

from indexer_kernels.synthetic import ACTIVE_NEEDLES, NEEDLE_TOKENS, SINK_TOKENS, make_case, quantise_fp8


def dense_scores(case):
    """float32 [M, N] native scores, by the formula."""
    q, k = case.q.float(), case.k.float()
    products = torch.relu(torch.einsum("mhd,nd->mhn", q, k)) * case.weights[:, :, None]
    return products.sum(1) * case.k_scale


@pytest.fixture(scope="module")
def case():
    return make_case(8192, rows=16, heads=64, seed=3)


def test_shapes_and_types(case):
    assert case.q.shape == (16, 64, 128) and case.q.dtype == torch.float8_e4m3fn
    assert case.k.shape == (8192, 128) and case.k.dtype == torch.float8_e4m3fn
    assert case.weights.shape == (16, 64) and case.weights.dtype == torch.float32
    assert case.k_scale.shape == (8192,) and case.k_scale.dtype == torch.float32
    assert case.ks.tolist() == [0] * 16 and case.ke.dtype == torch.int32
    assert case.ke.tolist() == list(range(8177, 8193))
    assert case.needles.shape == (16, ACTIVE_NEEDLES * NEEDLE_TOKENS)
    assert torch.isfinite(case.weights).all() and torch.isfinite(case.k.float()).all()


def test_repeats_by_seed(case):
    same, other = make_case(8192, 16, 64, seed=3), make_case(8192, 16, 64, seed=4)
    for name in case.__slots__:
        a, b = getattr(case, name), getattr(same, name)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert not torch.equal(case.k.view(torch.uint8), other.k.view(torch.uint8))


def test_quantisation_is_sglangs():
    x = torch.tensor([[2.0, -4.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-6, 0.0, 0.0, -1e-6]])
    values, scale = quantise_fp8(x)
    torch.testing.assert_close(scale, torch.tensor([4.0, 1e-4, 1e-4]) / 448)
    assert values[0].float().tolist() == [224.0, -448.0, 56.0, 0.0]
    torch.testing.assert_close(values.float() * scale[:, None], x, atol=1e-6, rtol=0.07)


def test_neighbours_resemble_each_other(case):
    keys = torch.nn.functional.normalize(case.k.float() * case.k_scale[:, None], dim=-1)[SINK_TOKENS:]
    near, far = (keys[:-16] * keys[16:]).sum(-1).mean(), (keys[:-4001] * keys[4001:]).sum(-1).mean()
    assert near > far + 0.2


def test_few_heads_carry_the_gate(case):
    share = case.weights.abs().sort(dim=1, descending=True).values.cumsum(1)
    share = share / share[:, -1:]
    assert share[:, 7].mean() > 0.4, "8 of 64 heads"
    assert (case.weights < 0).any()


def test_sink_and_wanted_needles_are_found_by_native(case):
    rank = dense_scores(case).argsort(dim=1, descending=True).argsort(dim=1)
    best_quarter = rank < 2048
    assert best_quarter.gather(1, case.needles).float().mean() > 0.6
    assert best_quarter[:, :SINK_TOKENS].float().mean() > 0.6


@pytest.mark.parametrize(("context", "rows", "heads"), [(1, 1, 1), (7, 7, 2), (63, 3, 3), (4001, 3, 32)])
def test_awkward_sizes(context, rows, heads):
    case = make_case(context, rows, heads)
    assert case.q.shape == (rows, heads, 128) and case.weights.abs().min() > 0
    assert case.needles.min() >= 0 and case.needles.max() < context


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((64, 0), "rows=0"), ((64, 65), "rows=65 must be between 1 and context=64"), ((64, 1, 0), "heads=0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_case(*arguments)
