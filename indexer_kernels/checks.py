"""What every public function checks at its door. Shapes and dtypes only: nothing here waits for a GPU."""

import torch

from indexer_kernels.page_layout import HEAD_DIM, PAGE_BYTES, PAGE_TOKENS
from indexer_kernels.params import MODES, IndexerParams
from indexer_kernels.row_plan import RowPlan

BACKENDS = ("auto", "reference", "gpu")
OUTPUTS = ("position", "slot")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {allowed}")


def check_tensor(
    name: str,
    tensor: object,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
    like: str = "q",
) -> None:
    """TypeError or ValueError unless tensor has this dtype, shape (None: any size) and device (None: any)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be {dtype}")
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, must be [{wanted}]")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device} like {like}")


def check_backend(backend: object) -> None:
    """One of BACKENDS."""
    check_choice("backend", backend, BACKENDS)


def check_call(mode: object, backend: object, params: object) -> None:
    """The arguments that all selecting functions share."""
    check_choice("mode", mode, MODES)
    check_backend(backend)
    if not isinstance(params, IndexerParams):
        raise TypeError(f"params must be IndexerParams, got {type(params).__name__}")


def check_queries(q: torch.Tensor, weights: torch.Tensor, num_rows: int | None = None) -> None:
    """q [M, H, 128] fp8 e4m3 and weights [M, H] f32, with at least num_rows rows; H at least 1."""
    check_tensor("q", q, torch.float8_e4m3fn, (None, None, HEAD_DIM))
    if q.shape[1] < 1:
        raise ValueError(f"q has shape {list(q.shape)}, must have at least one head")
    check_tensor("weights", weights, torch.float32, (q.shape[0], q.shape[1]), q.device)
    if num_rows is not None and q.shape[0] < num_rows:
        raise ValueError(f"q has {q.shape[0]} rows, must have at least the plan's {num_rows}")


def check_pages(k_pages: torch.Tensor, page_table: torch.Tensor, num_requests: int | None, q: torch.Tensor) -> None:
    """k_pages [P, 8448] uint8 (contiguous) and page_table [R, W] int32."""
    check_key_pages(k_pages, q.device)
    check_tensor("page_table", page_table, torch.int32, (num_requests, None), q.device)


def check_key_pages(k_pages: torch.Tensor, device: torch.device | None) -> None:
    """k_pages [P, 8448] uint8, contiguous."""
    check_tensor("k_pages", k_pages, torch.uint8, (None, PAGE_BYTES), device)
    if not k_pages.is_contiguous():
        raise ValueError(f"k_pages must be contiguous, got strides {k_pages.stride()}")


def check_means(name: str, means: object, k_pages: torch.Tensor) -> None:
    """means [P, 128] bfloat16, contiguous, of the P pages of k_pages."""
    check_tensor(name, means, torch.bfloat16, (k_pages.shape[0], HEAD_DIM), k_pages.device, like="k_pages")
    assert isinstance(means, torch.Tensor)
    if not means.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {means.stride()}")


def check_reach(name: str, lengths: torch.Tensor, page_table: torch.Tensor) -> None:
    """Where lengths are on the CPU, none may need more pages than page_table [R, W] has columns."""
    reach = page_table.shape[1] * PAGE_TOKENS
    if lengths.device.type == "cpu" and lengths.numel() and int(lengths.max()) > reach:
        raise ValueError(f"{name} has {int(lengths.max())}, must be at most the {reach} tokens page_table reaches")


def check_plan(plan: RowPlan, k_pages: torch.Tensor, page_table: torch.Tensor) -> None:
    """The plan is on the tables' device; on the CPU its rows have table rows, and the pages they need exist."""
    if plan.row_lengths.device != page_table.device:
        raise ValueError(f"plan is on {plan.row_lengths.device}, must be on {page_table.device} like page_table")
    if page_table.device.type != "cpu" or not plan.num_rows:
        return
    check_reach("plan.row_lengths", plan.row_lengths, page_table)
    requests = plan.row_request
    if int(requests.min()) < 0 or int(requests.max()) >= page_table.shape[0]:
        raise ValueError(
            f"plan.row_request spans {int(requests.min())} .. {int(requests.max())}, page_table has "
            f"{page_table.shape[0]} rows"
        )
    check_page_ids(k_pages, page_table, plan.request_lengths)


def check_page_ids(k_pages: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor) -> None:
    """On the CPU, the pages that lengths [R] need exist."""
    if page_table.device.type != "cpu":
        return
    column = torch.arange(page_table.shape[1]) * PAGE_TOKENS
    needed = page_table[column < lengths[:, None]]
    bad = needed[(needed < 0) | (needed >= k_pages.shape[0])]
    if len(bad):
        raise ValueError(f"page_table has page id {int(bad[0])}, must be in 0 .. {k_pages.shape[0] - 1} (k_pages)")


def check_ranges(ks: torch.Tensor, ke: torch.Tensor, num_rows: int, num_keys: int, device: torch.device) -> None:
    """ks and ke [M] int32; where they are on the CPU, also 0 <= ks and ke <= N."""
    check_tensor("ks", ks, torch.int32, (num_rows,), device)
    check_tensor("ke", ke, torch.int32, (num_rows,), device)
    if ks.device.type == "cpu" and num_rows:
        if int(ks.min()) < 0:
            raise ValueError(f"ks has {int(ks.min())}, must not be negative")
        if int(ke.max()) > num_keys:
            raise ValueError(f"ke has {int(ke.max())}, must be at most the {num_keys} keys of k")
