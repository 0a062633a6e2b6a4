"""Structured synthetic index keys and queries: data on which head routing and block selection have something to find.

Gaussian noise would make every method look equally bad: no head matters more than another and no block more than its
neighbour. This data has the structure the methods rely on, and the one that breaks them:

- the sequence is cut into segments of one topic each, so neighbouring keys resemble each other (blocks mean something);
- a positional part is rotated by RoPE, so products drift with distance;
- the first page carries a shared sink direction that every query answers to;
- needles, runs of 8 tokens at random places, point in directions of their own: a block's mean dilutes them;
- each head has a role (topic, needle, local, sink) and few heads carry most of the gate weight, some of it negative.

It is built to be plausible, not fitted to a model: recall on it compares implementations and shows failure modes. It
says nothing about the quality of any model's answers.
"""

import math
from dataclasses import dataclass

import torch

HEAD_DIM = 128
ROPE_DIM = 64
SINK_TOKENS = 64
FP8_MAX = 448.0
NUM_TOPICS = 48
MEAN_SEGMENT = 192
TOKENS_PER_NEEDLE = 512
NEEDLE_TOKENS = 8
ACTIVE_TOPICS = 3
ACTIVE_NEEDLES = 4
ROWS_PER_SHIFT = 3  # consecutive rows with the same interests; not a multiple of a group
# Shares of the heads by role; the rest are topic heads.
NEEDLE_HEADS, LOCAL_HEADS, SINK_HEADS = 0.15, 0.15, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticCase:
    """One request's keys and its last rows, as `select_ragged` takes them.

    q [M, H, 128] fp8 e4m3; weights [M, H] f32 (gate, q scale and softmax scale folded in); k [N, 128] fp8 e4m3;
    k_scale [N] f32; ks, ke [M] int32; needles [M, 4 * 8] int64: the tokens of the needles each row looks for.
    """

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    needles: torch.Tensor

    def to(self, device: torch.device | str) -> "SyntheticCase":
        """The same case on another device."""
        return SyntheticCase(*(getattr(self, name).to(device) for name in self.__slots__))


def quantise_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] f32 -> (fp8 e4m3 [..., D], scale [...] f32); scale = max(1e-4, max|x|) / 448, as SGLang does it."""
    scale = x.abs().amax(dim=-1).clamp_min(1e-4) / FP8_MAX
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def make_case(context: int, rows: int = 32, heads: int = 64, seed: int = 0) -> SyntheticCase:
    """The last `rows` query rows of a prompt of `context` tokens, on the CPU, the same for the same arguments.

    Row i sees the keys [0, context - rows + i + 1). Raises ValueError unless 0 < rows <= context and heads > 0.
    """
    if heads < 1:
        raise ValueError(f"heads={heads} must be at least 1")
    if not 0 < rows <= context:
        raise ValueError(f"rows={rows} must be between 1 and context={context}")
    generator = torch.Generator().manual_seed(seed)
    topics = _directions(NUM_TOPICS, generator)
    needle_kind, sink = _directions(2, generator)
    position_base = _normal((ROPE_DIM,), generator) / math.sqrt(ROPE_DIM)

    slots = torch.randperm(max(1, context // NEEDLE_TOKENS), generator=generator)
    slots = slots[: max(ACTIVE_NEEDLES, context // TOKENS_PER_NEEDLE)]
    needles = (slots[:, None] * NEEDLE_TOKENS + torch.arange(NEEDLE_TOKENS)).clamp_max(context - 1)
    needle_keys = 0.6 * needle_kind + _directions(len(needles), generator)
    keys = _keys(context, topics, needles, needle_keys, sink, position_base, generator)

    interests = _row_interests(rows, NUM_TOPICS, ACTIVE_TOPICS, generator)
    wanted = _row_interests(rows, len(needles), min(ACTIVE_NEEDLES, len(needles)), generator)
    roles = _head_roles(heads)
    queries = _queries(
        roles,
        topics[interests],
        needle_keys[wanted],
        sink,
        position_base,
        torch.arange(context - rows, context),
        generator,
    )
    gates = _gates(rows, roles, generator)

    q, q_scale = quantise_fp8(_hadamard(queries))
    k, k_scale = quantise_fp8(_hadamard(keys))
    return SyntheticCase(
        q=q,
        weights=gates * q_scale * (HEAD_DIM * heads) ** -0.5,
        k=k,
        k_scale=k_scale,
        ks=torch.zeros(rows, dtype=torch.int32),
        ke=torch.arange(context - rows + 1, context + 1, dtype=torch.int32),
        needles=needles[wanted].flatten(1),
    )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _directions(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, content dims] random unit vectors."""
    return torch.nn.functional.normalize(_normal((count, HEAD_DIM - ROPE_DIM), generator), dim=-1)


