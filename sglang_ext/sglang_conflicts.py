"""Other plugins' hooks on the methods that select tokens: two selections of one forward cannot both be served."""

from collections.abc import Sequence

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

# A BEFORE or AFTER hook sees what either selection gets and gives; these decide which one runs.
DECIDING = (HookType.AROUND, HookType.REPLACE)


def other_hooks(targets: Sequence[str]) -> list[str]:
    """One phrase for each hook of another plugin that may keep SGLang's selection, or ours, from running: AROUND and
    REPLACE on one of `targets` or on its class.

    Knows what SGLang's registry knows: a method that was overwritten without it is not seen.
    """
    found = []
    for target in dict.fromkeys([*targets, *(target.rpartition(".")[0] for target in targets)]):
        for kind, hook, source in HookRegistry._hooks.get(target, ()):
            module = getattr(hook, "__module__", None) or "an unknown module"
            if kind in DECIDING and module.partition(".")[0] != "sglang_ext":
                who = f"plugin {source.plugin_name}" if source is not None else f"module {module}"
                found.append(f"{who} has a hook ({kind.value}) on {target}")
    return found
