"""The decode phase of `bench_stage.py`: per layer, in CUDA graph replay, against what SGLang 0.5.23 runs there.

    python scripts/bench_stage.py --phase decode --json decode.json
    python scripts/bench_stage.py --phase decode --batch 64 --contexts 32768 131072 --heads 64 --modes hisa

native is DeepGEMM's fp8_paged_mqa_logits over the whole page table and SGLang's paged top-k, its schedule and plan made
once per forward; a mode is the update of the last pages' means and the selection, from q, gates and index pages to
cache slots. The graphs hold `layers` layers, each with a cache of its own, as many as it takes for what a mode reads
not to lie in L2 from one replay to the next. What is made once per forward is timed apart (`once_us`). Before anything
is timed, modes must agree with the reference backend, and with native where the budget covers the context; what a
timed graph has selected must agree with the reference backend for some of its rows, or nothing of it is kept.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict

import deep_gemm
import torch
from sglang.kernels.ops.attention.dsa.paged_mqa_logits import deepgemm_paged_mqa_logits_split
from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2, topk_transform_paged_v2

from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.page_layout import PAGE_BYTES, PAGE_TOKENS, pack_pages
from indexer_kernels.page_means import page_mean_buffer, update_page_means
from indexer_kernels.row_plan import RowPlan, plan_decode
from run_record import run_record
from sglang_ext.cli.stage_time import timed
from sglang_ext.sglang_hooks import sglang_top_k

PARAMS = IndexerParams()
MODES = ("hisa", "misa_rerank")
TABLE_PAGES = 2561  # what SGLang's page table has for DeepSeek-V3.2's 163840 tokens
TAIL = 27  # tokens in the last page of a request
CACHED_BYTES = 160 << 20  # more than twice the L2 of an H200
LEAST_LAYERS, MOST_LAYERS = 8, 64
POOL_BYTES = 40 << 30  # of all layers
CHECKED_ROWS, LEAST_AGREEMENT = 8, 0.98  # of a timed case: the median row's share of the reference's tokens
CHUNK_PAGES = 1 << 14  # pages made at once


class DisagreementError(RuntimeError):
    """A timed case selected other tokens than the reference: its times are of something else."""


class Layer:
    """One layer's cache, means and queries."""

    def __init__(self, pool: torch.Tensor, batch: int, heads: int, generator: torch.Generator) -> None:
        device = pool.device
        self.pool = pool
        self.means = page_mean_buffer(len(pool), device)
        self.q = torch.randn(batch, heads, 128, generator=generator, device=device).to(torch.float8_e4m3fn)
        self.weights = torch.randn(batch, heads, generator=generator, device=device) * 0.1
        self.out = torch.empty((batch, PARAMS.top_k), dtype=torch.int32, device=device)


