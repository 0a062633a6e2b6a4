"""Scores of keys against query heads.

Dot products are summed in float64, where a sum of 128 products of fp8 values is exact, and rounded to float32 once. So
the score of a row and a key is the same number whatever else is in the call, and a re-ranked score is bitwise native's.
"""

import torch


def token_scores(q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """s[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n])  (DeepSeek-V3.2, the lightning indexer).

    q [M, H, D], weights [M, H], k [N, D], k_scale [N] in any float dtype, heads added in their order in float32 ->
    f32 [M, N]. H may be the model's heads or the few routed ones. A NaN key makes its own column NaN and no other.
    """
    keys = k.double()
    total = torch.zeros((q.shape[0], k.shape[0]), dtype=torch.float32, device=q.device)
    for head in range(q.shape[1]):
        total += torch.relu((q[:, head].double() @ keys.T).float()) * weights[:, head, None].float()
    return total * k_scale.float()


def block_scores(q: torch.Tensor, weights: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """t[m, b] = sum_h weights[m, h] * relu(q[m, h] . kbar[b]): f32 [M, B] (HISA, arXiv 2603.28458, block stage)."""
    return token_scores(q, weights, means, means.new_ones(means.shape[0]))


def page_maxima(scores: torch.Tensor, visible: torch.Tensor, page: int) -> torch.Tensor:
    """Best visible score of each `page` tokens: scores [M, N], visible [M, N] bool -> f32 [M, ceil(N / page)]."""
    num_rows, num_tokens = scores.shape
    padded = scores.new_full((num_rows, -(-num_tokens // page) * page), float("-inf"))
    padded[:, :num_tokens] = torch.where(visible, scores, float("-inf"))
    return padded.view(num_rows, -1, page).amax(dim=2)
