"""Every public function names the argument that is wrong, its value, and what is allowed."""

import re
from dataclasses import replace

import pytest
import torch

from indexer_kernels import select_paged, select_ragged, select_rows
from indexer_kernels.row_plan import plan_decode, plan_extend
from tests.support.inputs import make_batch
from tests.support.small import SMALL

BATCH = make_batch([130, 70], [3, 2], num_heads=4, seed=71)
RAGGED = dict(zip(("q", "weights", "k", "k_scale", "ks", "ke"), BATCH.ragged))
PAGED = dict(zip(("q", "weights", "k_pages", "page_table"), make_batch([130, 70], 1, num_heads=4, seed=72).paged))
PAGED["seq_lens"] = torch.tensor([130, 70], dtype=torch.int32)
ROWS = dict(zip(("q", "weights", "k_pages", "page_table", "plan"), BATCH.paged))
GOOD = {select_ragged: RAGGED, select_paged: PAGED, select_rows: ROWS}
DTYPES = {
    "q": torch.float8_e4m3fn,
    "weights": torch.float32,
    "k": torch.float8_e4m3fn,
    "k_scale": torch.float32,
    "ks": torch.int32,
    "ke": torch.int32,
    "k_pages": torch.uint8,
    "page_table": torch.int32,
    "seq_lens": torch.int32,
}
TENSORS = [(function, name) for function, good in GOOD.items() for name in good if name in DTYPES]
FUNCTIONS = list(GOOD)


def call(function, mode="native", params=SMALL, **changes):
    options = {key: changes.pop(key) for key in ("backend", "output", "top_k_kernel", "out") if key in changes}
    return function(mode, **(GOOD[function] | changes), params=params, **options)


def names(value):
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=names)
def test_the_good_input_is_good(function):
    assert (call(function) >= 0).any()


@pytest.mark.parametrize("function", FUNCTIONS, ids=names)
def test_mode_backend_params(function):
    with pytest.raises(ValueError, match="mode='missa' must be one of .*native.*misa.*group_rerank"):
        call(function, mode="missa")
    with pytest.raises(ValueError, match="mode=None"):
        call(function, mode=None)
    with pytest.raises(ValueError, match="backend='cuda' must be one of .*auto.*reference.*gpu"):
        call(function, backend="cuda")
    with pytest.raises(TypeError, match="params must be IndexerParams, got dict"):
        call(function, params={"top_k": 64})


@pytest.mark.parametrize("function", FUNCTIONS, ids=names)
def test_gpu_backend_refuses_a_cpu_tensor(function):
    with pytest.raises(NotImplementedError, match="q is on cpu"):
        call(function, backend="gpu")


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=names)
@pytest.mark.parametrize("value", [None, [1, 2], 3.0], ids=repr)
def test_not_a_tensor(function, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got {type(value).__name__}"):
        call(function, **{name: value})


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=names)
def test_wrong_dtype(function, name):
    with pytest.raises(TypeError, match=f"^{name} has dtype torch.float16, must be {DTYPES[name]}"):
        call(function, **{name: torch.zeros(GOOD[function][name].shape, dtype=torch.float16)})


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=names)
def test_wrong_rank(function, name):
    good = GOOD[function][name]
    for bad in (good[None], good[0]):
        with pytest.raises(ValueError, match=re.escape(f"{name} has shape {list(bad.shape)}, must be [")):
            call(function, **{name: bad})


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=names)
def test_wrong_device(function, name):
    with pytest.raises(ValueError, match=r" is on (cpu|meta), must be on (cpu|meta)"):
        call(function, **{name: GOOD[function][name].to("meta")})


@pytest.mark.parametrize(("function", "name", "bad"), [
    (select_ragged, "q", torch.zeros(5, 4, 64)),
    (select_ragged, "q", torch.zeros(5, 0, 128)),
    (select_ragged, "weights", torch.zeros(5, 3)),
    (select_ragged, "weights", torch.zeros(4, 4)),
    (select_ragged, "weights", torch.zeros(5, 4, 1)),
    (select_ragged, "k", torch.zeros(200, 64)),
    (select_ragged, "k_scale", torch.zeros(199)),
    (select_ragged, "k_scale", torch.zeros(200, 1)),
    (select_ragged, "ks", torch.zeros(4)),
    (select_ragged, "ke", torch.zeros(6)),
    (select_paged, "k_pages", torch.zeros(9, 8192)),
    (select_paged, "page_table", torch.zeros(3, 6)),
    (select_paged, "seq_lens", torch.zeros(3)),
    (select_rows, "k_pages", torch.zeros(9, 64 * 132 + 4)),
    (select_rows, "page_table", torch.zeros(1, 6)),
], ids=names)  # fmt: skip
def test_wrong_shape(function, name, bad):
    with pytest.raises(ValueError, match=f"^{name} has shape {re.escape(str(list(bad.shape)))}"):
        call(function, **{name: bad.to(DTYPES[name])})


