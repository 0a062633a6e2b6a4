"""What the gpu backend answers before any kernel runs."""

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.gpu import pipeline
from indexer_kernels.params import MODES
from indexer_kernels.row_plan import plan_rows
from tests.support.inputs import make_batch


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_see_nothing_select_nothing(mode):
    """No kernel is launched, which would fail on this CPU; rows of out past the plan's are left alone."""
    batch, params = make_batch([130], [3], seed=2), IndexerParams()
    plan = plan_rows(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1)
    tensors = (batch.q, batch.weights, batch.k_pages, batch.page_table, plan, params)
    out = torch.full((4, params.top_k), 7, dtype=torch.int32)
    assert pipeline.select_rows(mode, *tensors, out=out) is out
    assert (out[:3] == -1).all() and (out[3] == 7).all()
    assert torch.equal(out[:3], select_rows(mode, *tensors, backend="reference"))
