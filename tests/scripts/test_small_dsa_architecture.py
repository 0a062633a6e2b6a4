"""The small model's layers against loops: both rotations, latent attention per head, the indexer's scores."""

import cmath

import pytest
import torch

from small_dsa.architecture import (
    Attention,
    ModelShape,
    SmallDsa,
    Turn,
    index_scores,
    rotate_halves,
    rotate_pairs,
    turns,
)
from small_dsa.passes import dense_pass, sparse_pass

THETA = 10000.0
SHAPE = ModelShape(40, 2, 32, 48, num_heads=3, q_lora_rank=16, nope_dim=8, value_dim=12, index_heads=5, index_top_k=6)


def angles(length: int) -> Turn:
    return turns(length, THETA, torch.device("cpu"))


def rotated(pair: complex, position: int, number: int) -> complex:
    return pair * cmath.exp(1j * position * THETA ** (-2 * number / 64))


def loop_pairs(x: torch.Tensor) -> torch.Tensor:
    """x [L, 64]: dims 2i and 2i + 1 are one complex number."""
    out = torch.empty_like(x)
    for position in range(x.shape[0]):
        for i in range(32):
            turned = rotated(complex(x[position, 2 * i], x[position, 2 * i + 1]), position, i)
            out[position, 2 * i], out[position, 2 * i + 1] = turned.real, turned.imag
    return out


def loop_halves(x: torch.Tensor) -> torch.Tensor:
    """x [L, 128]: dims i and i + 32 are one complex number, those from 64 on stay."""
    out = x.clone()
    for position in range(x.shape[0]):
        for i in range(32):
            turned = rotated(complex(x[position, i], x[position, i + 32]), position, i)
            out[position, i], out[position, i + 32] = turned.real, turned.imag
    return out


def rms_normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention_layer() -> Attention:
    """With norms that are not 1, which training starts from."""
    layer = Attention(SHAPE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return layer


@pytest.mark.parametrize("rotate,loop,dims", [(rotate_pairs, loop_pairs, 64), (rotate_halves, loop_halves, 128)])
def test_rotation_is_a_complex_product(rotate, loop, dims):
    x = torch.randn(2, 9, 3, dims)
    out = rotate(x, angles(9))
    for batch in range(2):
        for head in range(3):
            torch.testing.assert_close(out[batch, :, head], loop(x[batch, :, head]), atol=1e-5, rtol=0)


def test_angles_stay_exact_at_far_positions():
    position = 160_000
    turn = angles(position + 1)
    for i in (0, 1, 17, 31):
        wanted = rotated(1 + 0j, position, i)
        assert complex(turn.cos[position, i], turn.sin[position, i]) == pytest.approx(wanted, abs=1e-6)


def test_rotated_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 30, 1, 64)
    q, k = rotate_pairs(q, angles(30))[0, :, 0], rotate_pairs(k, angles(30))[0, :, 0]
    products = q @ k.T
    for distance in (0, 3, 11):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_latent_attention_is_softmax_per_head(masked):
    layer, length = attention_layer(), 11
    x = torch.randn(1, length, SHAPE.hidden_size)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if masked:
        allowed &= (torch.rand(length, length) < 0.5) | torch.eye(length, dtype=torch.bool)
    with torch.no_grad():
        out = layer.mix(layer.heads(x, angles(length)), allowed[None, None] if masked else None)[0]

        latent = rms_normed(x[0] @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight)
        down = x[0] @ layer.kv_a_proj_with_mqa.weight.T
        compressed, shared_key = rms_normed(down[:, :512], layer.kv_a_layernorm.weight), loop_pairs(down[:, 512:])
        heads = []
        for head in range(SHAPE.num_heads):
            q = latent @ layer.q_b_proj.weight[head * 72 : (head + 1) * 72].T
            kv = compressed @ layer.kv_b_proj.weight[head * 20 : (head + 1) * 20].T
            q_rope = loop_pairs(q[:, 8:])
            mixed = torch.zeros(length, SHAPE.value_dim)
            for row in range(length):
                seen = allowed[row].nonzero()[:, 0]
                logits = kv[seen, :8] @ q[row, :8] + shared_key[seen] @ q_rope[row]
                mixed[row] = (logits * 72**-0.5).softmax(0) @ kv[seen, 8:]
            heads.append(mixed)
        wanted = torch.cat(heads, 1) @ layer.o_proj.weight.T
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def test_indexer_keys_queries_and_gates():
    indexer, length = attention_layer().indexer, 7
    x, latent = torch.randn(1, length, SHAPE.hidden_size), torch.randn(1, length, SHAPE.q_lora_rank)
    with torch.no_grad():
        keys = indexer.keys(x, angles(length))[0]
        query, gate = indexer.queries(latent, x, angles(length))
        down = x[0] @ indexer.wk.weight.T
        centred = down - down.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        wanted = loop_halves(normed * indexer.k_norm.weight + indexer.k_norm.bias)
        torch.testing.assert_close(keys, wanted, atol=1e-4, rtol=1e-4)
        for head in range(SHAPE.index_heads):
            wanted = loop_halves(latent[0] @ indexer.wq_b.weight[head * 128 : (head + 1) * 128].T)
            torch.testing.assert_close(query[0, :, head], wanted, atol=1e-5, rtol=1e-5)
        wanted = x[0] @ indexer.weights_proj.weight.T * SHAPE.index_heads**-0.5 * 128**-0.5
        torch.testing.assert_close(gate[0], wanted, atol=1e-6, rtol=1e-5)


def test_index_scores_sum_gated_positive_products():
    query, gate, key = torch.randn(2, 4, 5, 128), torch.randn(2, 4, 5), torch.randn(2, 6, 128)
    out = index_scores(query, gate, key)
    for batch in range(2):
        for row in range(4):
            for token in range(6):
                wanted = 0.0
                for head in range(5):
                    product = float(query[batch, row, head] @ key[batch, token])
                    wanted += float(gate[batch, row, head]) * max(0.0, product)
                assert float(out[batch, row, token]) == pytest.approx(wanted, abs=1e-3)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("sparse", [False, True])
def test_later_tokens_do_not_change_earlier_states(sparse):
    model, length, changed = SmallDsa(SHAPE), 24, 17
    tokens = torch.randint(SHAPE.vocab_size, (2, length))
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1) % SHAPE.vocab_size
    rows = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        first, second = (
            sparse_pass(model, ids, rows)[0] if sparse else dense_pass(model, ids) for ids in (tokens, other)
        )
    torch.testing.assert_close(first[:, :changed], second[:, :changed], atol=1e-6, rtol=0)
    assert (first[:, changed:] - second[:, changed:]).abs().amax(-1).min() > 1e-3


def test_every_parameter_belongs_to_the_indexers_or_to_the_rest():
    model = SmallDsa(SHAPE)
    indexers, rest = ({id(p) for p in part} for part in (model.indexer_parameters(), model.base_parameters()))
    assert not indexers & rest and indexers | rest == {id(p) for p in model.parameters()}
    assert len(indexers) == SHAPE.num_layers * 5
