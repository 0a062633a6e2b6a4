"""All-head scores of chosen pages with DeepGEMM, the same kernel SGLang's decode runs.

DeepGEMM compiles its scheduler anew for every number of rows (in steps of 32), seconds each and in the middle of
serving: chunks of a prompt have any length. So calls have at most MOST_ROWS rows and are padded to a power of two:
seven variants in all, which DeepGEMM keeps on disk. Not so in decode, where one schedule serves all layers, of a number
of rows for which SGLang has DeepGEMM make a schedule, too.
"""

from collections.abc import Iterator

import deep_gemm
import torch

from indexer_kernels.gpu import work
from indexer_kernels.gpu.target import HEAD_DIM, PAGE_TOKENS
from indexer_kernels.page_layout import PAGE_BYTES

MOST_ROWS = 2048
LEAST_ROWS = 32


def padded_rows(num_rows: int) -> int:
    """The power of two, at least LEAST_ROWS, that num_rows rows are padded to."""
    return max(LEAST_ROWS, 1 << max(0, num_rows - 1).bit_length())


def row_slices(num_rows: int, table_width: int) -> Iterator[slice]:
    """Slices of num_rows rows for `paged_logits`, over page tables of table_width pages: at most a power of two, so
    that what the padding adds fits SCRATCH_BYTES, too.
    """
    row_bytes = table_width * PAGE_TOKENS * 4
    fitting = max(1, work.SCRATCH_BYTES // row_bytes)
    return work.slices(num_rows, row_bytes, most=min(MOST_ROWS, 1 << (fitting.bit_length() - 1)))


def paged_schedule(lengths: torch.Tensor) -> torch.Tensor:
    """How DeepGEMM shares out rows of these lengths [M] int32 >= 1, for `paged_logits`."""
    return deep_gemm.get_paged_mqa_logits_metadata(lengths[:, None], PAGE_TOKENS, deep_gemm.get_num_sms())


def paged_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    schedule: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[m, i] = scale[j] * sum_h weights[m, h] * relu(q[m, h] . key[j]), j the i-th token of row m's own page list.

    q [M, H, 128] fp8, weights [M, H] f32, k_pages [P, 8448] uint8, page_table [M, W] int32, lengths [M] int32 >= 1, M
    at most MOST_ROWS, schedule: `paged_schedule(lengths)`, where it is at hand. Returns f32 [M, 64 W] (a view with a
    padded row stride); columns past lengths[m] hold anything.
    """
    num_rows = q.shape[0]
    padded = padded_rows(num_rows) if schedule is None else num_rows
    if padded != num_rows:
        # The last row again, of which one token is scored. fp8 tensors cannot be indexed, their bytes can.
        row = torch.arange(padded, device=q.device).clamp_max(num_rows - 1)
        q = q.view(torch.uint8)[row].view(torch.float8_e4m3fn)
        weights, page_table = weights[row], page_table[row]
        lengths = torch.nn.functional.pad(lengths, (0, padded - num_rows), value=1)
    if schedule is None:
        schedule = paged_schedule(lengths)
    width = page_table.shape[1] * PAGE_TOKENS
    logits = deep_gemm.fp8_paged_mqa_logits(
        q[:, None],
        k_pages.view(-1, PAGE_TOKENS, 1, HEAD_DIM + 4),
        weights,
        lengths[:, None],
        page_table,
        schedule,
        width,
        clean_logits=False,
    )[:num_rows]
    if padded == 1:  # DLPack, which DeepGEMM returns through, gives the stride of a lone row as 1; top-k looks at it
        logits = logits.as_strided((1, width), (width, 1))
    return logits


def contiguous_logits(
    q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The same scores over keys that lie one after the other, every row from the first key on: what SGLang's prefill
    runs, and what the modes are measured against.

    q [M, H, 128] fp8, weights [M, H] f32, k [N, 128] fp8, k_scale [N] f32, lengths [M] int32. f32 [M, N]; columns past
    lengths[m] hold anything.
    """
    return deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, torch.zeros_like(lengths), lengths, clean_logits=False)


def compile_schedulers(num_heads: int, device: torch.device | str = "cuda") -> None:
    """One call of every number of rows, over a page of zeros: seconds each where DeepGEMM has not kept the variant."""
    rows, pages = LEAST_ROWS, torch.zeros((1, PAGE_BYTES), dtype=torch.uint8, device=device)
    while rows <= MOST_ROWS:
        q = torch.zeros((rows, num_heads, HEAD_DIM), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        table = torch.zeros((rows, 4), dtype=torch.int32, device=device)
        lengths = torch.ones(rows, dtype=torch.int32, device=device)
        paged_logits(q, torch.zeros((rows, num_heads), dtype=torch.float32, device=device), pages, table, lengths)
        rows *= 2
