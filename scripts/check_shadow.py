"""Checks that /metrics and scripts/eval_recall.py say the same of the same traffic.

    python scripts/check_shadow.py --model PATH --prompts FILE --out DIR [--mode misa_rerank] [--rows 128]
                                   [--tolerance 0.01] [--port 30000] [further arguments of sglang.launch_server]

Starts a server in the mode that samples every forward (shadow_rate=1) and traces it too, and sends the prompts one by
one, each in one chunk. FILE is that of capture_traces.py, its prompts longer than 2048 tokens. Per layer, shadow
sampling's mean overlap, from /metrics, is compared with the recall that the mode has on the traces: both over evenly
spaced rows of every prompt, not the same ones. DIR/shadow.json holds the comparison, with commit, GPU and command. Exit
code 1 where a layer differs by more than the tolerance. Not for group_rerank: a trace holds single rows.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from capture_traces import capture, keeper, read_prompts
from indexer_kernels import MODES, IndexerParams
from indexer_kernels.traces import Trace
from run_record import run_record
from server_process import Server, launch
from sglang_ext.cli.recall import evaluate, trace_samples
from sglang_ext.settings import load_settings

SERVER = ["--enable-metrics", "--chunked-prefill-size=-1", "--max-prefill-tokens=140000"]
SERIES = re.compile(r"^sglang_ext:shadow_(rows|overlap)_total\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
SINGLE_ROWS = [mode for mode in MODES if mode not in ("native", "group_rerank")]
WAIT_S = 60.0  # an idle server writes its metrics every 30 seconds


@dataclass(frozen=True, slots=True)
class Line:
    """One layer: rows and mean overlap of shadow sampling, rows and mean recall on the traces."""

    layer: int
    shadow_rows: int
    shadow: float
    trace_rows: int
    recall: float

    @property
    def difference(self) -> float:
        return self.shadow - self.recall


def overlap_of(exposition: str, mode: str) -> dict[int, tuple[int, float]]:
    """Layer -> (rows, sum of overlaps) of a prefill mode, from the text of /metrics, over all ranks that export."""
    found: dict[int, list[float]] = {}
    for what, labels, value in SERIES.findall(exposition):
        own = dict(LABEL.findall(labels))
        if own["phase"] == "prefill" and own["mode"] == mode:
            found.setdefault(int(own["layer"]), [0.0, 0.0])[what == "overlap"] += float(value)
    return {layer: (int(rows), overlap) for layer, (rows, overlap) in found.items()}


def spread_rows(trace: Trace, rows: int) -> Trace | None:
    """The trace without its last rows, which `sample_rows` puts close together; None where nothing is left.

    Raises ValueError for a prompt that was served in chunks: its trace is of the last one only.
    """
    if isinstance(trace.prompt, dict) and trace.prompt.get("cached_tokens"):
        raise ValueError(f"prompt {trace.prompt.get('source')} was served in chunks: raise --chunked-prefill-size")
    kept = trace.positions < trace.context - (rows - rows // 2)
    if not kept.any():
        return None
    q = trace.q.view(torch.uint8)[kept].view(trace.q.dtype)
    return replace(trace, q=q, weights=trace.weights[kept], positions=trace.positions[kept])


def compare(
    shadow: dict[int, tuple[int, float]], traces: Sequence[Trace], mode: str, params: IndexerParams, backend: str
) -> list[Line]:
    """A line per layer that both know. Raises ValueError where they know none, or not the same ones."""
    layers = {trace.layer for trace in traces}
    if not layers or layers != set(shadow):
        raise ValueError(f"traces hold layers {sorted(layers)}, /metrics layers {sorted(shadow)}")
    device = "cuda" if backend != "reference" and torch.cuda.is_available() else "cpu"
    recall: dict[int | None, list[torch.Tensor]] = {}
    for one in evaluate(trace_samples(traces), [mode], [params], backend, device):
        if one is not None:
            recall.setdefault(one.layer, []).append(one.recall)
    lines = []
    for layer, (rows, overlap) in sorted(shadow.items()):
        found = torch.cat(recall[layer])
        lines.append(Line(layer, rows, overlap / rows, len(found), found.mean().item()))
    return lines


def format_table(lines: Sequence[Line], tolerance: float) -> str:
    """The lines as text, with what is off."""
    shown = [f"{'layer':>5}  {'rows':>6}  {'/metrics':>8}  {'rows':>6}  {'traces':>8}  {'differs':>8}"]
    for line in lines:
        off = "  FAIL" if abs(line.difference) > tolerance else ""
        shown.append(
            f"{line.layer:>5}  {line.shadow_rows:>6}  {line.shadow:>8.4f}  {line.trace_rows:>6}  {line.recall:>8.4f}"
            f"  {line.difference:>+8.4f}{off}"
        )
    return "\n".join(shown)


def read_metrics(server: Server, mode: str) -> dict[int, tuple[int, float]]:
    """/metrics once it has caught up with /server_info. Raises RuntimeError where it does not."""
    wanted = {one["layer"]: one["rows"] for one in server.status()["shadow"]["overlap"] if one["mode"] == mode}
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        found = overlap_of(server.call("/metrics/"), mode)
        if wanted and {layer: rows for layer, (rows, _) in found.items()} == wanted:
            return found
        time.sleep(1.0)
    raise RuntimeError(f"/metrics does not catch up with /server_info: rows per layer {wanted}")


def run(args: argparse.Namespace, server_arguments: Sequence[str]) -> int:
    if args.rows < 2 or not 0 < args.tolerance < 1:
        raise ValueError(f"--rows {args.rows} must be at least 2, --tolerance {args.tolerance} between 0 and 1")
    prompts, folder = read_prompts(args.prompts), args.out / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"mode": args.mode, "decode_mode": "native", "strict": "1", "shadow_rate": "1"}
    settings |= {"shadow_rows": str(args.rows), "trace_rows": str(2 * args.rows), "trace_dir": str(folder)}
    extra, log = [*SERVER, *server_arguments], args.out / "server.log"
    with launch(args.model, log, settings, extra, {}, port=args.port, dummy_weights=args.dummy_weights) as server:
        traces = capture(server, folder, prompts, keeper(None, None, None))
        shadow = read_metrics(server, args.mode)
        status: dict[str, Any] = server.status()
    params = load_settings({"sglang_ext": status["settings"]}, {}).params(2048)
    spread = [kept for trace in traces if (kept := spread_rows(trace, 2 * args.rows)) is not None]
    lines = compare(shadow, spread, args.mode, params, "auto")
    print(format_table(lines, args.tolerance))
    failed = [line.layer for line in lines if abs(line.difference) > args.tolerance]
    if errors := status["shadow"]["forwards"].get("prefill/error", 0):
        raise RuntimeError(f"shadow sampling met an error in {errors} forwards, and stopped: see {log}")
    record = {"run": run_record(), "mode": args.mode, "shadow": status["shadow"], "failed": failed}
    (args.out / "shadow.json").write_text(json.dumps(record | {"lines": [asdict(line) for line in lines]}, indent=1))
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL with text or input_ids")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mode", default="misa_rerank", choices=SINGLE_ROWS)
    parser.add_argument("--rows", type=int, default=128, help="rows of a prompt and layer (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of a layer's mean (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dummy-weights", action="store_true", help="the model folder holds no weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, server_arguments = build_parser().parse_known_args(argv)
    try:
        return run(args, server_arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"check_shadow: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
