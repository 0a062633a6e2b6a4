"""What the small model's rows may read, and how much of their attention that is."""

import pytest
import torch

from small_dsa import passes
from small_dsa.architecture import Layer, ModelShape, SmallDsa, Turn, index_scores, turns
from small_dsa.passes import (
    attention_of_rows,
    dense_pass,
    indexer_coverage,
    indexer_pass,
    selected_mask,
    sparse_pass,
)

LENGTH, TOP_K = 21, 8


def model_with(top_k: int) -> SmallDsa:
    shape = ModelShape(40, 2, 32, 48, num_heads=3, q_lora_rank=16, nope_dim=8, value_dim=12, index_heads=5)
    return SmallDsa(ModelShape(**(shape.as_dict() | {"index_top_k": top_k})))


def tokens_and_rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(40, (2, LENGTH)), torch.tensor([[20, 7, 12, 0], [8, 18, 15, 11]])


def layer_inputs(model: SmallDsa, tokens: torch.Tensor) -> tuple[Layer, torch.Tensor, Turn]:
    """The first layer and its normalised input."""
    layer = model.decoder()[0]
    turn = turns(tokens.shape[1], model.shape.rope_theta, tokens.device)
    return layer, layer.input_layernorm(model.embed_tokens(tokens)), turn


def prefix_scores(layer: Layer, x: torch.Tensor, latent: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Index scores [B, L, L] of every row, future tokens included."""
    indexer = layer.self_attn.indexer
    return index_scores(*indexer.queries(latent, x, turn), indexer.keys(x, turn))


def loop_attention(q: torch.Tensor, k: torch.Tensor, scale: float, row: int) -> torch.Tensor:
    """q, k [heads, L, D] -> attention [L] of one row, averaged over heads."""
    weights = torch.zeros(k.shape[1])
    for head in range(q.shape[0]):
        weights[: row + 1] += (k[head, : row + 1] @ q[head, row] * scale).softmax(0) / q.shape[0]
    return weights


@pytest.mark.parametrize("score_rows", [512, 4])
@torch.no_grad()
def test_a_row_reads_the_best_tokens_of_its_prefix(monkeypatch, score_rows):
    monkeypatch.setattr(passes, "SCORE_ROWS", score_rows)
    model, (tokens, _) = model_with(TOP_K), tokens_and_rows()
    layer, x, turn = layer_inputs(model, tokens)
    latent = layer.self_attn.heads(x, turn).latent
    mask = selected_mask(layer, x, latent, turn, TOP_K)
    assert mask.shape == (2, 1, LENGTH, LENGTH) and mask.dtype == torch.bool
    scores = prefix_scores(layer, x, latent, turn)
    for batch in range(2):
        for row in range(LENGTH):
            chosen = mask[batch, 0, row].nonzero()[:, 0].tolist()
            assert len(chosen) == min(row + 1, TOP_K) and max(chosen) <= row
            # Scores, not tokens: a token that no head likes scores 0 and may tie with another.
            best = scores[batch, row, : row + 1].sort(descending=True).values[:TOP_K]
            torch.testing.assert_close(scores[batch, row, chosen].sort(descending=True).values, best)


@torch.no_grad()
def test_rows_whose_scores_are_all_negative_or_equal_never_read_the_future():
    model, (tokens, _) = model_with(TOP_K), tokens_and_rows()
    for gate in (-1.0, 0.0):
        layer, x, turn = layer_inputs(model, tokens)
        layer.self_attn.indexer.weights_proj.weight.zero_()
        if gate:
            layer.self_attn.indexer.weights_proj.weight[:] = -10.0 * x.mean((0, 1)).sign()
        mask = selected_mask(layer, x, layer.self_attn.heads(x, turn).latent, turn, TOP_K)[:, 0]
        assert torch.equal(mask.sum(-1), torch.arange(1, LENGTH + 1).clamp_max(TOP_K).expand(2, -1))
        assert not mask.triu(1).any()


@pytest.mark.parametrize("top_k", [LENGTH, LENGTH + 5])
@torch.no_grad()
def test_sparse_is_dense_where_every_token_is_selected(top_k):
    model, (tokens, rows) = model_with(top_k), tokens_and_rows()
    hidden, index = sparse_pass(model, tokens, rows)
    torch.testing.assert_close(hidden, dense_pass(model, tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(index, indexer_pass(model, tokens, rows), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sparse_reads_the_selected_tokens_alone():
    """Tokens that no row selects in any layer change nothing but their own state."""
    model, (tokens, rows) = model_with(TOP_K), tokens_and_rows()
    layer, x, turn = layer_inputs(model, tokens)
    heads = layer.self_attn.heads(x, turn)
    mask = selected_mask(layer, x, heads.latent, turn, TOP_K)
    mixed = layer.self_attn.mix(heads, mask)
    hidden = model.embed_tokens(tokens) + mixed
    one_layer = SmallDsa(ModelShape(**(model.shape.as_dict() | {"num_layers": 1})))
    one_layer.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("layers.1.")})
    wanted = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    torch.testing.assert_close(sparse_pass(one_layer, tokens, rows)[0], wanted, atol=1e-6, rtol=0)
    unread = (~mask[0, 0, LENGTH - 1]).nonzero()[:, 0]
    changed = heads._replace(v=heads.v.clone())
    changed.v[0, :, unread] += 100.0
    after = layer.self_attn.mix(changed, mask)
    torch.testing.assert_close(after[0, -1], mixed[0, -1], atol=1e-5, rtol=0)
    assert (after[0, : unread[0] + 1] - mixed[0, : unread[0] + 1]).abs().max() > 1.0


@torch.no_grad()
def test_attention_of_rows_is_the_mean_of_the_heads():
    model, (tokens, rows) = model_with(TOP_K), tokens_and_rows()
    layer, x, turn = layer_inputs(model, tokens)
    heads = layer.self_attn.heads(x, turn)
    attention = attention_of_rows(heads, layer.self_attn.scale, rows)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4))
    for batch in range(2):
        for m, row in enumerate(rows[batch].tolist()):
            wanted = loop_attention(heads.q[batch], heads.k[batch], 72**-0.5, row)
            torch.testing.assert_close(attention[batch, m], wanted, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_attention_of_rows_is_what_attention_mixes():
    """Values that are unit vectors read the weights out of scaled_dot_product_attention itself."""
    model, (tokens, rows) = model_with(TOP_K), tokens_and_rows()
    layer, x, turn = layer_inputs(model, tokens)
    heads = layer.self_attn.heads(x, turn)
    heads = heads._replace(v=torch.eye(LENGTH).expand(2, 3, LENGTH, LENGTH))
    layer.self_attn.o_proj = torch.nn.Identity()
    weights = layer.self_attn.mix(heads, None).unflatten(2, (3, LENGTH)).mean(2)
    picked = torch.stack([weights[batch, rows[batch]] for batch in range(2)])
    torch.testing.assert_close(attention_of_rows(heads, layer.self_attn.scale, rows), picked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [LENGTH, LENGTH + 5])
def test_an_indexer_that_keeps_every_token_keeps_all_attention(top_k):
    assert indexer_coverage(model_with(top_k), *tokens_and_rows()) == pytest.approx([1.0, 1.0], abs=1e-5)


@torch.no_grad()
def test_coverage_is_the_attention_on_the_best_tokens():
    model, (tokens, rows) = model_with(TOP_K), tokens_and_rows()
    layer, x, turn = layer_inputs(model, tokens)
    heads = layer.self_attn.heads(x, turn)
    scores = prefix_scores(layer, x, heads.latent, turn)
    kept = []
    for batch in range(2):
        for row in rows[batch].tolist():
            weights = loop_attention(heads.q[batch], heads.k[batch], 72**-0.5, row)
            kept.append(float(weights[scores[batch, row, : row + 1].argsort(descending=True)[:TOP_K]].sum()))
    shares = indexer_coverage(model, tokens, rows)
    assert shares[0] == pytest.approx(sum(kept) / len(kept), abs=1e-5)
    assert min(shares) > 0.2 and max(shares) < 0.999
