"""Selection-stage time of each mode against what SGLang 0.5.23 runs today, in one process, interleaved, medians.

    python scripts/bench_stage.py --json stage.json
    python scripts/bench_stage.py --rows 2048 --keys 32768 131072 --heads 64 --modes hisa misa_rerank
    python scripts/bench_stage.py --phase decode --help

native is DeepGEMM's fp8_mqa_logits followed by SGLang's ragged top-k (without the key gather SGLang also runs); a
mode is everything from q, gates and index pages to cache slots. misa_rerank keeps single tokens as candidates,
misa_rerank_pages whole pages. The rows are the last ones of a prompt of KEYS tokens. Times are the device's, with
launches queued ahead; the host's time to launch is given beside them. Keys and queries are independent random numbers.
Before anything is timed, each mode must agree with the reference backend on a small case, and afterwards in the last
rows of every timed one, or nothing of that case is kept. Needs an sm_90 GPU and SGLang.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import deep_gemm
import torch
from sglang.kernels.ops.attention.dsv4.topk import topk_transform_ragged_v2

import bench_decode
from indexer_kernels import IndexerParams, select_rows
from indexer_kernels.page_layout import pack_pages
from indexer_kernels.row_plan import RowPlan, plan_extend
from sglang_ext.cli.stage_time import Timing, timed
from sglang_ext.sglang_hooks import sglang_top_k

PARAMS = bench_decode.PARAMS
PAGES = IndexerParams(candidate_unit="page")
MODES = ("misa", "misa_rerank", "misa_rerank_pages", "hisa", "group_rerank")
RERANKING = ("misa_rerank", "misa_rerank_pages", "group_rerank")  # the gpu backend may find more of native's tokens
INPUT_SETS = 2  # rotated, so that a repetition does not find its queries in L2
CHECKED_ROWS, LEAST_AGREEMENT = 16, 0.99  # last rows of a timed case: the median row's share of the reference's tokens


class Agreement(NamedTuple):
    """Share of the reference selection that the gpu backend finds, over rows: median and mean.

    Of a re-ranking mode, of native's tokens in it: more candidates only push out what native does not select.
    """

    median: float
    mean: float

    @classmethod
    def of(cls, got: list[set[int]], wanted: list[set[int]], native: list[set[int]] | None) -> "Agreement":
        """native: its selection, where only those of its tokens count that `wanted` holds."""
        if native is not None:
            wanted = [want & row for want, row in zip(wanted, native)]
        shares = [len(mine & want) / len(want) for mine, want in zip(got, wanted) if want]
        return cls(statistics.median(shares), statistics.mean(shares))

    @property
    def enough(self) -> bool:
        """In noise, heads are nearly alike: where two change places by rounding, a row's routed selection is another.

        So a few rows may differ, but half of them must agree up to ties at the boundary.
        """
        return self.median >= 0.998 and self.mean >= 0.98


class Case:
    """One prompt's keys in shuffled pages, and the queries of its last rows."""

    def __init__(self, rows: int, keys: int, heads: int, seed: int, device: str = "cuda") -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.keys = keys
        self.k = normal(keys, 128).to(torch.float8_e4m3fn)
        self.k_scale = torch.rand(keys, generator=generator, device=device) + 0.5
        self.q = [normal(rows, heads, 128).to(torch.float8_e4m3fn) for _ in range(INPUT_SETS)]
        self.weights = [normal(rows, heads) * 0.1 for _ in range(INPUT_SETS)]
        pages = pack_pages(self.k, self.k_scale)
        order = torch.randperm(len(pages), generator=generator, device=device)
        self.pool = torch.empty_like(pages)
        self.pool[order] = pages
        self.page_table = order.to(torch.int32)[None]
        self.plan: RowPlan = plan_extend([keys - rows], [rows], device)
        self.ks = torch.zeros(rows, dtype=torch.int32, device=device)
        self.out = torch.empty((rows, 2048), dtype=torch.int32, device=device)

    def native(self, turn: int) -> None:
        logits = deep_gemm.fp8_mqa_logits(
            self.q[turn], (self.k, self.k_scale), self.weights[turn], self.ks, self.plan.row_lengths, clean_logits=False
        )
        topk_transform_ragged_v2(
            logits, self.plan.row_lengths, out_offsets=self.ks, out_indices=self.out, row_starts=self.ks
        )

    def mode(self, name: str, turn: int, backend: str = "gpu", output: str = "slot") -> torch.Tensor:
        """What a mode of MODES, or native, selects; in self.out, which the next call overwrites."""
        mode, params = ("misa_rerank", PAGES) if name == "misa_rerank_pages" else (name, PARAMS)
        return select_rows(
            mode,
            self.q[turn],
            self.weights[turn],
            self.pool,
            self.page_table,
            self.plan,
            params,
            backend=backend,
            output=output,
            top_k_kernel=sglang_top_k if backend == "gpu" else None,
            out=self.out,
        )

    def expected(self, name: str, count: int, output: str) -> list[set[int]]:
        """What the reference backend selects for the last `count` rows alone."""
        mode, params = ("misa_rerank", PAGES) if name == "misa_rerank_pages" else (name, PARAMS)
        plan = plan_extend([self.keys - count], [count], self.q[0].device)
        q, weights = self.q[0][-count:], self.weights[0][-count:]
        return _sets(
            select_rows(mode, q, weights, self.pool, self.page_table, plan, params, backend="reference", output=output)
        )

    def agreement(self, name: str, count: int) -> Agreement:
        """Of the last `count` rows of a timed call: what it selects among all rows, against the reference for these."""
        count = min(count, len(self.out))
        if name == "native":
            self.native(0)  # without an offset its ragged indices are positions
            return Agreement.of(_sets(self.out[-count:]), self.expected(name, count, "position"), None)
        got = _sets(self.mode(name, 0)[-count:])
        native = self.expected("native", count, "slot") if name in RERANKING else None
        return Agreement.of(got, self.expected(name, count, "slot"), native)


