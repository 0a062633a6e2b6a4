"""What runs in a forward, and why: a pure function of host values, asked once per forward."""

from typing import NamedTuple

from sglang_ext import break_even
from sglang_ext.settings import Settings

AUTO_PREFILL = Settings().auto_prefill_mode
AUTO_DECODE = "hisa"
STATISTICS_MODES = ("hisa", "misa_rerank")  # in decode they read stored block statistics, or do not run
BY_BLOCKS = "decode chooses whole blocks of tokens, which loses answers on some models: measure yours (docs/quality.md)"

# Reasons by which a user's own settings, or the batch, chose SGLang's own indexer.
CONFIGURED = "configured"
AUTO_SELECTED = "auto_selected"
CONFIGURED_NATIVE = "configured_native"
BELOW_BREAK_EVEN = "below_break_even"
FEW_ROWS = "few_rows"  # `auto` prefill: launches cost more than so few rows save
AUTO_DECODE_NATIVE = "auto_decode_native"  # `auto` decode, also of mode=hisa: nobody set decode_tokens or decode_mode
PAGE_CANDIDATES = "page_candidates"  # `auto` prefill: whole pages lose too many of native's tokens (docs/quality.md)
NATIVE_LAYER = "native_layer"
PROMPT_UNKNOWN = "prompt_unknown"  # native_tail_rows in a forward without requests: SGLang's warm-up and graph capture
GUARD = "guard"  # the layer's overlap with native stayed under guard_overlap
BY_CHOICE = frozenset(
    {
        CONFIGURED,
        AUTO_SELECTED,
        CONFIGURED_NATIVE,
        BELOW_BREAK_EVEN,
        FEW_ROWS,
        AUTO_DECODE_NATIVE,
        PAGE_CANDIDATES,
        NATIVE_LAYER,
        PROMPT_UNKNOWN,
        GUARD,
    }
)
# Reasons by which a requested mode could not run; strict ends the server on them.
UNSUPPORTED = {
    "hisparse": "the hisparse coordinator places keys where the plugin does not look",
    "context_parallel": "a context-parallel rank sees only its share of a prompt's rows",
    "kv_shard": "the page table addresses gathered scratch pages",
    "layer_split_pool": "layers of this pool live on other ranks",
    "page_size": "index pages do not hold 64 tokens",
    "index_topk": "the model selects more than 2048 tokens",
    "head_dim": "the indexer's head dim is not 128",
    "forced_tokens": "the model config forces initial or local tokens",
    "kpool": "the model's indexer is the k-pool variant",
    "no_indexer": "the model has no indexer of DeepSeek sparse attention",
    "other_plugin": "another plugin hooks the same method of SGLang",
    "two_batch_overlap": "native_tail_rows does not know the prompts of a batch that two-batch overlap has split",
    "rows_mismatch": "page table, lengths and query rows do not belong together",
    "too_long": "the context is longer than the kernels hold",
    "no_statistics": "the pool of index keys holds no block statistics, which this decode mode reads",
    "statistics_memory": "no memory was left for block statistics",
    "statistics_lost": "a decode step could not be followed by the block statistics, so they are no longer right",
    "block_size": "block_size, or misa_rerank's route_block, is not a multiple of the 64 tokens of a stored statistic",
    "no_kernel": "the gpu backend has no kernels for this mode, model or GPU",
}


class BatchView(NamedTuple):
    """What the policy may know of a forward. lengths: tokens of each request, None where only the GPU knows them;
    heads: of the indexer, 0 where they are not known.
    """

    phase: str
    rows: int
    lengths: tuple[int, ...] | None
    max_length: int
    unsupported: str | None = None
    heads: int = 0


class Decision(NamedTuple):
    """The mode that runs and the reason, a key of UNSUPPORTED or a member of BY_CHOICE."""

    mode: str
    reason: str


