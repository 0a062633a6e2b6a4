"""Captures traces: what the indexers of a served DSA model see of given prompts, for `scripts/eval_recall.py`.

    python scripts/capture_traces.py --model PATH --prompts FILE --out FILE.npz [arguments of sglang.launch_server]
    python scripts/capture_traces.py --url URL --trace-dir DIR --prompts FILE --out FILE.npz

The first form starts a server and ends it. The second talks to one that was started with SGLANG_EXT_TRACE_DIR=DIR on
this machine, or over a shared folder. FILE has one JSON object per line, with "text" or "input_ids"; its other fields
are kept in the trace as the prompt's description, the prompt itself is not. Prompts are sent one by one. Those
of at most 2048 tokens leave no trace: SGLang selects all their tokens without asking an indexer.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from indexer_kernels.traces import Trace, load_traces, save_traces
from server_process import Server, arguments_without, launch
from sglang_ext.cli.parameter_flags import integers, layer_numbers

WAIT_S = 5.0  # for the files of a prompt on a slow shared folder
# Those of `launch` are for few layers of made-up weights. A whole model takes most of the memory, has its own context
# limit, and loads for minutes: SGLang's own defaults, and the time that docker/ allows.
ARGUMENTS = arguments_without("--mem-fraction-static", "--context-length")
START_LIMIT_S = 45 * 60


class Prompt:
    """One line of the prompts file. Raises ValueError naming the line."""

    def __init__(self, line: str, source: str) -> None:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
        given = [name for name in ("text", "input_ids") if isinstance(fields, dict) and name in fields]
        if len(given) != 1:
            raise ValueError(f'{source} must be an object with either "text" or "input_ids"')
        self.body = {given[0]: fields.pop(given[0])}
        self.description: dict[str, Any] = {**fields, "source": source}


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file, blank lines left out. Raises ValueError for a malformed line, or for none."""
    lines = enumerate(path.read_text().splitlines(), 1)
    prompts = [Prompt(line, f"{path.name}:{number}") for number, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt")
    return prompts


def capture(
    server: Server, folder: Path, prompts: Sequence[Prompt], keep: Callable[[Trace], Trace | None], quiet: bool = False
) -> list[Trace]:
    """Send each prompt alone, with nothing cached, and load what the server wrote of it; keep() thins or drops a trace.

    Raises ValueError where the server writes no traces, writes them elsewhere, or could not write some layer.
    """
    try:
        settings = server.status()["settings"]
    except KeyError:
        raise ValueError(f"the server at {server.url} runs without the plugin") from None
    if not settings.get("trace_dir"):
        raise ValueError(f"the server at {server.url} writes no traces: start it with SGLANG_EXT_TRACE_DIR")
    traces: list[Trace] = []
    for prompt in tqdm(prompts, unit="prompt", disable=quiet or not sys.stderr.isatty()):
        server.flush()
        before, status = set(folder.glob("*.npz")), server.status()
        written, lost = status["traces_written"], status["traces_skipped"].get("write_error", 0)
        sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
        server.call("/generate", {**prompt.body, "sampling_params": sampling}, timeout=3600)
        status = server.status()
        if (now_lost := status["traces_skipped"].get("write_error", 0)) > lost:
            source = prompt.description["source"]
            raise ValueError(f"the server could not write {now_lost - lost} layers of {source}: its log says why")
        files = _new_files(folder, before, status["traces_written"] - written)
        if not files:
            skipped = ", ".join(f"{reason} {n}" for reason, n in status["traces_skipped"].items()) or "none"
            print(
                f"no trace of {prompt.description['source']}: at most 2048 tokens? skipped so far: {skipped}",
                flush=True,
            )
        for trace in (trace for file in files for trace in load_traces(file)):
            described = {**prompt.description, "cached_tokens": _cached(trace)}
            kept = keep(replace(trace, prompt=described))
            if kept is not None:
                traces.append(kept)
    return traces


def keeper(
    layers: Sequence[int] | None, rows: int | None, contexts: Sequence[int] | None
) -> Callable[[Trace], Trace | None]:
    """For `capture`: only these layers and nominal contexts, and at most so many rows of each trace."""

    def keep(trace: Trace) -> Trace | None:
        if (layers and trace.layer not in layers) or (contexts and trace.nominal_context not in contexts):
            return None
        return trace if rows is None else trace.thinned(rows)

    return keep


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """--url, --trace-dir, --prompts: what `capture` needs of a server that runs."""
    parser.add_argument("--url", help="a running server, as in http://127.0.0.1:30000")
    parser.add_argument("--trace-dir", type=Path, help="the folder that the server at --url writes traces to")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL with text or input_ids")


def running_server(args: argparse.Namespace) -> Server:
    """The server at --url. Raises ValueError where --trace-dir is missing or no folder."""
    if args.trace_dir is None or not args.trace_dir.is_dir():
        raise ValueError(f"--trace-dir {args.trace_dir} must be the folder that the server at --url writes traces to")
    return Server(args.url.rstrip("/"), 0.0)


def format_table(traces: Sequence[Trace]) -> str:
    """One line per prompt: its length, the layers and the rows kept."""
    lines = [f"{'prompt':<24}  {'tokens':>7}  {'layers':>6}  {'rows':>4}  heads"]
    for source in dict.fromkeys(_source(trace) for trace in traces):
        own = [trace for trace in traces if _source(trace) == source]
        rows, heads = own[0].q.shape[:2]
        lines.append(f"{source:<24}  {own[0].context:>7}  {len(own):>6}  {rows:>4}  {heads}")
    return "\n".join(lines)


def _new_files(folder: Path, before: set[Path], count: int) -> list[Path]:
    """Files that a prompt brought. Raises ValueError where the server counted some and none shows up."""
    end = time.monotonic() + WAIT_S
    while len(files := sorted(set(folder.glob("*.npz")) - before)) < count:
        if time.monotonic() > end:
            raise ValueError(f"the server wrote {count} traces, {len(files)} are in --trace-dir {folder}")
        time.sleep(0.1)
    return files


def _cached(trace: Trace) -> int:
    return int(trace.prompt.get("cached_tokens", 0)) if isinstance(trace.prompt, dict) else 0


def _source(trace: Trace) -> str:
    return str(trace.prompt["source"]) if isinstance(trace.prompt, dict) else trace.prompt


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="serve this model with the plugin, in native mode")
    add_server_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--layers", type=layer_numbers, metavar="N,N,...", help="keep these layers only")
    parser.add_argument("--rows", type=int, help="rows of each trace (default: 16, or what the server at --url keeps)")
    parser.add_argument("--contexts", type=integers, metavar="N,N,...", help="keep prompts of about these lengths only")
    parser.add_argument("--max-mib", type=float, default=12, help="write nothing larger (default: %(default)s)")
    parser.add_argument("--model-name", help="the name the traces carry (default: the model folder's)")
    return parser


