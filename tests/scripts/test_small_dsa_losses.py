"""The small model's two losses against loops, and which parameters each of them trains."""

import math

import pytest
import torch
from torch.nn import functional

from small_dsa import passes
from small_dsa.architecture import ModelShape, SmallDsa, index_scores, turns
from small_dsa.passes import dense_pass, index_loss, indexer_pass, language_loss, sparse_pass

SHAPE = ModelShape(40, 2, 32, 48, num_heads=3, q_lora_rank=16, nope_dim=8, value_dim=12, index_heads=5, index_top_k=6)
LENGTH = 20


def tokens_and_rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(SHAPE.vocab_size, (2, LENGTH)), torch.tensor([[19, 7, 7, 12, 0], [3, 18, 9, 15, 11]])


def trained(parameters: list) -> list[bool]:
    """Whether each parameter got a gradient that is not zero."""
    return [p.grad is not None and bool(p.grad.abs().max() > 0) for p in parameters]


def test_language_loss_is_a_weighted_mean_over_predicted_tokens():
    model, (tokens, _) = SmallDsa(SHAPE), tokens_and_rows()
    hidden = torch.randn(2, LENGTH, SHAPE.hidden_size)
    weight = torch.rand(2, LENGTH) * (torch.rand(2, LENGTH) < 0.5)
    with torch.no_grad():
        loss = float(language_loss(model, hidden, tokens, weight))
        probabilities = model.logits(hidden).softmax(-1)
    total = 0.0
    for batch in range(2):
        for n in range(1, LENGTH):
            p = float(probabilities[batch, n - 1, tokens[batch, n]])
            total -= float(weight[batch, n]) * math.log(p)
    assert loss == pytest.approx(total / float(weight[:, 1:].sum()), rel=1e-4)


def test_a_weight_belongs_to_the_prediction_of_its_own_token():
    model, (tokens, _) = SmallDsa(SHAPE), tokens_and_rows()
    hidden, weight = torch.randn(2, LENGTH, SHAPE.hidden_size), torch.zeros(2, LENGTH)
    weight[1, 8] = 0.25
    weight[:, 0] = 1.0  # nothing predicts the first token
    with torch.no_grad():
        loss = language_loss(model, hidden, tokens, weight)
        wanted = functional.cross_entropy(model.logits(hidden[1, 7]), tokens[1, 8])
    torch.testing.assert_close(loss, wanted)


def test_dense_training_leaves_the_indexers_alone():
    model, (tokens, _) = SmallDsa(SHAPE), tokens_and_rows()
    language_loss(model, dense_pass(model, tokens), tokens, torch.ones(2, LENGTH)).backward()
    assert all(trained(model.base_parameters()))
    assert all(p.grad is None for p in model.indexer_parameters())


def test_indexer_training_reaches_the_indexers_alone():
    model, (tokens, rows) = SmallDsa(SHAPE), tokens_and_rows()
    indexer_pass(model, tokens, rows).backward()
    assert all(trained(model.indexer_parameters()))
    assert all(p.grad is None for p in model.base_parameters())


@pytest.mark.parametrize("loss", ["language", "index"])
def test_sparse_training_keeps_the_two_losses_apart(loss):
    model, (tokens, rows) = SmallDsa(SHAPE), tokens_and_rows()
    hidden, index = sparse_pass(model, tokens, rows)
    base, indexers = model.base_parameters(), model.indexer_parameters()
    if loss == "language":
        language_loss(model, hidden, tokens, torch.ones(2, LENGTH)).backward()
        assert all(trained(base)) and all(p.grad is None for p in indexers)
    else:
        index.backward()
        assert all(trained(indexers)) and all(p.grad is None for p in base)


class OneLayer:
    """One layer's inputs to index_loss, and log softmax of its index scores at the rows, row by row."""

    def __init__(self) -> None:
        self.layer = SmallDsa(SHAPE).decoder()[0]
        self.x, self.latent = torch.randn(2, LENGTH, SHAPE.hidden_size), torch.randn(2, LENGTH, SHAPE.q_lora_rank)
        _, self.rows = tokens_and_rows()
        self.turn = turns(LENGTH, SHAPE.rope_theta, torch.device("cpu"))
        indexer = self.layer.self_attn.indexer
        self.log_q = torch.full((2, self.rows.shape[1], LENGTH), float("-inf"))
        with torch.no_grad():
            for batch in range(2):
                x, latent = self.x[batch : batch + 1], self.latent[batch : batch + 1]
                scores = index_scores(*indexer.queries(latent, x, self.turn), indexer.keys(x, self.turn))[0]
                for m, row in enumerate(self.rows[batch].tolist()):
                    self.log_q[batch, m, : row + 1] = scores[row, : row + 1].log_softmax(0)

    def loss(self, target: torch.Tensor) -> float:
        return index_loss(self.layer, self.x, self.latent, target, self.rows, self.turn).item()


@pytest.mark.parametrize("score_rows", [512, 4, 1])
def test_kl_is_zero_where_scores_are_the_log_of_the_target(monkeypatch, score_rows):
    monkeypatch.setattr(passes, "SCORE_ROWS", score_rows)
    case = OneLayer()
    assert abs(case.loss(case.log_q.exp())) < 1e-6


@pytest.mark.parametrize("score_rows", [512, 4])
def test_kl_of_other_targets_is_positive_and_the_sum_over_the_prefix(monkeypatch, score_rows):
    monkeypatch.setattr(passes, "SCORE_ROWS", score_rows)
    case = OneLayer()
    target = (torch.randn_like(case.log_q) * 2).masked_fill(case.log_q.isinf(), float("-inf")).softmax(-1)
    target[0, 0, :5] = 0.0  # as of tokens that were not selected
    target = target / target.sum(-1, keepdim=True)
    wanted = 0.0
    for p, log_q in zip(target.flatten().tolist(), case.log_q.flatten().tolist()):
        wanted += p * (math.log(p) - log_q) if p else 0.0
    loss = case.loss(target)
    assert loss > 0.1 and loss == pytest.approx(wanted / case.rows.numel(), rel=1e-4)


def test_gradient_of_the_kl_lowers_it():
    model, (tokens, rows) = SmallDsa(SHAPE), tokens_and_rows()
    optimiser = torch.optim.SGD(model.indexer_parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = indexer_pass(model, tokens, rows)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
