"""Which modes the machine can run: refusals of the gpu backend, kernels that do not compile, and what is said of it."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from indexer_kernels.backend import gpu_refusal
from indexer_kernels.params import MODES, IndexerParams
from sglang_ext import policy
from sglang_ext.policy import BatchView
from sglang_ext.settings import Settings

logger = logging.getLogger("sglang_ext")


class Support:
    """What the kernels can do with the settings of the moment. rejected: every sentence said of it so far."""

    def __init__(self) -> None:
        self.rejected: set[str] = set()
        self._refusals: dict[tuple[Any, ...], str | None] = {}
        self._broken: dict[tuple[str, IndexerParams], str] = {}

    def refusal(self, settings: Settings, mode: str, q: torch.Tensor, top_k: int) -> str | None:
        """Why the gpu backend cannot run the mode on queries like q, or None. Asked once, then remembered."""
        if settings.backend == "reference":
            return None
        if (broken := self._broken.get((mode, settings.params(top_k)))) is not None:
            return broken
        key = (mode, q.shape[1:], q.device, top_k, settings)
        if key not in self._refusals:
            self._refusals[key] = gpu_refusal(mode, q, settings.params(top_k))
        return self._refusals[key]

    def phase_refusal(self, settings: Settings, phase: str, q: torch.Tensor, top_k: int) -> str | None:
        """`refusal` of all that the phase's mode runs."""
        refusals = (self.refusal(settings, mode, q, top_k) for mode in policy.kernel_modes(phase, settings))
        return next((refusal for refusal in refusals if refusal is not None), None)

    def narrow(self, settings: Settings, view: BatchView, q: torch.Tensor, top_k: int) -> BatchView:
        """The view with what the kernels cannot do, if something asks for them."""
        if view.unsupported is not None or settings.backend == "reference":
            return view
        if self.phase_refusal(settings, view.phase, q, top_k) is not None:
            return view._replace(unsupported="no_kernel")
        from indexer_kernels.gpu.pipeline import max_tokens

        limit = max_tokens(policy.mode_to_try(view.phase, settings))
        return view._replace(unsupported="too_long") if limit is not None and view.max_length > limit else view

    def reject(self, settings: Settings, sentence: str) -> None:
        """SGLang's own indexer serves instead: said once, or the end of the server under strict (RuntimeError)."""
        if settings.strict:
            raise RuntimeError(f"sglang-ext (strict): {sentence}")
        if sentence not in self.rejected:
            self.rejected.add(sentence)
            logger.warning("SGLang's own indexer serves: %s", sentence)

    def prepare(self, variants: Sequence[Settings], q: torch.Tensor, top_k: int) -> None:
        """Before the first request: refuse what cannot run, compile what can, of every layer's settings. q: no rows, in
        the model's shape. RuntimeError under strict.
        """
        wanted: dict[tuple[str, IndexerParams], Settings] = {}
        for settings in variants:
            params, modes = settings.params(top_k), self._runnable(settings, q, top_k)
            if settings.runtime_switch:  # any of them may be asked for later
                modes += [m for m in MODES if m not in modes and self.refusal(settings, m, q, top_k) is None]
            if settings.backend != "reference":
                for mode in modes:
                    wanted.setdefault((mode, params), settings)
        self.compile(wanted, q.shape[1])

    def _runnable(self, settings: Settings, q: torch.Tensor, top_k: int) -> list[str]:
        """The modes that the settings ask for, without those that the machine refuses."""
        modes: list[str] = []
        for phase in ("prefill", "decode"):
            if not policy.asks(phase, settings):
                continue
            refusal = self.phase_refusal(settings, phase, q, top_k)
            if refusal is not None:
                self.reject(settings, f"{phase} mode {settings.phase_mode(phase)!r}: {refusal}")
            else:
                modes += [mode for mode in policy.kernel_modes(phase, settings) if mode not in modes]
        return modes

    def compile(self, wanted: Mapping[tuple[str, IndexerParams], Settings], num_heads: int) -> None:
        """Compile before the first request, so that none waits for it (TileLang and Triton keep the results on disk).

        wanted: (mode, parameters) -> settings that ask for them. A mode with a kernel that does not compile is refused
        from then on, with these parameters.
        """
        if not wanted:
            return
        from indexer_kernels.gpu.compile_check import compile_each

        began = time.monotonic()
        for (key, settings), outcome in zip(wanted.items(), compile_each(list(wanted), num_heads)):
            for name, error in outcome:
                if error is not None:
                    sentence = self._broken.setdefault(key, f"kernel {name} does not compile: {error}")
                    self.reject(settings, sentence)
        modes = ", ".join(dict.fromkeys(mode for mode, _ in wanted))
        logger.info("kernels of %s compiled or found in %.1f s", modes, time.monotonic() - began)