def test_ranges_outside_the_keys():
    with pytest.raises(ValueError, match="^ks has -1, must not be negative"):
        call(select_ragged, ks=RAGGED["ks"] - 1)
    with pytest.raises(ValueError, match="^ke has 201, must be at most the 200 keys of k"):
        call(select_ragged, ke=RAGGED["ke"] + 1)


def test_lengths_the_page_table_cannot_reach():
    reach = PAGED["page_table"].shape[1] * 64
    with pytest.raises(ValueError, match=f"^seq_lens has {reach + 1}, must be at most the {reach} tokens"):
        call(select_paged, seq_lens=torch.tensor([reach + 1, 70], dtype=torch.int32))
    with pytest.raises(ValueError, match=f"plan.row_lengths has .* at most the {reach} tokens"):
        call(select_rows, plan=plan_extend([reach, 0], [3, 2]))


def test_page_ids_outside_the_pool():
    for bad in (-1, len(BATCH.k_pages), -(2**31)):
        table = BATCH.page_table.clone()
        table[1, 0] = bad
        with pytest.raises(
            ValueError, match=f"^page_table has page id {bad}, must be in 0 .. {len(BATCH.k_pages) - 1}"
        ):
            call(select_rows, page_table=table)


def test_pages_with_gaps():
    wide = torch.zeros((len(BATCH.k_pages), 9000), dtype=torch.uint8)
    with pytest.raises(ValueError, match="^k_pages must be contiguous, got strides"):
        call(select_rows, k_pages=wide[:, :8448])


def test_plan():
    with pytest.raises(TypeError, match="^plan must be a RowPlan, got NoneType"):
        call(select_rows, plan=None)
    with pytest.raises(ValueError, match="^q has 5 rows, must have at least the plan's 6"):
        call(select_rows, plan=plan_extend([127, 68], [4, 2]))
    with pytest.raises(ValueError, match="^plan.row_request spans 0 .. 7"):
        call(select_rows, plan=replace(BATCH.plan, row_request=BATCH.plan.row_request * 7))
    with pytest.raises(ValueError, match="^plan is on meta, must be on cpu"):
        call(select_rows, plan=plan_extend([127, 68], [3, 2], device="meta"))


def test_output_top_k_kernel_out():
    with pytest.raises(ValueError, match="output='slots' must be one of .*position.*slot"):
        call(select_rows, output="slots")
    with pytest.raises(TypeError, match="top_k_kernel must be callable or None, got str"):
        call(select_rows, top_k_kernel="torch")
    with pytest.raises(TypeError, match="out has dtype torch.int64, must be torch.int32"):
        call(select_rows, out=torch.zeros(5, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("out has shape [5, 63], must be [any, 64]")):
        call(select_rows, out=torch.zeros(5, 63, dtype=torch.int32))
    with pytest.raises(ValueError, match="out has 4 rows, must have at least the plan's 5"):
        call(select_rows, out=torch.zeros(4, 64, dtype=torch.int32))
    # group_rerank's last kernel would have written 64 columns a row, whatever lies between the rows.
    with pytest.raises(ValueError, match=re.escape("out must be contiguous, got strides (128, 1)")):
        call(select_rows, out=torch.zeros(5, 128, dtype=torch.int32)[:, :64])


def test_plans():
    with pytest.raises(ValueError, match="prefix_lengths has 1 entries, extend_lengths 2"):
        plan_extend([1], [1, 2])
    with pytest.raises(ValueError, match=re.escape("prefix_lengths=[-1] must not be negative")):
        plan_extend([-1], [1])
    with pytest.raises(ValueError, match=re.escape("extend_lengths=[-2] must not be negative")):
        plan_extend([1], [-2])
    with pytest.raises(ValueError, match="row_lengths must be int32 .*int64"):
        plan_decode(torch.tensor([3]), 1)
    with pytest.raises(ValueError, match="row_lengths must be int32 "):
        plan_decode(torch.zeros((2, 2), dtype=torch.int32), 1)
