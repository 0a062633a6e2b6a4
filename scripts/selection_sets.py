"""The token sets a live server selects, read back through SGLang's own --enable-return-indexer-topk."""

import base64

import numpy
import numpy.typing

from server_process import Server

Flags = numpy.typing.NDArray[numpy.bool_]


def selected_sets(server: Server, input_ids: list[int], num_layers: int, top_k: int) -> Flags:
    """flags[layer, row, token]: whether the row of a prompt selected the token. bool [layers, M, M], M the prompt.

    Needs SGLANG_DSA_FUSE_TOPK=0, which makes SGLang's layers return positions in the prompt. Raises ValueError for a
    row that does not hold exactly min(row + 1, top_k) distinct tokens it can see, packed first, then -1.
    """
    body = {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_indexer_topk": True,
    }
    raw = base64.b64decode(server.call("/generate", body)["meta_info"]["indexer_topk"])
    rows = len(input_ids)
    chosen = numpy.frombuffer(raw, dtype=numpy.int32).reshape(-1, num_layers, top_k)[:rows].transpose(1, 0, 2)
    if chosen.shape[1] != rows:
        raise ValueError(f"the server returned {chosen.shape[1]} rows for a prompt of {rows} tokens")
    flags = numpy.zeros((num_layers, rows, rows + 1), dtype=bool)
    for layer in range(num_layers):
        flags[layer, numpy.arange(rows)[:, None], chosen[layer]] = True  # -1 is the last column
    wanted = numpy.minimum(numpy.arange(rows) + 1, top_k)
    packed = numpy.arange(top_k) < wanted[:, None]
    for layer in range(num_layers):
        entries = chosen[layer]
        distinct = flags[layer, :, :rows].sum(axis=1)
        seen = (entries >= 0) & (entries <= numpy.arange(rows)[:, None])
        bad = numpy.flatnonzero((distinct != wanted) | (seen != packed).any(axis=1) | (entries[:, :] < -1).any(axis=1))
        if len(bad):
            raise ValueError(
                f"layer {layer}, row {bad[0]}: {distinct[bad[0]]} distinct tokens, {wanted[bad[0]]} are wanted "
                f"({len(bad)} such rows)"
            )
    return flags[:, :, :rows]


def shares(got: Flags, want: Flags) -> list[float]:
    """Per layer: the share of want's tokens that got holds too, over all rows."""
    return [float((g & w).sum() / w.sum()) for g, w in zip(got, want)]
