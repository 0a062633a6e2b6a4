"""What a hook on SGLang is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookType

from sglang_ext.stage import Stage


class Hook(NamedTuple):
    """One method of SGLang that the plugin wraps.

    parameters: its parameters in order; where it is wrapped AROUND, all of them, else those it must begin with.
    """

    target: str
    kind: HookType
    parameters: tuple[str, ...]
    why: str
    make: Callable[[Stage], Callable[..., Any]]
