"""What the ranks that share a batch must have in common before they serve: each of them decides by itself."""

from typing import Any

import torch

from sglang_ext import __version__
from sglang_ext.stage import Stage

OWN = ("settings_file", "trace_dir", "strict")  # may differ from host to host: paths, and what a rank does about itself


def check_ranks(stage: Stage) -> None:
    """RuntimeError where the ranks of an attention tensor-parallel group would not decide alike: hosts with other
    variables, files, versions or compilers. Each would serve its heads with tokens of its own choice, and only its own
    log and counters would say so. All ranks call it as their model is built.
    """
    group = attention_group()
    if group is not None and (found := differences_in(group.cpu_group, group.ranks, decided_by(stage))):
        raise RuntimeError(f"sglang-ext: ranks that share a batch must be set up alike: {'; '.join(found)}")


def on_any_rank(mine: bool) -> bool:
    """Whether it is so on one of the ranks that share a batch. All of them call it."""
    group = attention_group()
    return mine if group is None else any(gather_in(group.cpu_group, group.ranks, mine))


def attention_group() -> Any:
    """SGLang's attention tensor-parallel group; None where a rank is alone."""
    from sglang.srt.distributed import parallel_state

    if not torch.distributed.is_initialized() or not hasattr(parallel_state, "get_attn_tp_group"):
        return None
    group = parallel_state.get_attn_tp_group()
    return group if group.world_size > 1 else None


def decided_by(stage: Stage) -> dict[str, Any]:
    """All that a rank's decisions depend on and that is not the batch's."""
    settings = {name: value for name, value in stage.settings.as_dict().items() if name not in OWN}
    # Without what a compiler said, which may name files of its host.
    refused = sorted({sentence.partition(":")[0] for sentence in stage.support.rejected})
    return {"version": __version__, **settings, "refused": refused}


def differences_in(group: Any, ranks: list[int], mine: dict[str, Any]) -> list[str]:
    """One phrase for each name whose value is not the same on all ranks of a torch.distributed group of CPU tensors.
    All must call it.
    """
    found = gather_in(group, ranks, mine)
    names = dict.fromkeys(name for one in found for name in one)
    return [
        f"{name} is " + ", ".join(f"{one.get(name)!r} on rank {rank}" for rank, one in zip(ranks, found))
        for name in names
        if any(one.get(name) != found[0].get(name) for one in found)
    ]


def gather_in(group: Any, ranks: list[int], mine: Any) -> list[Any]:
    """What each rank of a torch.distributed group of CPU tensors gives. All must call it."""
    found: list[Any] = [None for _ in ranks]
    torch.distributed.all_gather_object(found, mine, group=group)
    return found