def choose(batch: BatchView, settings: Settings) -> Decision:
    """The mode of one forward.

    An unsupported feature means native, with its reason. A mode set explicitly runs at any length; in decode that is
    decode_mode alone, without it decode is `auto` whatever `mode` names (Settings.phase_mode). `auto` prefill is
    settings.auto_prefill_mode for at least settings.prefill_min_rows rows once the longest request of the batch reaches
    settings.prefill_min_tokens (0: the measured break-even), else native, and native where candidates would be pages.
    `auto` decode is native unless settings.decode_tokens says how long contexts are: one CUDA graph serves a batch size
    at every length, and the host does not know the lengths. Then it is hisa for the batch sizes whose measured
    break-even is at most that. Requests of one batch need no separate decision: a row whose context fits the candidate
    budget is scored as native scores it, by all heads and without a routed scan.
    """
    wanted = settings.phase_mode(batch.phase)
    if wanted == "native":
        return Decision("native", CONFIGURED_NATIVE)
    if wanted == "auto" and batch.phase == "decode" and not settings.decode_tokens:
        return Decision("native", AUTO_DECODE_NATIVE)
    if wanted == "auto" and batch.phase == "prefill" and not token_candidates(settings):
        return Decision("native", PAGE_CANDIDATES)
    if batch.unsupported is not None:
        return Decision("native", batch.unsupported)
    if wanted != "auto":
        return Decision(wanted, CONFIGURED)
    if batch.phase == "decode":
        needed = break_even.decode_min_tokens(batch.rows)
        if needed is None or min(batch.max_length, settings.decode_tokens) < needed:
            return Decision("native", BELOW_BREAK_EVEN)
        return Decision(AUTO_DECODE, AUTO_SELECTED)
    if max(batch.lengths or (batch.max_length,)) < (settings.prefill_min_tokens or break_even.min_tokens(batch.heads)):
        return Decision("native", BELOW_BREAK_EVEN)
    if batch.rows < settings.prefill_min_rows:
        return Decision("native", FEW_ROWS)
    return Decision(settings.auto_prefill_mode, AUTO_SELECTED)


def asks(phase: str, settings: Settings) -> bool:
    """Whether the settings can ask for another mode than native in this phase: else nothing needs to be looked at."""
    wanted = settings.phase_mode(phase)
    if wanted == "auto":
        return token_candidates(settings) if phase == "prefill" else settings.decode_tokens > 0
    return wanted != "native"


def always_native(settings: Settings) -> dict[str, str]:
    """The phases whose `auto` never chooses another mode with these settings, and why: who asked for it should know."""
    return {
        phase: choose(BatchView(phase, 0, None, 0), settings).reason
        for phase in ("prefill", "decode")
        if settings.phase_mode(phase) == "auto" and not asks(phase, settings)
    }


def token_candidates(settings: Settings) -> bool:
    """Whether `auto` would keep single tokens: what it asks of misa_rerank before it trusts it with answers."""
    return settings.candidate_unit == "token" or settings.auto_prefill_mode != "misa_rerank"


def mode_to_try(phase: str, settings: Settings) -> str:
    """The mode that `choose` would answer if nothing stood against it: what support is checked for."""
    wanted = settings.phase_mode(phase)
    if wanted != "auto":
        return wanted
    return settings.auto_prefill_mode if phase == "prefill" else AUTO_DECODE


def kernel_modes(phase: str, settings: Settings) -> tuple[str, ...]:
    """The modes whose kernels `mode_to_try` runs: from stored statistics misa_rerank chooses blocks as hisa does, and
    the tail rows of a prompt that runs a mode are this package's native.
    """
    mode = mode_to_try(phase, settings)
    if phase == "prefill" and settings.native_tail_rows and mode != "native":
        return mode, "native"
    return (mode, AUTO_DECODE) if phase == "decode" and mode == "misa_rerank" else (mode,)


def needs_statistics(settings: Settings) -> bool:
    """Whether decode may run a mode that reads stored block statistics: else none are allocated or kept."""
    return asks("decode", settings) and mode_to_try("decode", settings) in STATISTICS_MODES


def reads_whole_pages(settings: Settings) -> bool:
    """Whether the blocks by which decode chooses are made of whole pages, whose means are stored: hisa's blocks, and
    those that route the heads of misa_rerank.
    """
    routed = mode_to_try("decode", settings) == "misa_rerank"
    return not settings.block_size % 64 and not (routed and settings.route_block % 64)
