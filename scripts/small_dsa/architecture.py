"""DeepSeek-V3.2's layers in PyTorch, small: multi-head latent attention, the lightning indexer, a dense MLP.

Conventions are those by which SGLang loads a checkpoint of `DeepseekV32ForCausalLM`: attention rotates interleaved
pairs (2i, 2i + 1), the indexer rotates halves (i, i + 32) of its first 64 dims, and its gate is
weights_proj(x) * H^-0.5 * 128^-0.5. SGLang also turns index queries and keys by one Hadamard matrix before it
quantises them, which changes no product, so training leaves it out. Source: DeepSeek-V3.2 report, section 2.1.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

NORM_EPS = 1e-6
INDEX_HEAD_DIM = 128
ROPE_DIM = 64
LATENT_DIM = 512


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that are free; kv_lora_rank 512, rope 64, 64 indexer heads of 128 and top-k 2048 are DeepSeek-V3.2's."""

    vocab_size: int
    num_layers: int = 3
    hidden_size: int = 512
    intermediate_size: int = 768
    num_heads: int = 16
    q_lora_rank: int = 128
    nope_dim: int = 64
    value_dim: int = 64
    index_heads: int = 64
    index_top_k: int = 2048
    rope_theta: float = 10000.0

    def as_dict(self) -> dict[str, float]:
        """Plain values, for a checkpoint."""
        return asdict(self)


class Turn(NamedTuple):
    """Cosines and sines [L, 32] f32 of RoPE by position."""

    cos: torch.Tensor
    sin: torch.Tensor


def turns(length: int, theta: float, device: torch.device) -> Turn:
    """angle[p, i] = p * theta ** (-2 i / 64)."""
    frequency = theta ** (-torch.arange(0, ROPE_DIM, 2, device=device, dtype=torch.float64) / ROPE_DIM)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency
    return Turn(angle.cos().float(), angle.sin().float())


