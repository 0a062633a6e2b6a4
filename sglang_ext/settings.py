"""Settings: one dataclass, read from defaults, the model config, a settings file and SGLANG_EXT_* variables, in that
order.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from indexer_kernels.params import MODES, IndexerParams
from sglang_ext.layer_values import PHASE_MODES, Frozen, decode_mode_of, merge, override, parse_layers, thaw
from sglang_ext.settings_file import read_settings_file

PREFIX = "SGLANG_EXT_"
MODEL_CONFIG_FIELD = "sglang_ext"
SERVE_MODES = (*MODES, "auto")
DEFAULTS = IndexerParams()
# The papers' own config fields: field -> setting. The use_* switches choose the mode.
PAPER_FIELDS = {
    "misa_topk_heads": "active_heads",
    "misa_k_block_size": "route_block",
    "misa_stage1_topk": "candidates",
    "hisa_k_block_size": "block_size",
    "hisa_block_topk": "top_blocks",
}
PAPER_SWITCHES = ("use_misa", "use_hisa")
MAY_BE_UNSET = ("prefill_mode", "decode_mode", "settings_file", "trace_dir")
PATHS = ("settings_file", "trace_dir")  # their names keep their capitals


def _setting(default: Any, meaning: str, page: str = "docs/settings.md") -> Any:
    """page: the file whose table lists it, beside docs/settings.md, which lists all."""
    return field(default=default, metadata={"help": meaning, "page": page})


WATCHING = "docs/monitoring.md"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a deployment asks for. Raises ValueError naming the setting, its value and what is allowed."""

    mode: str = _setting(
        "auto",
        "mode of prefill, and native for both phases if it is native: native, misa, misa_rerank, hisa, group_rerank or "
        "auto",
    )
    prefill_mode: str | None = _setting(None, "mode of prefill, where it should differ from `mode`")
    decode_mode: str | None = _setting(
        None,
        "mode of decode; unset: native with `mode=native`, else auto; hisa and misa_rerank keep block statistics: 4 "
        "bytes per token and layer, and lose answers (docs/quality.md)",
    )
    settings_file: str | None = _setting(
        None, "JSON file of settings, with settings of single layers: what `sglang-ext tune` writes"
    )
    layers: Frozen = _setting((), 'settings of single layers, in a settings file: `{"3": {"mode": "hisa"}}`')
    strict: bool = _setting(False, "end the server where SGLang's own indexer would run in place of a requested mode")
    active_heads: int = _setting(DEFAULTS.active_heads, "misa, misa_rerank: heads that score every token (4, 8 or 16)")
    route_block: int = _setting(DEFAULTS.route_block, "misa, misa_rerank: tokens per statistics block of head routing")
    route_statistic: str = _setting(
        DEFAULTS.route_statistic, "misa, misa_rerank: `sum` or `max` of a head's block scores routes it"
    )
    candidates: int = _setting(DEFAULTS.candidates, "misa_rerank, group_rerank: tokens that all heads re-rank")
    candidate_unit: str = _setting(DEFAULTS.candidate_unit, "misa_rerank: candidates as `token`s or whole `page`s")
    block_size: int = _setting(DEFAULTS.block_size, "hisa: tokens per block")
    top_blocks: int = _setting(DEFAULTS.top_blocks, "hisa: blocks whose tokens all heads score")
    group: int = _setting(DEFAULTS.group, "group_rerank: consecutive rows that share one scan (2 or 4)")
    local_tokens: int = _setting(DEFAULTS.local_tokens, "re-ranking modes: last tokens that are always candidates")
    native_layers: tuple[int, ...] = _setting((), "layers that keep SGLang's own indexer, as in `0-2,60`")
    native_tail_rows: int = _setting(0, "last rows of each prompt that score every token with all heads")
    auto_prefill_mode: str = _setting("misa_rerank", "`auto`: mode of prefill from the break-even on")
    prefill_min_tokens: int = _setting(
        0, "`auto`: prefill of shorter contexts stays native; 0: the measured break-even, 40960 with 64 heads"
    )
    prefill_min_rows: int = _setting(2048, "`auto`: prefill of fewer rows stays native")
    decode_tokens: int = _setting(
        0,
        "`auto`: tokens that contexts usually have in decode; hisa decodes the batch sizes for which that pays (8 rows "
        "from 24576, 64 from 16384, 256 from 8192); 0: native",
    )
    backend: str = _setting("auto", "`gpu`, `reference` (float32 PyTorch, for debugging) or `auto`")
    runtime_switch: bool = _setting(False, "let POST /set_internal_state change the prefill mode (environment only)")
    shadow_rate: float = _setting(
        0.0, "share (0 to 1) of the forwards of a mode in which native selects too, for some rows", WATCHING
    )
    shadow_rows: int = _setting(32, "rows of such a forward that are compared", WATCHING)
    guard_overlap: float = _setting(
        0.0, "a layer whose mean overlap with native stays under it returns to native; 0: never", WATCHING
    )
    guard_min_samples: int = _setting(1024, "rows that must be compared before a layer is judged", WATCHING)
    check_integrity: bool = _setting(
        False, "compare stored block statistics with the keys in every forward; slow, for tests"
    )
    trace_dir: str | None = _setting(None, "folder for traces of what the indexers see; slow, for diagnosis")
    trace_rows: int = _setting(16, "query rows of a trace: half the prompt's last, half spread over its last chunk")

    def __post_init__(self) -> None:
        _choice("mode", self.mode, SERVE_MODES)
        for name in ("prefill_mode", "decode_mode"):
            if getattr(self, name) is not None:
                _choice(name, getattr(self, name), SERVE_MODES)
        _choice("auto_prefill_mode", self.auto_prefill_mode, tuple(mode for mode in MODES if mode != "native"))
        _choice("backend", self.backend, ("auto", "reference", "gpu"))
        for name in ("native_tail_rows", "prefill_min_tokens", "prefill_min_rows", "decode_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("trace_rows", "shadow_rows", "guard_min_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("shadow_rate", "guard_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.guard_overlap and not self.shadow_rate:
            raise ValueError(
                f"guard_overlap={self.guard_overlap} judges what shadow_rate measures: set shadow_rate too"
            )
        if any(layer < 0 for layer in self.native_layers):
            raise ValueError(f"native_layers={self.native_layers} must not be negative")
        self.params(DEFAULTS.top_k)
        for number, _ in self.layers:
            try:
                self.of_layer(number)
            except ValueError as error:
                raise ValueError(f"layers.{number}: {error}") from None

    def of_layer(self, number: int) -> "Settings":
        """The settings that one layer runs with; the same object where it has none of its own.

        A layer's mode waits for what the deployment's mode waits for: where that is `auto`, it is what `auto` chooses.
        """
        own = thaw(self.layers).get(number)
        if own is None:
            return self
        wanted = own.pop("prefill_mode", None)
        if wanted is not None:
            chosen = self.phase_mode("prefill") == "auto" and wanted not in ("native", "auto")
            own["auto_prefill_mode" if chosen else "prefill_mode"] = wanted
        return replace(self, layers=(), **own)

    def switched(self, prefill_mode: str) -> "Settings":
        """With another prefill mode for all layers; `auto` leaves it to those with a mode of their own."""
        layers = override(self.layers, {"prefill_mode": prefill_mode})
        return replace(self, prefill_mode=prefill_mode, layers=layers)

    def params(self, top_k: int) -> IndexerParams:
        """The kernels' share of the settings, for a model that selects top_k tokens."""
        names = {f.name for f in dataclasses.fields(IndexerParams)} - {"top_k"}
        return IndexerParams(top_k=top_k, **{name: getattr(self, name) for name in names})

    def phase_mode(self, phase: str) -> str:
        """The mode asked for in "prefill" or "decode"."""
        if phase == "prefill":
            return self.prefill_mode or self.mode
        return self.decode_mode or decode_mode_of(self.mode)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for /server_info."""
        layers = {str(number): own for number, own in thaw(self.layers).items()}
        return dataclasses.asdict(self) | {"native_layers": list(self.native_layers), "layers": layers}

    def __str__(self) -> str:
        """`as_dict` as JSON, for the log."""
        return json.dumps(self.as_dict())


def load_settings(model_config: Mapping[str, Any] | None, environ: Mapping[str, str]) -> Settings:
    """Defaults < the papers' fields of the model config < its `sglang_ext` field < the settings file that it or
    SGLANG_EXT_SETTINGS_FILE names < SGLANG_EXT_<FIELD> variables.

    What a later source sets for the deployment replaces what an earlier one sets for single layers, and its `mode` what
    an earlier one sets for one phase; but a `mode` of `auto` leaves the choice to them. Raises ValueError for an
    unknown setting or value, naming it, its file if it is in one, and what is allowed.
    """
    config: list[dict[str, Any]] = []
    if model_config:
        own = model_config.get(MODEL_CONFIG_FIELD) or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"model config field {MODEL_CONFIG_FIELD}={own!r} must be an object of settings")
        config = [_parsed(_paper_settings(model_config)), _parsed(own)]
    variables = {name.removeprefix(PREFIX).lower(): name for name in environ if name.startswith(PREFIX)}
    environment = _parsed({name: environ[shown] for name, shown in variables.items()}, variables)
    path = {key: value for one in (*config, environment) for key, value in one.items()}.get("settings_file")
    if path is None:
        return Settings(**_merged([*config, environment]))
    try:
        in_file = _parsed(read_settings_file(path).values)
        Settings(**_merged([in_file]))
    except ValueError as error:
        where = f"settings file {path}"
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    try:
        return Settings(**_merged([*config, in_file, environment]))
    except ValueError as error:  # of another source, or a combination
        raise ValueError(f"{error} (together with settings file {path})") from None


def _parsed(values: Mapping[str, Any], shown: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        _known(str(name), (shown or {}).get(name, str(name))): _parse(name, value) for name, value in values.items()
    }


def _merged(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One value of each setting: the last source's; entries of layers value by value."""
    values: dict[str, Any] = {}
    for source in sources:
        if source.get("mode", "auto") != "auto":  # of both phases, whatever an earlier source had for one of them
            values = {name: value for name, value in values.items() if name not in PHASE_MODES}
        layers = merge(override(values.get("layers", ()), source), source.get("layers", ()))
        values |= source
        if layers or "layers" in values:
            values["layers"] = layers
    return values


def _paper_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    use_misa, use_hisa = (bool(config.get(switch)) for switch in PAPER_SWITCHES)
    if use_misa and use_hisa:
        raise ValueError("model config fields use_misa and use_hisa are both set; choose one mode")
    prefix = "misa_" if use_misa else "hisa_" if use_hisa else None
    if prefix is None:
        return {}
    values = {
        setting: config[name]
        for name, setting in PAPER_FIELDS.items()
        if name.startswith(prefix) and config.get(name) is not None
    }
    # A first-stage budget means that the candidates are re-ranked (the papers' dagger variant).
    values["mode"] = "hisa" if use_hisa else "misa_rerank" if "candidates" in values else "misa"
    return values


def _known(name: str, shown: str) -> str:
    known = [f.name for f in dataclasses.fields(Settings)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown setting {shown}{hint}; known settings: {', '.join(known)}")
    return name


def _parse(name: str, value: Any) -> Any:
    if name == "native_layers":
        return _layers(value)
    if name == "layers":
        return parse_layers(value, _parse_of_layer)
    if name in MAY_BE_UNSET:
        text = "" if value is None else str(value).strip()
        if text.lower() in ("", "none"):
            return None
        return text if name in PATHS else text.lower()
    kind = type(getattr(Settings(), name))
    if kind is bool:
        text = str(value).strip().lower()
        if text not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            raise ValueError(f"{name}={value!r} must be true or false")
        return text in ("1", "true", "yes", "on")
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{name}={value!r} must be an integer")
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r} must be an integer") from None
    if kind is float:
        try:
            return float("nothing" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r} must be a number") from None
    if value is None:
        return None
    return str(value).strip().lower()


def _parse_of_layer(name: str, value: Any) -> Any:
    parsed = _parse(name, value)
    if name == "mode" or (parsed is not None and name in ("prefill_mode", "decode_mode")):
        _choice(name, parsed, SERVE_MODES)
    return parsed


def _layers(value: Any) -> tuple[int, ...]:
    """`0-2,60`, or a list of integers, as a sorted tuple."""
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    parts = [str(part).strip() for part in listed]
    layers: set[int] = set()
    for part in filter(None, parts):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"native_layers={value!r} must be layer numbers and ranges, as in 0-2,60")
        layers.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(layers))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
