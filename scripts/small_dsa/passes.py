"""Forward passes of the training stages: dense attention, index scores against attention, sparse attention."""

import torch
from torch.nn import functional

from small_dsa.architecture import Heads, Layer, SmallDsa, Turn, index_scores, turns

SCORE_ROWS = 512  # rows whose index scores [rows, 64, L] exist at once


def language_loss(model: SmallDsa, hidden: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """sum(weight * cross entropy) / sum(weight); weight[b, i] belongs to the prediction OF token i, [B, L] f32."""
    target, used = tokens[:, 1:], weight[:, 1:]
    picked = used > 0  # most logits of a haystack carry no weight: do not compute them
    losses = functional.cross_entropy(model.logits(hidden[:, :-1][picked]), target[picked], reduction="none")
    return (losses * used[picked]).sum() / used[picked].sum()


def dense_pass(model: SmallDsa, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, hidden] with attention over the whole prefix."""
    turn = turns(tokens.shape[1], model.shape.rope_theta, tokens.device)
    hidden = model.embed_tokens(tokens)
    for layer in model.decoder():
        heads = layer.self_attn.heads(layer.input_layernorm(hidden), turn)
        hidden = hidden + layer.self_attn.mix(heads, None)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


def attention_of_rows(heads: Heads, scale: float, rows: torch.Tensor) -> torch.Tensor:
    """p[b, m, n]: attention of row rows[b, m], averaged over heads, f32 [B, M, L]; the target of the KL loss."""
    q = heads.q.gather(2, rows[:, None, :, None].expand(-1, heads.q.shape[1], -1, heads.q.shape[3]))
    total = torch.zeros((*rows.shape, heads.k.shape[2]), device=rows.device)
    future = torch.arange(heads.k.shape[2], device=rows.device) > rows[:, :, None]
    for head in range(q.shape[1]):
        logits = (q[:, head] @ heads.k[:, head].transpose(1, 2)).float() * scale
        total += logits.masked_fill_(future, float("-inf")).softmax(-1)
    return total / q.shape[1]


def index_loss(
    layer: Layer, x: torch.Tensor, latent: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, turn: Turn
) -> torch.Tensor:
    """KL(target || softmax of index scores), mean over sampled rows [B, M]; x and latent come detached.

    target [B, M, L] f32 sums to 1. The softmax is over the whole prefix, also where the target is restricted to
    selected tokens: so scores of tokens not selected are pulled down, which the report's sparse loss leaves alone.
    """
    indexer = layer.self_attn.indexer
    keys = indexer.keys(x, turn)
    at = rows[:, :, None]
    picked = Turn(turn.cos[rows], turn.sin[rows])
    x_rows = x.gather(1, at.expand(-1, -1, x.shape[2]))
    latent_rows = latent.gather(1, at.expand(-1, -1, latent.shape[2]))
    total = x.new_zeros((), dtype=torch.float32)
    for part in torch.arange(rows.shape[1], device=rows.device).split(max(1, SCORE_ROWS // rows.shape[0])):
        # Each sequence's rows have angles of their own, so the turn is applied per sequence.
        scores = torch.stack(
            [
                index_scores(
                    *indexer.queries(latent_rows[b : b + 1, part], x_rows[b : b + 1, part], Turn(c[part], s[part])),
                    keys[b : b + 1],
                )[0]
                for b, (c, s) in enumerate(zip(picked.cos, picked.sin))
            ]
        )
        future = torch.arange(keys.shape[1], device=rows.device) > rows[:, part, None]
        log_q = scores.masked_fill(future, float("-inf")).log_softmax(-1)
        p = target[:, part]
        total = total + torch.where(p > 0, p * (p.clamp_min(1e-30).log() - log_q), 0.0).sum()
    return total / rows.numel()


def indexer_pass(model: SmallDsa, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The indexers alone: dense attention without gradient, KL at the sampled rows [B, M] of every layer."""
    turn = turns(tokens.shape[1], model.shape.rope_theta, tokens.device)
    losses = []
    with torch.no_grad():
        hidden = model.embed_tokens(tokens)
    for layer in model.decoder():
        with torch.no_grad():
            x = layer.input_layernorm(hidden)
            heads = layer.self_attn.heads(x, turn)
            target = attention_of_rows(heads, layer.self_attn.scale, rows)
            hidden = hidden + layer.self_attn.mix(heads, None)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        losses.append(index_loss(layer, x, heads.latent, target, rows, turn))
    return torch.stack(losses).mean()


@torch.no_grad()
def selected_mask(layer: Layer, x: torch.Tensor, latent: torch.Tensor, turn: Turn, top_k: int) -> torch.Tensor:
    """What the indexer lets each row read: bool [B, 1, L, L], the top_k best tokens of the prefix."""
    indexer, length = layer.self_attn.indexer, x.shape[1]
    keys = indexer.keys(x, turn)
    causal = torch.ones((length, length), dtype=torch.bool, device=x.device).tril_()
    allowed = causal.expand(x.shape[0], 1, length, length).clone()
    for start in range(top_k, length, SCORE_ROWS):  # rows before see all
        rows = slice(start, min(start + SCORE_ROWS, length))
        part = Turn(turn.cos[rows], turn.sin[rows])
        for b in range(x.shape[0]):
            scores = index_scores(*indexer.queries(latent[b : b + 1, rows], x[b : b + 1, rows], part), keys[b : b + 1])
            scores = scores[0].masked_fill(~causal[rows], float("-inf"))
            allowed[b, 0, rows] = False
            allowed[b, 0, rows].scatter_(1, scores.topk(top_k, dim=1).indices, True)
    return allowed


def sparse_pass(model: SmallDsa, tokens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states with attention over the selected tokens only, KL against the attention among those tokens).

    Gradients of the language loss stay out of the indexers and those of the KL loss stay in them.
    """
    turn = turns(tokens.shape[1], model.shape.rope_theta, tokens.device)
    hidden, losses = model.embed_tokens(tokens), []
    for layer in model.decoder():
        x = layer.input_layernorm(hidden)
        heads = layer.self_attn.heads(x, turn)
        allowed = selected_mask(layer, x, heads.latent, turn, model.shape.index_top_k)
        with torch.no_grad():
            target = attention_of_rows(heads, layer.self_attn.scale, rows)
            kept = allowed[:, 0].gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[1]))
            target = torch.where(kept, target, 0.0)
            target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
        losses.append(index_loss(layer, x.detach(), heads.latent.detach(), target, rows, turn))
        hidden = hidden + layer.self_attn.mix(heads, allowed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, torch.stack(losses).mean()


@torch.no_grad()
def indexer_coverage(model: SmallDsa, tokens: torch.Tensor, rows: torch.Tensor) -> list[float]:
    """Per layer: the share of dense attention that the indexer's top-k keeps, mean over the sampled rows."""
    turn = turns(tokens.shape[1], model.shape.rope_theta, tokens.device)
    hidden, shares = model.embed_tokens(tokens), []
    for layer in model.decoder():
        x = layer.input_layernorm(hidden)
        heads = layer.self_attn.heads(x, turn)
        target = attention_of_rows(heads, layer.self_attn.scale, rows)
        indexer = layer.self_attn.indexer
        keys = indexer.keys(x, turn)
        kept = []
        for b in range(rows.shape[0]):
            at = rows[b]
            query, gate = indexer.queries(
                heads.latent[b : b + 1, at], x[b : b + 1, at], Turn(turn.cos[at], turn.sin[at])
            )
            scores = index_scores(query, gate, keys[b : b + 1])[0]
            future = torch.arange(keys.shape[1], device=at.device) > at[:, None]
            best = scores.masked_fill(future, float("-inf")).topk(min(model.shape.index_top_k, keys.shape[1]), dim=1)
            kept.append(target[b].gather(1, best.indices).sum(1).mean())
        shares.append(torch.stack(kept).mean().item())
        hidden = hidden + layer.self_attn.mix(heads, None)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return shares
