"""The small model as a server runs it: quantised index tensors, and attention over the selected tokens."""

import pytest
import torch

from indexer_kernels.reference.scores import token_scores
from small_dsa.architecture import Heads, ModelShape, SmallDsa, index_scores, turns
from small_dsa.passes import dense_pass, sparse_pass
from small_dsa.serving_pass import (
    FP8_MAX,
    IndexInputs,
    attend,
    hadamard_matrix,
    index_inputs,
    quantise,
    scores_of,
    serving_pass,
)

LENGTH = 150  # more than one chunk of rows


def model_with(top_k: int) -> SmallDsa:
    return SmallDsa(ModelShape(40, 2, 32, 48, 3, 16, nope_dim=8, value_dim=12, index_heads=4, index_top_k=top_k))


def dequantised(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.float() * scale[..., None]


def random_inputs(rows: int, tokens: int, heads: int) -> IndexInputs:
    q, q_scale = quantise(torch.randn(rows, heads, 128), power_of_two=True)
    k, k_scale = quantise(torch.randn(tokens, 128), power_of_two=False)
    return IndexInputs(q, torch.randn(rows, heads) * q_scale, k, k_scale)


def test_hadamard_matrix_is_a_rotation_of_signs():
    matrix = hadamard_matrix(128)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full((128, 128), 128**-0.5))
    assert torch.equal(matrix, matrix.T)


def test_scales_of_queries_are_powers_of_two_and_fit():
    x = torch.randn(50, 4, 128) * torch.logspace(-4, 4, 50)[:, None, None]
    x[0, 0] = 0.0
    x[1, 0] = 0.0
    x[1, 0, 5] = FP8_MAX * 4  # a power of two already
    _, scale = quantise(x, power_of_two=True)
    assert (torch.frexp(scale).mantissa == 0.5).all() and scale[1, 0] == 4.0
    exact = x.abs().amax(-1).clamp_min(1e-4) / FP8_MAX
    assert (scale >= exact).all() and (scale < 2.001 * exact).all()
    _, plain = quantise(x, power_of_two=False)
    torch.testing.assert_close(plain, exact)
    assert (torch.frexp(plain).mantissa != 0.5).any()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_numbers_are_within_half_a_step(power_of_two):
    x = torch.randn(200, 128) * torch.logspace(-3, 3, 200)[:, None]
    quantised, scale = quantise(x, power_of_two)
    assert quantised.dtype == torch.float8_e4m3fn and quantised.shape == x.shape and not quantised.float().isnan().any()
    # Three bits of mantissa, so half a step is a 16th; below 2^-6 steps are 2^-9 wide.
    allowed = torch.maximum(x.abs() / 16, scale[:, None] * 2**-10) * 1.001
    assert ((dequantised(quantised, scale) - x).abs() <= allowed).all()


def test_products_of_quantised_tensors_are_those_of_the_originals():
    q, k = torch.randn(64, 128) * 3, torch.randn(300, 128) * 0.2
    turned = hadamard_matrix(128)
    wanted = q @ k.T
    products = dequantised(*quantise(q @ turned, True)) @ dequantised(*quantise(k @ turned, False)).T
    assert 0 < (products - wanted).norm() < 0.05 * wanted.norm()
    bound = (q.norm(dim=1)[:, None] * k.norm(dim=1)) * (2 / 16 + 1 / 256 + 1e-2)
    assert ((products - wanted).abs() <= bound).all()


def test_scores_are_the_reference_indexers():
    inputs = random_inputs(20, 200, 6)
    # bf16 keeps 8 bits of a head's product, of its weight and of the sum.
    allowed = token_scores(inputs.q, inputs.weights.abs(), inputs.k, inputs.k_scale) * 3 * 2**-8 + 1e-6
    assert ((scores_of(inputs) - token_scores(*inputs)).abs() <= allowed).all()
    assert scores_of(inputs).dtype == torch.float32 and (token_scores(*inputs) < 0).any()


