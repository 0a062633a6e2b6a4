"""Bad input of every public function is refused at the door, by the name of the argument."""

from dataclasses import replace

import pytest
import torch

from indexer_kernels import MODES, IndexerParams, select_paged, select_ragged, select_rows
from tests.support.inputs import make_batch
from tests.support.small import SMALL

BATCH = make_batch([200, 130], [3, 2], num_heads=4)
RAGGED = dict(zip(("q", "weights", "k", "k_scale", "ks", "ke"), BATCH.ragged))
ROWS = dict(zip(("q", "weights", "k_pages", "page_table", "plan"), BATCH.paged))
PAGED = {name: ROWS[name] for name in ("k_pages", "page_table")} | {
    "q": BATCH.q[:2],
    "weights": BATCH.weights[:2],
    "seq_lens": torch.tensor([200, 130], dtype=torch.int32),
}
CALLS = {
    "select_ragged": (select_ragged, RAGGED),
    "select_paged": (select_paged, PAGED),
    "select_rows": (select_rows, ROWS),
}
TENSORS = [(call, name) for call, (_, given) in CALLS.items() for name in given if name != "plan"]


def run(call, **changes):
    function, given = CALLS[call]
    return function(**({"mode": "native", "params": SMALL} | given | changes))


@pytest.mark.parametrize("call", CALLS)
def test_the_unchanged_calls_are_good(call):
    assert run(call).shape[1] == SMALL.top_k


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (ValueError, {"mode": "hybrid"}),
        (ValueError, {"mode": None}),
        (ValueError, {"backend": "cuda"}),
        (TypeError, {"params": {"top_k": 64}}),
        (TypeError, {"params": IndexerParams}),
    ],
    ids=str,
)
def test_choices(call, error, changes):
    with pytest.raises(error, match=f"^{next(iter(changes))}\\b"):
        run(call, **changes)


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_not_a_tensor(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list"):
        run(call, **{name: [1, 2, 3]})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_wrong_dtype(call, name):
    with pytest.raises(TypeError, match=f"^{name} has dtype torch.float16"):
        run(call, **{name: CALLS[call][1][name].float().half()})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_wrong_rank(call, name):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        run(call, **{name: CALLS[call][1][name][None]})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_other_device(call, name):
    if name == "q":
        return  # the others are compared with it
    with pytest.raises(ValueError, match=f"^{name} is on meta, must be on cpu like q"):
        run(call, **{name: CALLS[call][1][name].to("meta")})


@pytest.mark.parametrize(
    ("call", "name", "bad"),
    [
        ("select_ragged", "q", BATCH.q[..., :64]),
        ("select_ragged", "q", BATCH.q[:, :0]),
        ("select_ragged", "weights", BATCH.weights[:4]),
        ("select_ragged", "weights", BATCH.weights[:, :3]),
        ("select_ragged", "k", BATCH.k_all[:, :64]),
        ("select_ragged", "k_scale", BATCH.k_scale_all[:-1]),
        ("select_ragged", "ks", BATCH.ks[:-1]),
        ("select_ragged", "ke", BATCH.ke[:-1]),
        ("select_paged", "page_table", BATCH.page_table[:1]),
        ("select_paged", "seq_lens", PAGED["seq_lens"][:1]),
        ("select_paged", "k_pages", BATCH.k_pages[:, :8192]),
        ("select_rows", "q", BATCH.q[..., :64]),
        ("select_rows", "weights", BATCH.weights[:, :3]),
        ("select_rows", "page_table", BATCH.page_table[:1]),
        ("select_rows", "k_pages", BATCH.k_pages[:, :8192]),
    ],
)
def test_wrong_size(call, name, bad):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        run(call, **{name: bad})


@pytest.mark.parametrize("call", ["select_paged", "select_rows"])
def test_pages_are_contiguous(call):
    with pytest.raises(ValueError, match="^k_pages must be contiguous"):
        run(call, k_pages=BATCH.k_pages[::2])


def test_ranges_stay_inside_the_keys():
    with pytest.raises(ValueError, match="^ks has -1"):
        run("select_ragged", ks=BATCH.ks - torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match="^ke has 331, must be at most the 330 keys"):
        run("select_ragged", ke=BATCH.ke + torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32))


def test_lengths_stay_inside_the_table():
    reach = BATCH.page_table.shape[1] * 64
    with pytest.raises(ValueError, match=f"^seq_lens has {reach + 1}, must be at most the {reach} tokens"):
        run("select_paged", seq_lens=torch.tensor([reach + 1, 130], dtype=torch.int32))
    with pytest.raises(ValueError, match="^plan.row_lengths has 200, must be at most the 192 tokens"):
        run("select_rows", page_table=BATCH.page_table[:, :3].contiguous())


@pytest.mark.parametrize("page", [-1, 2**30, len(BATCH.k_pages)])
@pytest.mark.parametrize("call", ["select_paged", "select_rows"])
def test_needed_pages_exist(call, page):
    table = BATCH.page_table.clone()
    table[1, 2] = page  # 130 tokens reach into the third page
    with pytest.raises(ValueError, match=f"^page_table has page id {page}, must be in 0 .. {len(BATCH.k_pages) - 1} "):
        run(call, page_table=table)


def test_plan():
    with pytest.raises(TypeError, match="^plan must be a RowPlan, got dict"):
        run("select_rows", plan={})
    with pytest.raises(ValueError, match="^plan is on meta, must be on cpu"):
        run("select_rows", plan=replace(BATCH.plan, row_lengths=BATCH.plan.row_lengths.to("meta")))
    for request in (-1, 2):
        rows = BATCH.plan.row_request.clone()
        rows[3] = request
        with pytest.raises(ValueError, match="^plan.row_request spans .* page_table has 2 rows"):
            run("select_rows", plan=replace(BATCH.plan, row_request=rows))
    with pytest.raises(ValueError, match="^q has 4 rows, must have at least the plan's 5"):
        run("select_rows", q=BATCH.q[:4], weights=BATCH.weights[:4])


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (TypeError, torch.empty((5, SMALL.top_k), dtype=torch.int64)),
        (TypeError, []),
        (ValueError, torch.empty((5, SMALL.top_k + 1), dtype=torch.int32)),
        (ValueError, torch.empty((4, SMALL.top_k), dtype=torch.int32)),
        (ValueError, torch.empty((5, SMALL.top_k), dtype=torch.int32, device="meta")),
    ],
    ids=["dtype", "list", "columns", "rows", "device"],
)
def test_out(error, out):
    with pytest.raises(error, match="^out "):
        run("select_rows", out=out)


def test_output_and_kernel():
    with pytest.raises(ValueError, match="^output='offset' must be one of"):
        run("select_rows", output="offset")
    with pytest.raises(TypeError, match="^top_k_kernel must be callable"):
        run("select_rows", top_k_kernel="torch")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_gpu_backend_says_why_it_refuses(call, mode):
    with pytest.raises(NotImplementedError, match=f"^backend='gpu', mode='{mode}': q is on cpu"):
        run(call, mode=mode, backend="gpu")
    assert torch.equal(run(call, mode=mode, backend="auto"), run(call, mode=mode, backend="reference"))
