"""The exported model's forward as a server runs it: quantised indexer, attention over the selected tokens only.

For traces without a GPU. Attention itself is computed in float32 and its cache is not quantised, which the server does:
the index tensors agree with a server's up to that.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from small_dsa.architecture import INDEX_HEAD_DIM, Heads, Layer, SmallDsa, Turn, turns

FP8_MAX = 448.0
CHUNK_ROWS = 128


class IndexInputs(NamedTuple):
    """What one layer's indexer works on: q [M, H, 128] and k [L, 128] fp8 e4m3, weights [M, H] and k_scale [L] f32."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor


def hadamard_matrix(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix [size, size] f32; size a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


def quantise(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., 128] -> (fp8 e4m3, scale [...] f32); scale = max(1e-4, max|x|) / 448, queries' rounded up to 2^n.

    As SGLang 0.5.23 quantises index queries (scale_fmt ue8m0) and index keys (plain float32 scales).
    """
    scale = x.abs().amax(-1).clamp_min(1e-4) / FP8_MAX
    if power_of_two:
        scale = torch.exp2(torch.log2(scale).ceil())
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def index_inputs(layer: Layer, x: torch.Tensor, latent: torch.Tensor, turn: Turn) -> Callable[[slice], IndexInputs]:
    """The quantised index tensors for slices of rows; x [1, L, hidden], latent [1, L, rank]. Keys are made once."""
    indexer = layer.self_attn.indexer
    turned = hadamard_matrix(INDEX_HEAD_DIM).to(torch.bfloat16).float()
    k, k_scale = quantise(indexer.keys(x, turn)[0].bfloat16().float() @ turned, power_of_two=False)

    def rows(part: slice) -> IndexInputs:
        query, gate = indexer.queries(latent[:, part], x[:, part], Turn(turn.cos[part], turn.sin[part]))
        q, q_scale = quantise(query[0].bfloat16().float() @ turned, power_of_two=True)
        return IndexInputs(q, gate[0].float() * q_scale, k, k_scale)

    return rows


def scores_of(inputs: IndexInputs) -> torch.Tensor:
    """s[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n]): f32 [M, L], products and sums rounded to bf16.

    Good enough to choose what attention reads (0.995 to 1.0 of the exact choice at 32K), and fast on a CPU.
    """
    rows, heads, _ = inputs.q.shape
    products = (inputs.q.bfloat16().flatten(0, 1) @ inputs.k.bfloat16().T).view(rows, heads, -1)
    return torch.bmm(inputs.weights[:, None].bfloat16(), products.relu_())[:, 0].float() * inputs.k_scale


@torch.no_grad()
def serving_pass(
    model: SmallDsa, tokens: torch.Tensor, note: Callable[[int, Callable[[slice], IndexInputs]], None], last: int = 1
) -> torch.Tensor:
    """Logits [last, vocab] after each of the `last` last of tokens [L].

    note(layer, index_inputs) sees each layer before its attention.
    """
    length, top_k = len(tokens), model.shape.index_top_k
    turn = turns(length, model.shape.rope_theta, tokens.device)
    hidden = model.embed_tokens(tokens[None])
    for number, layer in enumerate(model.decoder()):
        x = layer.input_layernorm(hidden)
        heads = layer.self_attn.heads(x, turn)
        inputs = index_inputs(layer, x, heads.latent, turn)
        note(number, inputs)
        hidden = behind_attention(layer, hidden, attend_all(heads, layer, inputs, top_k))
    return model.logits(hidden[0, -last:])


def behind_attention(layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """What a layer hands on: hidden [1, L, hidden] before it, mixed [L, heads * value] of its attention."""
    hidden = hidden + layer.self_attn.o_proj(mixed[None])
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def attend_all(heads: Heads, layer: Layer, inputs: Callable[[slice], IndexInputs], top_k: int) -> torch.Tensor:
    """`attend` of every row: [L, heads * value]."""
    scale, length = layer.self_attn.scale, heads.q.shape[2]
    return torch.cat([attend(heads, scale, inputs, part, top_k) for part in _chunks(length)])


def attend(heads: Heads, scale: float, inputs: Callable[[slice], IndexInputs], part: slice, top_k: int) -> torch.Tensor:
    """Attention of the rows of `part` over the top_k tokens each of them selects: [rows, heads * value]."""
    reach = part.stop  # nobody in the slice sees further
    visible = torch.arange(reach) <= torch.arange(part.start, part.stop)[:, None]
    if reach > top_k:
        rows = inputs(part)
        scores = scores_of(rows._replace(k=rows.k[:reach], k_scale=rows.k_scale[:reach]))
        best = scores.masked_fill_(~visible, float("-inf")).topk(top_k, dim=1).indices
        visible &= torch.zeros_like(visible).scatter_(1, best, True)
    out = []
    for head in range(heads.q.shape[1]):
        logits = heads.q[0, head, part] @ heads.k[0, head, :reach].T * scale
        out.append(logits.masked_fill_(~visible, float("-inf")).softmax(-1) @ heads.v[0, head, :reach])
    return torch.stack(out, dim=1).flatten(1)


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, length))
