"""Rows are padded to few sizes before DeepGEMM sees them: it compiles a scheduler for every size."""

import types

import pytest
import torch

pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams
from indexer_kernels.gpu import deep_gemm_logits
from indexer_kernels.gpu.work import SCRATCH_BYTES, slices
from indexer_kernels.page_layout import unpack_pages
from indexer_kernels.reference.scores import token_scores
from tests.support.inputs import make_batch
from tests.support.model_building import default_dtype


def test_few_sizes_for_all_batches():
    sizes = {deep_gemm_logits.padded_rows(rows) for rows in range(1, deep_gemm_logits.MOST_ROWS + 1)}
    assert sizes == {32, 64, 128, 256, 512, 1024, 2048}
    assert all(deep_gemm_logits.padded_rows(rows) >= rows for rows in range(1, deep_gemm_logits.MOST_ROWS + 1))


def test_slices_keep_to_the_most_rows():
    found = list(slices(5000, 1, most=2048))
    assert found == [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)]


@pytest.mark.parametrize("tokens", [64, 131072, 200_000, 245_000, 490_000, 524_288])
def test_padded_scores_fit_the_scratch(tokens):
    """At 490,000 tokens 513 rows fit, which would be padded to 1024: twice the scratch."""
    found = list(deep_gemm_logits.row_slices(5000, tokens // 64))
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])] and found[-1].stop == 5000
    for part in found:
        rows = part.stop - part.start
        assert rows <= deep_gemm_logits.MOST_ROWS
        assert deep_gemm_logits.padded_rows(rows) * (tokens // 64) * 64 * 4 <= SCRATCH_BYTES


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each call. DeepGEMM is played by the reference; a schedule is the number of its rows."""
    calls = []

    def fp8_paged_mqa_logits(q, pages, weights, context, table, schedule, width, clean_logits):
        calls.append(q.shape[0])
        assert q.shape[0] == weights.shape[0] == context.shape[0] == table.shape[0] == schedule
        assert context.dtype == torch.int32 and int(context.min()) >= 1 and not clean_logits
        scores = torch.full((q.shape[0], width), float("nan"))
        for row, length in enumerate(context[:, 0].tolist()):
            k, k_scale = unpack_pages(pages.view(torch.uint8).view(-1, 8448)[table[row].long()], length)
            scores[row, :length] = token_scores(q[row], weights[row : row + 1], k, k_scale)[0]
        return scores.as_strided(scores.shape, (1, 1)) if len(scores) == 1 else scores

    fake = types.SimpleNamespace(
        get_num_sms=lambda: 132,
        get_paged_mqa_logits_metadata=lambda context, page, sms: context.shape[0],
        fp8_paged_mqa_logits=fp8_paged_mqa_logits,
    )
    monkeypatch.setattr(deep_gemm_logits, "deep_gemm", fake)
    return calls


@pytest.mark.parametrize("num_rows", [1, 5, 32, 33])
@pytest.mark.parametrize("scheduled", [False, True])
def test_padding_changes_no_score(calls, num_rows, scheduled):
    """What DeepGEMM is handed is well-formed, and the caller's rows come back; with a schedule, nothing is padded."""
    batch = make_batch([200], [num_rows], seed=1)
    lengths = batch.plan.row_lengths
    table = batch.page_table[batch.plan.row_request.long(), :4]
    schedule = deep_gemm_logits.paged_schedule(lengths) if scheduled else None
    got = deep_gemm_logits.paged_logits(batch.q, batch.weights, batch.k_pages, table, lengths, schedule)
    assert calls == [num_rows if scheduled else max(32, 1 << (num_rows - 1).bit_length())]
    assert got.shape == (num_rows, 256) and got.stride(0) % 4 == 0, "top-k looks at the stride of a lone row, too"
    want = token_scores(batch.q, batch.weights, batch.k[0], batch.k_scale[0])
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(got[row, :length], want[row, :length])


def test_every_size_is_compiled_ahead_while_sglang_builds_the_model(monkeypatch):
    seen = []
    fake = types.SimpleNamespace(
        get_num_sms=lambda: 132,
        get_paged_mqa_logits_metadata=lambda context, page, sms: None,
        fp8_paged_mqa_logits=lambda q, _, weights, *__, **___: (
            seen.append((tuple(q.shape), weights.dtype)) or torch.empty(q.shape[0], 256)
        ),
    )
    monkeypatch.setattr(deep_gemm_logits, "deep_gemm", fake)
    with default_dtype(torch.bfloat16):
        deep_gemm_logits.compile_schedulers(32, "cpu")
    assert seen == [((rows, 1, 32, 128), torch.float32) for rows in (32, 64, 128, 256, 512, 1024, 2048)]


@pytest.mark.parametrize(
    ("mode", "unit", "needed"),
    [
        ("hisa", "token", True),
        ("group_rerank", "token", False),
        ("misa_rerank", "page", True),
        ("misa_rerank", "token", False),
        ("misa", "token", False),
        ("native", "token", True),
    ],
)
def test_schedulers_are_compiled_for_the_modes_that_call_deep_gemm(monkeypatch, mode, unit, needed):
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    from indexer_kernels.gpu.compile_check import kernel_builders

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ("DeepGEMM schedulers" in kernel_builders(IndexerParams(candidate_unit=unit), 64, (mode,))) == needed