def _sets(selected: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in selected.tolist()]


def agreement(name: str, heads: int) -> Agreement:
    """Measured on 96 rows of 20000 keys."""
    case = Case(96, 20000, heads, seed=1)

    def rows(mode: str, backend: str) -> list[set[int]]:
        return _sets(case.mode(mode, 0, backend, output="position"))

    native = rows("native", "reference") if name in RERANKING else None
    return Agreement.of(rows(name, "gpu"), rows(name, "reference"), native)


def scratch_gib(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(rows: int, keys: int, heads: int, modes: list[str], rounds: int) -> list[dict]:
    case = Case(rows, keys, heads, seed=2)
    work: dict[str, Callable[[int], object]] = {"native": case.native}
    work |= {mode: functools.partial(case.mode, mode) for mode in modes}
    timings: dict[str, list[Timing]] = {name: [] for name in work}
    for step in range(rounds + 3):
        for name, run in work.items():
            spent = timed(functools.partial(run, step % INPUT_SETS))
            if step >= 3:
                timings[name].append(spent)
    agreed = {name: case.agreement(name, CHECKED_ROWS) for name in work}
    if wrong := {name: found for name, found in agreed.items() if found.median < LEAST_AGREEMENT}:
        shares = ", ".join(f"{name} {found.median:.4f}" for name, found in wrong.items())
        raise bench_decode.DisagreementError(
            f"{heads} heads, {rows} rows, {keys} keys: {shares} of the reference's tokens"
        )
    times = {name: [spent.device for spent in of_mode] for name, of_mode in timings.items()}
    native = statistics.median(times["native"])
    return [
        {
            "mode": name,
            "heads": heads,
            "rows": rows,
            "keys": keys,
            "ms": statistics.median(values),
            "ms_min": min(values),
            "ms_max": max(values),
            "times_native": native / statistics.median(values),
            "launch_ms": statistics.median(spent.launch for spent in timings[name]),
            "scratch_gib": scratch_gib(functools.partial(work[name], 0)),
            "agreement": agreed[name].median,
        }
        for name, values in times.items()
    ]


def main() -> int:
    phase = argparse.ArgumentParser(add_help=False)
    phase.add_argument("--phase", choices=("prefill", "decode"), default="prefill")
    chosen, others = phase.parse_known_args()
    if chosen.phase == "decode":
        return bench_decode.main(others)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[64, 32], help="indexer heads: 64 DeepSeek-V3.2, 32 GLM-5"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 2048])
    parser.add_argument("--keys", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="write the raw results here")
    parser.add_argument("--phase", choices=("prefill", "decode"), help="default prefill; decode has options of its own")
    args = parser.parse_args()
    results, checks = [], []
    failures: list[str] = []
    for heads in args.heads:
        for mode in args.modes:
            found = agreement(mode, heads)
            checks.append({"mode": mode, "heads": heads, **found._asdict()})
            if not found.enough:
                print(f"FAIL {mode} H={heads}: {found} of the reference's tokens; nothing is timed", file=sys.stderr)
                return 1
        for keys in args.keys:
            for rows in args.rows:
                case = functools.partial(measure, rows, keys, heads, args.modes, args.rounds)
                for row in bench_decode.kept(case, failures):
                    results.append(row)
                    print(
                        f"H={row['heads']} rows={row['rows']:5d} keys={row['keys']:6d} {row['mode']:17s} "
                        f"{row['ms']:7.3f} ms  {row['times_native']:5.2f}x  {row['launch_ms']:.2f} ms to launch  "
                        f"{row['scratch_gib']:.2f} GiB scratch",
                        flush=True,
                    )
                if args.json:  # after every case: what was measured outlives what comes
                    bench_decode.write(args.json, checks, results, failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
