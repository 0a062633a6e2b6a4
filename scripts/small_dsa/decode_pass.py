"""The exported model step by step, as a server decodes: one context's keys, then rows that choose what they read.

For asking what a choice of candidates does to answers, without a GPU. As `serving_pass`, but the scores that choose are
exact: a few rows can afford float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from small_dsa.architecture import SmallDsa, Turn, turns
from small_dsa.serving_pass import attend_all, behind_attention, index_inputs


class LayerCache(NamedTuple):
    """What one layer keeps of n tokens: k [heads, n, nope + 64], v [heads, n, value], index keys [n, 128], all f32."""

    k: torch.Tensor
    v: torch.Tensor
    index_keys: torch.Tensor


class IndexRow(NamedTuple):
    """A query row of a layer's indexer: q [H, 128], gates w [H], keys [n, 128] with their scales folded in, all f32.

    scores [n] f32: s[n] = sum_h w[h] * relu(q[h] . keys[n]), which native chooses by.
    """

    layer: int
    q: torch.Tensor
    w: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor


# From a row to the tokens that its attention reads: int64 [at most top_k].
Choose = Callable[[IndexRow], torch.Tensor]


@torch.no_grad()
def read_context(model: SmallDsa, tokens: torch.Tensor) -> list[LayerCache]:
    """Every layer's cache of tokens [L], each row having read native's selection."""
    length = len(tokens)
    turn = turns(length, model.shape.rope_theta, tokens.device)
    hidden = model.embed_tokens(tokens[None])
    caches = []
    for number, layer in enumerate(model.decoder()):
        x = layer.input_layernorm(hidden)
        heads = layer.self_attn.heads(x, turn)
        inputs = index_inputs(layer, x, heads.latent, turn)
        last = inputs(slice(length - 1, length))
        caches.append(LayerCache(heads.k[0], heads.v[0], last.k.float() * last.k_scale[:, None]))
        if number == model.shape.num_layers - 1:
            break  # nobody reads what its rows would say
        hidden = behind_attention(layer, hidden, attend_all(heads, layer, inputs, model.shape.index_top_k))
    return caches


@torch.no_grad()
def decode_pass(
    model: SmallDsa, caches: list[LayerCache], tokens: torch.Tensor, choose: Choose
) -> tuple[torch.Tensor, list[LayerCache]]:
    """Logits [L, vocab] after each of tokens [L], which follow what the caches hold, and the caches with them."""
    first, length = caches[0].k.shape[1], len(tokens)
    everything = turns(first + length, model.shape.rope_theta, tokens.device)
    turn = Turn(everything.cos[first:], everything.sin[first:])
    hidden = model.embed_tokens(tokens[None])
    longer = []
    for number, (layer, cache) in enumerate(zip(model.decoder(), caches, strict=True)):
        x = layer.input_layernorm(hidden)
        heads = layer.self_attn.heads(x, turn)
        own = index_inputs(layer, x, heads.latent, turn)(slice(0, length))
        k, v = torch.cat([cache.k, heads.k[0]], 1), torch.cat([cache.v, heads.v[0]], 1)
        keys = torch.cat([cache.index_keys, own.k.float() * own.k_scale[:, None]])
        mixed = []
        for place in range(length):
            seen = first + place + 1
            q, w = own.q[place].float(), own.weights[place]
            scores = torch.relu(q @ keys[:seen].T).mul_(w[:, None]).sum(0)
            chosen = choose(IndexRow(number, q, w, keys[:seen], scores))
            logits = torch.einsum("hd,hnd->hn", heads.q[0, :, place], k[:, chosen]) * layer.self_attn.scale
            mixed.append(torch.einsum("hn,hnd->hd", logits.softmax(-1), v[:, chosen]).flatten())
        hidden = behind_attention(layer, hidden, torch.stack(mixed))
        longer.append(LayerCache(k, v, keys))
    return model.logits(hidden[0]), longer