@torch.no_grad()
def test_index_tensors_score_as_the_trained_indexer():
    model = model_with(LENGTH)
    layer, turn = model.decoder()[0], turns(LENGTH, model.shape.rope_theta, torch.device("cpu"))
    x = layer.input_layernorm(model.embed_tokens(torch.randint(40, (1, LENGTH))))
    latent = layer.self_attn.heads(x, turn).latent
    inputs = index_inputs(layer, x, latent, turn)
    everything, indexer = inputs(slice(0, LENGTH)), layer.self_attn.indexer
    wanted = index_scores(*indexer.queries(latent, x, turn), indexer.keys(x, turn))[0]
    assert (token_scores(*everything) - wanted).norm() < 0.05 * wanted.norm()
    part = inputs(slice(130, 137))
    assert torch.equal(part.q.float(), everything.q[130:137].float())
    torch.testing.assert_close(part.weights, everything.weights[130:137])
    assert torch.equal(part.k.float(), everything.k.float()) and torch.equal(part.k_scale, everything.k_scale)


@torch.no_grad()
def test_a_row_attends_to_its_best_tokens():
    length, top_k, part = 12, 6, slice(4, 12)
    heads = Heads(torch.randn(1, 2, length, 10), torch.randn(1, 2, length, 10), torch.randn(1, 2, length, 3), None)
    liked = torch.randperm(length).float() + 1  # every token's score, the same for all rows

    def inputs(rows: slice) -> IndexInputs:
        unit = torch.zeros(length, 128)
        unit[:, 0] = 1.0
        count = rows.stop - rows.start
        q = unit[:count, None].to(torch.float8_e4m3fn)
        return IndexInputs(q, torch.ones(count, 1), unit.to(torch.float8_e4m3fn), liked)

    out = attend(heads, 0.3, inputs, part, top_k)
    for row in range(part.start, part.stop):
        read = sorted(range(row + 1), key=lambda token: -float(liked[token]))[:top_k]
        for head in range(2):
            weights = (heads.k[0, head, read] @ heads.q[0, head, row] * 0.3).softmax(0)
            mixed = out[row - part.start, head * 3 : head * 3 + 3]
            torch.testing.assert_close(mixed, weights @ heads.v[0, head, read], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [LENGTH, LENGTH + 50])
@torch.no_grad()
def test_with_every_token_selected_it_is_the_trained_model(top_k):
    model, tokens, seen = model_with(top_k), torch.randint(40, (LENGTH,)), []
    logits = serving_pass(model, tokens, lambda layer, inputs: seen.append((layer, inputs(slice(0, LENGTH)))))
    wanted = model.logits(dense_pass(model, tokens[None])[0, -1])
    assert logits.shape == (1, model.shape.vocab_size)
    torch.testing.assert_close(logits[0], wanted, atol=1e-4, rtol=1e-4)
    assert [layer for layer, _ in seen] == [0, 1]
    for _, inputs in seen:
        assert inputs.q.shape == (LENGTH, 4, 128) and inputs.weights.shape == (LENGTH, 4)
        assert inputs.k.shape == (LENGTH, 128) and inputs.k_scale.shape == (LENGTH,)


@torch.no_grad()
def test_with_few_tokens_selected_it_is_close_to_sparse_training():
    """Not equal: quantised scores of neighbouring ranks change places."""
    model, tokens = model_with(30), torch.randint(40, (LENGTH,))
    logits = serving_pass(model, tokens, lambda layer, inputs: None)
    hidden = sparse_pass(model, tokens[None], torch.zeros(1, 1, dtype=torch.int64))[0]
    sparse, dense = model.logits(hidden[0, -1]), model.logits(dense_pass(model, tokens[None])[0, -1])
    assert (logits[0] - sparse).norm() < 0.3 * (logits[0] - dense).norm()