def _rotate(base: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE: base [..., 64] turned by its position, [*positions, 64]."""
    frequencies = 10000.0 ** (-torch.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    angles = positions[:, None] * frequencies
    even, odd = base[..., 0::2], base[..., 1::2]
    return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Hadamard transform that DSA indexers apply before quantising; it changes no product."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < HEAD_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return x @ (matrix / math.sqrt(HEAD_DIM))


def _keys(
    context: int,
    topics: torch.Tensor,
    needles: torch.Tensor,
    needle_keys: torch.Tensor,
    sink: torch.Tensor,
    position_base: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """[N, 128] f32 keys: the turned base in the first half; topic, segment and noise in the second."""
    starts = torch.rand(context, generator=generator) < 1.0 / MEAN_SEGMENT
    segment = starts.cumsum(0)
    num_segments = int(segment[-1]) + 1
    topic_of_segment = torch.randint(NUM_TOPICS, (num_segments,), generator=generator)
    segment_part = 0.5 * _directions(num_segments, generator)
    content = topics[topic_of_segment[segment]] + segment_part[segment] + 0.7 * _directions(context, generator)
    own = 0.4 * _directions(needles.numel(), generator).view(*needles.shape, -1)
    content[needles] = 1.2 * needle_keys[:, None] + own
    content[:SINK_TOKENS] += 1.2 * sink
    position = 0.6 * _rotate(position_base, torch.arange(context)) + 0.1 * _normal((context, ROPE_DIM), generator) / 8
    return torch.cat([position, content], dim=-1)


def _row_interests(rows: int, pool: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, count] int64: what each row looks for; one entry changes every ROWS_PER_SHIFT rows."""
    current = torch.randperm(pool, generator=generator)[:count]
    interests = []
    for row in range(rows):
        if row and row % ROWS_PER_SHIFT == 0:
            current = current.clone()
            current[int(torch.randint(count, (1,), generator=generator))] = int(
                torch.randint(pool, (1,), generator=generator)
            )
        interests.append(current)
    return torch.stack(interests)


def _head_roles(heads: int) -> list[str]:
    """One role per head; every role has a head where there are enough of them."""
    roles = ["needle"] * max(1, round(heads * NEEDLE_HEADS)) + ["local"] * max(1, round(heads * LOCAL_HEADS))
    roles += ["sink"] * max(1, round(heads * SINK_HEADS))
    return ["topic"] * max(1, heads - len(roles)) + roles[: heads - 1]


def _queries(
    roles: list[str],
    topics: torch.Tensor,  # [M, 3, content] of each row
    needle_keys: torch.Tensor,  # [M, 4, content] of each row
    sink: torch.Tensor,
    position_base: torch.Tensor,
    positions: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """[M, H, 128] f32: a head asks for one interest of its row in its own words, and for sink and place a little."""
    rows, heads = len(positions), len(roles)
    accents = 0.5 * _directions(heads, generator)
    turned = _rotate(position_base, positions)
    queries = torch.zeros(rows, heads, HEAD_DIM)
    for head, role in enumerate(roles):
        content = accents[head] + 0.3 * sink + 0.6 * _directions(rows, generator)
        if role == "topic":
            content = content + topics[:, head % topics.shape[1]]
        elif role == "needle":
            content = content + 1.5 * needle_keys[:, head % needle_keys.shape[1]]
        elif role == "sink":
            content = content + sink
        queries[:, head, :ROPE_DIM] = turned * (1.5 if role == "local" else 0.3)
        queries[:, head, ROPE_DIM:] = content
    return queries


def _gates(rows: int, roles: list[str], generator: torch.Generator) -> torch.Tensor:
    """[M, H] f32 gates: log-normal per head, so few carry most, modulated per row; one head in ten is negative."""
    heads = len(roles)
    strength = torch.exp(1.1 * _normal((heads,), generator))
    strength[torch.tensor([role == "needle" for role in roles])] *= 1.5
    per_row = torch.exp(0.5 * _normal((rows, heads), generator))
    sign = torch.where(torch.rand(heads, generator=generator) < 0.1, -1.0, 1.0)
    return strength * per_row * sign
