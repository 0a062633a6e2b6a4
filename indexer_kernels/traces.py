"""Traces: the queries, gates, keys and scales that the indexer of a served model really saw, kept in .npz files.

Random tensors say nothing about quality; recall on a trace says what a mode finds of what that model looks for.
A file is compressed and holds no pickle; fp8 tensors are stored as their bytes.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
import torch

from indexer_kernels.checks import check_queries, check_tensor
from indexer_kernels.page_layout import HEAD_DIM

VERSION = 1
TENSORS = ("q", "weights", "k", "k_scale", "positions")
FP8_TENSORS = ("q", "k")
DESCRIPTION = ("model", "layer", "context", "prompt")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Some query rows of one layer over all keys of one prompt.

    model, layer, context   name of the model, its layer, tokens of the prompt
    q          [M, H, 128] float8_e4m3fn
    weights    [M, H] float32: head gate, query scale and softmax scale in one
    k          [N, 128] float8_e4m3fn, k_scale [N] float32: all keys of the prompt, N = context
    positions  [M] int64: row i sees tokens 0 .. positions[i]
    prompt     how the prompt was made: a sentence, or an object that JSON can hold

    Raises TypeError or ValueError naming the field.
    """

    model: str
    layer: int
    context: int
    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    positions: torch.Tensor
    prompt: str | dict[str, Any]

    def __post_init__(self) -> None:
        check_queries(self.q, self.weights)
        check_tensor("k", self.k, torch.float8_e4m3fn, (self.context, HEAD_DIM), self.q.device)
        check_tensor("k_scale", self.k_scale, torch.float32, (self.context,), self.q.device)
        check_tensor("positions", self.positions, torch.int64, (self.q.shape[0],), self.q.device)
        if self.positions.numel() and not 0 <= int(self.positions.min()) <= int(self.positions.max()) < self.context:
            raise ValueError(f"positions={self.positions.tolist()} must be in 0 .. {self.context - 1}")

    @property
    def nominal_context(self) -> int:
        """The context rounded to 2^n or 1.5 * 2^n: prompts of about one length are averaged under it."""
        power = 1 << max(self.context.bit_length() - 1, 1)
        return min((power, power * 3 // 2, power * 2), key=lambda length: abs(length - self.context))

    def case(self) -> tuple[torch.Tensor, ...]:
        """q, weights, k, k_scale, ks, ke as `select_ragged` takes them."""
        ke = (self.positions + 1).int()
        return self.q, self.weights, self.k, self.k_scale, torch.zeros_like(ke), ke

    def to(self, device: torch.device | str) -> "Trace":
        """The same trace on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def thinned(self, rows: int) -> "Trace":
        """At most `rows` of its rows, chosen as `sample_rows` does."""
        picked = torch.tensor(sample_rows(self.q.shape[0], rows), dtype=torch.int64, device=self.q.device)
        q = self.q.view(torch.uint8)[picked].view(torch.float8_e4m3fn)
        return replace(self, q=q, weights=self.weights[picked], positions=self.positions[picked])


def sample_rows(count: int, rows: int, first: int = 0) -> list[int]:
    """min(rows, count) of `count` rows, ascending: half of them (rounded up) the last ones, the others the middles of
    equal parts of what is left from row `first` on (from the first row on where that is too little).
    """
    rows = min(rows, count)
    tail = rows - rows // 2
    spread = rows - tail
    first = first if count - tail - first >= spread else 0
    span = count - tail - first
    return [first + (2 * i + 1) * span // (2 * spread) for i in range(spread)] + list(range(count - tail, count))


def save_traces(path: Path, traces: Sequence[Trace], max_bytes: int | None = None) -> int:
    """Write one .npz file, under its name only once it is whole; returns its bytes.

    Raises ValueError for a path that does not end in .npz, and naming the size for more than max_bytes: then nothing
    is left behind.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path={path} must end in .npz")
    described = [{name: getattr(trace, name) for name in DESCRIPTION} for trace in traces]
    content: dict[str, Any] = {"version": numpy.array(VERSION), "traces": numpy.array(json.dumps(described))}
    for number, trace in enumerate(traces):
        for name in TENSORS:
            tensor = getattr(trace, name).cpu()
            content[f"{number}.{name}"] = (tensor.view(torch.uint8) if name in FP8_TENSORS else tensor).numpy()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            numpy.savez_compressed(file, **content)
        size = os.path.getsize(temporary)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path} would have {size / 2**20:.1f} MiB, at most {max_bytes / 2**20:g} are allowed")
        os.chmod(temporary, 0o644)  # mkstemp's are the owner's alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return size


def load_traces(path: Path) -> list[Trace]:
    """The traces of a file, or of every .npz file of a folder in the order of their names.

    Raises ValueError naming the file and what is wrong with it: no .npz file, another version, a field that is missing
    or of the wrong shape; FileNotFoundError where there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        return [trace for file in sorted(path.glob("*.npz")) for trace in load_traces(file)]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file")
    with numpy.load(path, allow_pickle=False) as content:
        try:
            version = int(_field(content, "version"))
            if version != VERSION:
                raise ValueError(f"version {version}, this package reads {VERSION}")
            described = json.loads(str(_field(content, "traces")))
            return [_trace(content, number, one) for number, one in enumerate(described)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def embedded_traces() -> Path | None:
    """The folder of the traces that this package ships, for `load_traces`; None while there are none."""
    folder = Path(str(resources.files("indexer_kernels"))) / "data"
    return folder if any(folder.glob("*.npz")) else None


def _field(content: Any, name: str) -> Any:
    if name not in content.files:
        raise ValueError(f"field {name} is missing")
    return content[name]


def _trace(content: Any, number: int, described: dict[str, Any]) -> Trace:
    if missing := [name for name in DESCRIPTION if name not in described]:
        raise ValueError(f"field {missing[0]} of trace {number} is missing")
    tensors: dict[str, Any] = {name: torch.from_numpy(_field(content, f"{number}.{name}")) for name in TENSORS}
    for name in FP8_TENSORS:
        if tensors[name].dtype != torch.uint8:
            raise ValueError(f"{number}.{name} has dtype {tensors[name].dtype}, must be torch.uint8")
        tensors[name] = tensors[name].view(torch.float8_e4m3fn)
    try:
        return Trace(**{name: described[name] for name in DESCRIPTION}, **tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trace {number}: {error}") from None
