"""All-head scores of chosen pages with DeepGEMM, the same kernel SGLang's decode runs."""

import deep_gemm
import torch

from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS


def paged_logits(
    q: torch.Tensor, weights: torch.Tensor, k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """out[m, i] = scale[j] * sum_h weights[m, h] * relu(q[m, h] . key[j]), j the i-th token of row m's own page list.

    q [M, H, 128] fp8, weights [M, H] f32, k_pages [P, 8448] uint8, page_table [M, W] int32, lengths [M] int32 >= 1.
    Returns f32 [M, 64 W] (a view with a padded row stride); columns past lengths[m] hold anything.
    """
    context = lengths[:, None]
    schedule = deep_gemm.get_paged_mqa_logits_metadata(context, PAGE_TOKENS, deep_gemm.get_num_sms())
    return deep_gemm.fp8_paged_mqa_logits(
        q[:, None],
        k_pages.view(-1, PAGE_TOKENS, 1, HEAD_DIM + 4),
        weights,
        context,
        page_table,
        schedule,
        page_table.shape[1] * PAGE_TOKENS,
        clean_logits=False,
    )
