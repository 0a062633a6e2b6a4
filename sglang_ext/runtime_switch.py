"""POST /set_internal_state: the prefill mode of a running server. The route carries numbers only."""

import logging

from sglang_ext.settings import SERVE_MODES, Settings

logger = logging.getLogger("sglang_ext")
MODE_NUMBERS = {mode: number for number, mode in enumerate(SERVE_MODES)}


class RuntimeSwitch:
    """Remembers what the settings were before a switch, so that `auto` is what it was."""

    def __init__(self) -> None:
        self._before: Settings | None = None
        self._after: Settings | None = None

    def mode(self, settings: Settings, value: float) -> str:
        """The mode that a number of MODE_NUMBERS names. Raises ValueError for another value, or where the switch is
        off.
        """
        if not settings.runtime_switch:
            raise ValueError("the prefill mode cannot be switched: the setting runtime_switch is off")
        if value not in range(len(SERVE_MODES)):
            raise ValueError(f"sglang_ext_prefill_mode={value} must be one of {MODE_NUMBERS}")
        return SERVE_MODES[int(value)]

    def switched(self, settings: Settings, value: float) -> Settings:
        """The settings from the next forward on: prefill is never captured, so its mode may change between forwards."""
        mode = self.mode(settings, value)
        logger.info("prefill mode switched from %s to %s", settings.phase_mode("prefill"), mode)
        before = self._before if self._before is not None and settings is self._after else settings
        self._before, self._after = before, before.switched(mode)
        return self._after