class Case:
    """Requests of one length in shuffled pages, and what a forward knows of them. On a CPU only references run."""

    def __init__(
        self, batch: int, context: int, heads: int, layers: int | None = None, seed: int = 1, device: str = "cuda"
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        pages = -(-context // PAGE_TOKENS)
        read = batch * (pages * 256 + min(PARAMS.top_blocks * PARAMS.block_size // PAGE_TOKENS, pages) * PAGE_BYTES)
        fitting = POOL_BYTES // (batch * pages * PAGE_BYTES)
        self.num_layers = layers or max(2, min(MOST_LAYERS, fitting, max(LEAST_LAYERS, -(-CACHED_BYTES // read))))
        order = torch.randperm(batch * pages, generator=generator, device=device, dtype=torch.int32)
        # Past a request's end SGLang's tables are stale: any page.
        self.table = torch.randint(
            batch * pages, (batch, TABLE_PAGES), generator=generator, device=device, dtype=torch.int32
        )
        self.table[:, :pages] = order.view(batch, pages)
        self.lengths = torch.full((batch,), (pages - 1) * PAGE_TOKENS + TAIL, dtype=torch.int32, device=device)
        pool = torch.empty((batch * pages, PAGE_BYTES), dtype=torch.uint8, device=device)
        for some in pool.split(CHUNK_PAGES):
            keys = torch.randn(len(some) * PAGE_TOKENS, 128, generator=generator, device=device)
            scales = torch.rand(len(keys), generator=generator, device=device) + 0.5
            some.copy_(pack_pages(keys.to(torch.float8_e4m3fn), scales))
        pools = [pool] + [pool.clone() for _ in range(self.num_layers - 1)]
        self.layers = [Layer(one, batch, heads, generator) for one in pools]
        for layer in self.layers:
            update_page_means(layer.pool, self.table, self.lengths, layer.means, backend="auto")
        self.plan = plan_decode(self.lengths, TABLE_PAGES)

    def native_once(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What SGLang makes once per forward: DeepGEMM's schedule and the plan of top-k."""
        return _schedule(self.lengths[:, None]), plan_topk_v2(self.lengths)

    def native(self, once: tuple[torch.Tensor, torch.Tensor]) -> None:
        """`Indexer._get_topk_paged` of SGLang, fused top-k, no speculation."""
        schedule, plan = once
        for layer in self.layers:
            logits = deepgemm_paged_mqa_logits_split(
                _logits_in_chunks,
                layer.q,
                layer.pool.view(len(layer.pool), PAGE_TOKENS, 1, 132),
                layer.weights,
                self.lengths[:, None],
                self.table,
                schedule,
                TABLE_PAGES * PAGE_TOKENS,
                q_offset=len(layer.q),
            )
            topk_transform_paged_v2(logits, self.lengths, self.table, layer.out, PAGE_TOKENS, plan)

    def whole_forward(self, mode: str) -> None:
        """The mode in all layers, and before them what they share."""
        self.mode(mode, self.plan.for_one_forward())

    def mode(self, name: str, plan: RowPlan, backend: str = "gpu", output: str = "slot") -> None:
        for layer in self.layers:
            select_rows(
                name,
                layer.q,
                layer.weights,
                layer.pool,
                self.table,
                plan,
                PARAMS,
                backend=backend,
                output=output,
                top_k_kernel=sglang_top_k if backend == "gpu" else None,
                out=layer.out,
                page_means=layer.means,
                update_means=True,
            )

    def selected(self, rows: int) -> list[set[int]]:
        """What the call that ran last has selected for the first rows of the first layer."""
        return [set(row) for row in self.layers[0].out[:rows].tolist()]

    def expected(self, mode: str, rows: int) -> list[set[int]]:
        """The reference backend's selection for the same rows, from the means that the graphs have kept."""
        layer, lengths = self.layers[0], self.lengths[:rows]
        out = select_rows(
            mode,
            layer.q[:rows],
            layer.weights[:rows],
            layer.pool,
            self.table[:rows],
            plan_decode(lengths, TABLE_PAGES),
            PARAMS,
            backend="reference",
            output="slot",
            page_means=layer.means if mode != "native" else None,
        )
        return [set(row) for row in out.tolist()]


def _schedule(context: torch.Tensor) -> torch.Tensor:
    return deep_gemm.get_paged_mqa_logits_metadata(context, PAGE_TOKENS, deep_gemm.get_num_sms())


def _logits_in_chunks(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    context: torch.Tensor,
    table: torch.Tensor,
    schedule: torch.Tensor,
    width: int,
    clean_logits: bool = False,
) -> torch.Tensor:
    """As SGLang calls DeepGEMM: more rows than SMs go in parts, each with a schedule made on the spot."""
    most, rows = deep_gemm.get_num_sms(), q.shape[0]
    if rows <= most:
        return deep_gemm.fp8_paged_mqa_logits(
            q, pages, weights, context, table, schedule, width, clean_logits=clean_logits
        )
    parts = []
    for start in range(0, rows, most):
        part = slice(start, min(start + most, rows))
        parts.append(
            deep_gemm.fp8_paged_mqa_logits(
                q[part],
                pages,
                weights[part],
                context[part],
                table[part],
                _schedule(context[part]),
                width,
                clean_logits=clean_logits,
            )
        )
    return torch.cat(parts)


def agreement(mode: str, heads: int) -> dict[str, float]:
    """Share of the reference's tokens that the gpu backend selects, of 16 requests of 20000 tokens, and of native's as
    SGLang selects them where the budget covers the context: mean and least over rows.
    """
    shares: dict[str, float] = {}
    for name, context in (("reference", 20000), ("native", 8000)):
        case = Case(16, context, heads, layers=1)
        found = []
        for backend in ("gpu", "reference" if name == "reference" else "native"):
            if backend == "native":
                case.native(case.native_once())
            else:
                case.mode(mode, case.plan, backend)
            found.append(case.selected(len(case.lengths)))
        rows = shares_of(*found)
        shares |= {f"{name}_mean": statistics.mean(rows), f"{name}_least": min(rows)}
    return shares


def shares_of(got: list[set[int]], want: list[set[int]]) -> list[float]:
    """Row by row, the share of the wanted tokens that were selected."""
    return [len(mine & wanted) / len(wanted) for mine, wanted in zip(got, want)]


def enough(shares: dict[str, float]) -> bool:
    """Rounding may move a block, or with routed heads some, in and out of a row; covered rows differ by ties alone."""
    return shares["reference_mean"] >= 0.98 and shares["native_least"] >= 0.999


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()  # compiles, and allocates what is kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def measure(batch: int, context: int, heads: int, modes: list[str], rounds: int) -> list[dict]:
    case = Case(batch, context, heads)
    once = case.native_once()
    graphs = {
        ("native", "layers"): captured(lambda: case.native(once)),
        ("native", "all"): captured(lambda: case.native(case.native_once())),
    }
    for mode in modes:
        kept = case.plan.for_one_forward()
        graphs[mode, "layers"] = captured(functools.partial(case.mode, mode, kept))
        graphs[mode, "all"] = captured(functools.partial(case.whole_forward, mode))
    agreed: dict[str, float] = {}
    for (mode, part), graph in graphs.items():
        if part == "layers":
            graph.replay()
            agreed[mode] = statistics.median(shares_of(case.selected(CHECKED_ROWS), case.expected(mode, CHECKED_ROWS)))
            if agreed[mode] < LEAST_AGREEMENT:
                case_name = f"{mode}, {heads} heads, batch {batch}, context {context}"
                raise DisagreementError(f"{case_name}: {agreed[mode]:.4f} of the reference's tokens")
    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for step in range(rounds + 3):
        for key, graph in graphs.items():
            spent = timed(graph.replay)
            if step >= 3:
                times[key].append(1e3 * spent.device)
    per_layer = {name: [t / case.num_layers for t in times[name, "layers"]] for name in ("native", *modes)}
    native = statistics.median(per_layer["native"])
    return [
        {
            "phase": "decode",
            "mode": name,
            "heads": heads,
            "batch": batch,
            "context": context,
            "layers": case.num_layers,
            "us": statistics.median(values),
            "us_min": min(values),
            "us_max": max(values),
            "once_us": statistics.median(times[name, "all"]) - statistics.median(times[name, "layers"]),
            "times_native": native / statistics.median(values),
            "agreement": agreed[name],
        }
        for name, values in per_layer.items()
    ]


def kept(measured: Callable[[], list[dict]], failures: list[str]) -> list[dict]:
    """The results of a case; none where it disagrees, which is said and added to failures. The others go on."""
    try:
        return measured()
    except DisagreementError as wrong:
        print(f"FAIL {wrong}: nothing of this case is kept", file=sys.stderr, flush=True)
        failures.append(str(wrong))
        return []


def write(path: str, checks: list[dict], results: list[dict], failures: list[str]) -> None:
    record = {"run": run_record(), "params": asdict(PARAMS), "checks": checks, "results": results, "failures": failures}
    with open(path, "w") as file:
        json.dump(record, file, indent=1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_stage.py --phase decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 32], help="indexer heads")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", help="write the raw results here")
    args = parser.parse_args(arguments)
    checks, results = [], []
    failures: list[str] = []
    for heads in args.heads:
        for mode in args.modes:
            found = agreement(mode, heads)
            checks.append({"mode": mode, "heads": heads, **found})
            if not enough(found):
                print(f"FAIL {mode} H={heads}: {found}; nothing is timed", file=sys.stderr)
                return 1
        for batch in args.batch:
            for context in args.contexts:
                case = functools.partial(measure, batch, context, heads, args.modes, args.rounds)
                for row in kept(case, failures):
                    results.append(row)
                    print(
                        f"H={row['heads']} batch={row['batch']:3d} context={row['context']:6d} {row['mode']:11s} "
                        f"{row['us']:7.1f} us a layer  {row['times_native']:5.2f}x  {row['once_us']:5.1f} us a forward",
                        flush=True,
                    )
                if args.json:  # after every case: what was measured outlives what comes
                    write(args.json, checks, results, failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
