"""A plan goes to a busy GPU without the host standing still behind its work."""

import pytest
import torch

from indexer_kernels.row_plan import plan_extend

pytestmark = pytest.mark.gpu


def test_a_plan_is_made_while_the_gpu_is_at_work():
    plan_extend([0], [8192], "cuda")  # pinned memory is there before
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # two seconds
    busy = torch.cuda.Event()
    busy.record()
    plan = plan_extend([100], [8192], "cuda")
    assert not busy.query(), "the host waited for the GPU"
    torch.cuda.synchronize()
    assert torch.equal(plan.row_lengths.cpu(), torch.arange(101, 101 + 8192, dtype=torch.int32))