def rotate_pairs(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """RoPE on interleaved pairs: x [B, L, h, 64] -> the same shape and dtype."""
    cos, sin = turn.cos[:, None, :].to(x.dtype), turn.sin[:, None, :].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rotate_halves(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """RoPE on halves of the first 64 dims: x [B, L, h, 128] -> the same shape and dtype."""
    cos, sin = turn.cos[:, None, :].to(x.dtype), turn.sin[:, None, :].to(x.dtype)
    first, second, rest = x[..., :32], x[..., 32:64], x[..., 64:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class Indexer(nn.Module):
    """Scores every prefix token for a query row; what its top-k keeps is what sparse attention reads."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.num_heads = shape.index_heads
        self.wq_b = nn.Linear(shape.q_lora_rank, shape.index_heads * INDEX_HEAD_DIM, bias=False)
        self.wk = nn.Linear(shape.hidden_size, INDEX_HEAD_DIM, bias=False)
        self.k_norm = nn.LayerNorm(INDEX_HEAD_DIM, eps=NORM_EPS)
        self.weights_proj = nn.Linear(shape.hidden_size, shape.index_heads, bias=False)

    def keys(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """x [B, L, hidden] -> keys [B, L, 128]."""
        return rotate_halves(self.k_norm(self.wk(x))[:, :, None], turn)[:, :, 0]

    def queries(self, latent: torch.Tensor, x: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor]:
        """Query latent [B, M, q_lora_rank] and x [B, M, hidden] -> queries [B, M, H, 128], gates [B, M, H]."""
        query = rotate_halves(self.wq_b(latent).unflatten(-1, (self.num_heads, INDEX_HEAD_DIM)), turn)
        return query, self.weights_proj(x) * (self.num_heads * INDEX_HEAD_DIM) ** -0.5


def index_scores(query: torch.Tensor, gate: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """s[b, m, n] = sum_h gate[b, m, h] * relu(query[b, m, h] . key[b, n]): f32 [B, M, N]."""
    products = torch.einsum("bmhd,bnd->bmhn", query, key)
    return torch.einsum("bmhn,bmh->bmn", functional.relu(products), gate.to(products.dtype)).float()


class Heads(NamedTuple):
    """Inputs of attention: q, k [B, heads, L, nope + 64], v [B, heads, L, value], and the query latent."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    latent: torch.Tensor


class Attention(nn.Module):
    """Multi-head latent attention, expanded per head as in training (SGLang serves the absorbed form)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        head = shape.nope_dim + ROPE_DIM
        self.scale = head**-0.5
        self.q_a_proj = nn.Linear(shape.hidden_size, shape.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(shape.q_lora_rank, eps=NORM_EPS)
        self.q_b_proj = nn.Linear(shape.q_lora_rank, shape.num_heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden_size, LATENT_DIM + ROPE_DIM, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(LATENT_DIM, eps=NORM_EPS)
        self.kv_b_proj = nn.Linear(LATENT_DIM, shape.num_heads * (shape.nope_dim + shape.value_dim), bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.value_dim, shape.hidden_size, bias=False)
        self.indexer = Indexer(shape)

    def heads(self, x: torch.Tensor, turn: Turn) -> Heads:
        """x [B, L, hidden], normalised -> queries, keys and values of every head."""
        shape, (batch, length, _) = self.shape, x.shape
        latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(latent).unflatten(-1, (shape.num_heads, shape.nope_dim + ROPE_DIM))
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split([LATENT_DIM, ROPE_DIM], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(compressed))
        k_nope, v = expanded.unflatten(-1, (shape.num_heads, shape.nope_dim + shape.value_dim)).split(
            [shape.nope_dim, shape.value_dim], dim=-1
        )
        q_nope, q_rope = q.split([shape.nope_dim, ROPE_DIM], dim=-1)
        k_rope = rotate_pairs(k_rope[:, :, None], turn).expand(batch, length, shape.num_heads, ROPE_DIM)
        q = torch.cat([q_nope, rotate_pairs(q_rope, turn)], dim=-1).to(v.dtype)
        k = torch.cat([k_nope, k_rope], dim=-1).to(v.dtype)
        return Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), latent)

    def mix(self, heads: Heads, allowed: torch.Tensor | None) -> torch.Tensor:
        """Attention over the prefix, or over `allowed` [B, 1, L, L] bool (causal itself): [B, L, hidden]."""
        # Flash attention wants values as wide as keys; the zeros are cut off again.
        v = functional.pad(heads.v, (0, heads.k.shape[-1] - heads.v.shape[-1]))
        out = functional.scaled_dot_product_attention(
            heads.q, heads.k, v, attn_mask=allowed, is_causal=allowed is None, scale=self.scale
        )
        return self.o_proj(out[..., : heads.v.shape[-1]].transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer. Names of modules are the checkpoint's."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=NORM_EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=NORM_EPS)
        self.mlp = Mlp(shape)


class SmallDsa(nn.Module):
    """The decoder. Its forward is in `small_dsa.passes`, one per stage of training."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self._init_std(name, parameter))

    def decoder(self) -> list[Layer]:
        """The layers in order, typed."""
        return [cast(Layer, layer) for layer in self.layers]

    def _init_std(self, name: str, parameter: torch.Tensor) -> float:
        if name == "embed_tokens.weight":
            return parameter.shape[1] ** -0.5
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        depth = math.sqrt(2 * self.shape.num_layers) if residual else 1.0
        return parameter.shape[1] ** -0.5 / depth

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Output head, tied to the embedding: hidden [..., hidden] -> [..., vocab] f32."""
        return functional.linear(self.norm(hidden), self.embed_tokens.weight).float()

    def indexer_parameters(self) -> list[nn.Parameter]:
        """What the KL loss trains; attention's own loss never reaches them (the report detaches them too)."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def base_parameters(self) -> list[nn.Parameter]:
        """Everything but the indexers."""
        return [p for name, p in self.named_parameters() if ".indexer." not in name]