def run(args: argparse.Namespace, server_arguments: Sequence[str]) -> None:
    if (args.model is None) == (args.url is None):
        raise ValueError("give either --model PATH or --url URL")
    if args.prompts is None:
        raise ValueError("--prompts FILE is missing")
    if args.url and server_arguments:
        raise ValueError(f"unknown arguments: {' '.join(server_arguments)}")
    if args.rows is not None and args.rows < 1:
        raise ValueError(f"--rows {args.rows} must be at least 1")
    if args.out.suffix != ".npz" or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out} must end in .npz, in a folder that exists")
    prompts, keep = read_prompts(args.prompts), keeper(args.layers, args.rows, args.contexts)
    if args.url:
        traces = capture(running_server(args), args.trace_dir, prompts, keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"mode": "native", "trace_dir": folder, "trace_rows": str(args.rows or 16), "strict": "1"}
            log = args.out.with_suffix(".log")
            with launch(
                args.model,
                log,
                settings,
                server_arguments,
                {},
                dummy_weights=False,
                arguments=ARGUMENTS,
                start_limit_s=START_LIMIT_S,
            ) as server:
                traces = capture(server, Path(folder), prompts, keep)
    if not traces:
        raise ValueError("nothing was captured, or --layers and --contexts kept nothing")
    if args.model_name:
        traces = [replace(trace, model=args.model_name) for trace in traces]
    print(format_table(traces))
    size = save_traces(args.out, traces, max_bytes=int(args.max_mib * 2**20))
    print(f"wrote {args.out}: {len(traces)} traces of {traces[0].model}, {size / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    args, server_arguments = build_parser().parse_known_args(argv)
    try:
        run(args, server_arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"capture_traces: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
