"""Starts SGLang servers with the plugin on a tiny model and checks that what was asked for ran and answered right.

    python scripts/check_server.py --out DIR [--scenarios modes decode_graph paged unfused sets eagle_native eagle
                                   layers answers answers_graph answers_decode answers_bf16] [--repeats 5]
                                   [--port 30000] [further arguments of sglang.launch_server]

Every scenario starts a server, and DIR/<scenario>.json holds what it measured, with commit, GPU and command. Scenarios
may run side by side in several calls with ports of their own; time to first token means something only alone.
    modes         fp8 KV, ragged top-k; each prefill mode in turn in one server: greedy answers against native within
    the budget, answers alone against concurrent and cached, time to first token interleaved over the modes
    decode_graph  decode_mode=hisa under CUDA graphs, answers against the `modes` server's native ones within the budget
    paged         flashmla_kv prefill: paged slots; decode_mode=hisa without CUDA graphs
    Where hisa decodes, check_integrity compares its stored block statistics with the keys in every forward.
    unfused       SGLANG_DSA_FUSE_TOPK=0 and mixed chunks: logical positions
    sets          the token sets each layer selected, read back from the server, against native's
    eagle_native  speculative decoding (EAGLE by the model's own draft layer), native
    eagle         the same with decode_mode=hisa, answers against eagle_native's within the budget
    layers        a settings file with a mode of its own for each of four layers: each ran it, answers against the
    `modes` server's native ones within the budget
    answers       the small trained model of the repository, needle prompts: what `modes` checks of answers, where they
    show what was selected
    answers_graph  the same with SGLang's prefill CUDA graphs, which the other servers switch off, and shadow sampling
    answers_decode  decode_mode=hisa under CUDA graphs on the same model: it names the needles within its budget
    answers_bf16  the same from a bf16 KV cache with flashmla_sparse, top-k not fused (SGLANG_DSA_FUSE_TOPK=0)
With dummy weights an answer follows from the last token alone: equal answers show that nothing crashed or became NaN,
not that the right tokens were selected. `answers_tell` in a record says whether they do. A mode whose counters do not
show it fails the run. Needs an sm_90 GPU and SGLang.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from needle_checks import SMALL_MODEL, check_answers, check_graph_answers, check_needle_decode
from selection_sets import selected_sets, shares
from server_checks import MODES, NEW_TOKENS, Check, check_integrity, check_modes, prompt, runs
from server_process import Server, arguments_without, launch
from tiny_model import write_model

TIMED = (*MODES, "auto")  # auto: native below its break-even, at no cost
WITHIN_BUDGET = (200, 2500, 7000)
LONG = (20000, 33000)
CONTEXTS = (32768, 65536, 131072)
EAGLE = [
    "--speculative-algorithm=EAGLE", "--speculative-num-steps=3", "--speculative-eagle-topk=1",
    "--speculative-num-draft-tokens=4",
]  # fmt: skip
SCENARIOS = (
    "modes", "decode_graph", "paged", "unfused", "sets", "eagle_native", "eagle", "layers", "answers", "answers_graph",
    "answers_decode", "answers_bf16",
)  # fmt: skip
# Budgets hold WITHIN_BUDGET; the file's modes run from the first token on.
LAYERS_FILE = {
    "format": 1,
    "tuned_on": {"num_layers": 4, "heads": 64, "top_k": 2048},
    "prefill_mode": "auto",
    "prefill_min_tokens": 1,
    "prefill_min_rows": 1,
    "layers": {
        "0": {"prefill_mode": "native"},
        "1": {"prefill_mode": "misa_rerank", "active_heads": 4},
        "2": {"prefill_mode": "hisa", "top_blocks": 96},
        "3": {"prefill_mode": "misa_rerank", "active_heads": 16, "candidates": 12288},
    },
}
SET_PROMPTS = (3000, 18000)  # within every budget, and so far beyond that re-ranking prunes


def dummy_prompts() -> tuple[list[list[int]], list[list[int]]]:
    return [prompt(n, seed=n) for n in WITHIN_BUDGET], [prompt(n, seed=n) for n in LONG]


def measure_ttft(server: Server, check: Check, repeats: int) -> None:
    """Seconds to the first token, modes interleaved, fresh prompts: medians per context and mode."""
    times: dict[str, dict[str, list[float]]] = {str(n): {mode: [] for mode in TIMED} for n in CONTEXTS}
    before = {mode: runs(server, f"prefill/{mode}") for mode in MODES}
    seed = 10**6
    for context in CONTEXTS:
        for turn in range(repeats + 1):
            for mode in TIMED:
                server.switch_prefill(mode)
                ids, seed = prompt(context, seed), seed + 1
                server.flush()
                began = time.perf_counter()
                server.generate(ids, 1)
                if turn:  # the first turn builds what is built lazily
                    times[str(context)][mode].append(time.perf_counter() - began)
    check.record["ttft_s"] = times
    ran = {mode: runs(server, f"prefill/{mode}") - before[mode] for mode in MODES}
    check.record["ttft_device_runs"] = ran
    prompts = (repeats + 1) * len(CONTEXTS)
    for mode in MODES[1:]:
        check.expect(ran[mode] >= prompts, f"{mode}: {ran[mode]} runs on the device for {prompts} timed prompts")
    for shown_context, by_mode in times.items():
        medians = {mode: statistics.median(values) for mode, values in by_mode.items()}
        shown = "  ".join(f"{m} {v:.3f} s ({medians['native'] / v:.2f}x)" for m, v in medians.items())
        print(f"  ttft {shown_context:>6}: {shown}", flush=True)


def check_drafts(server: Server, check: Check, mode: str) -> None:
    """Speculative decoding: greedy answers, and how many draft tokens were taken. hisa must have verified them."""
    before = runs(server, "decode/hisa")
    answers = []
    for num_tokens in WITHIN_BUDGET:
        server.flush()
        answers.append(server.generate(prompt(num_tokens, num_tokens), 4 * NEW_TOKENS))
    with ThreadPoolExecutor(len(WITHIN_BUDGET)) as pool:
        server.flush()
        together = list(pool.map(lambda n: server.generate(prompt(n, n), 4 * NEW_TOKENS), WITHIN_BUDGET))
    check.record["decode_answers"] = answers
    check.record["together_equal"] = sum(a == b for a, b in zip(answers, together))
    check.record["long"] = server.generate(prompt(LONG[1], LONG[1]), 4 * NEW_TOKENS)
    if mode == "hisa":
        ran = runs(server, "decode/hisa") - before
        check.expect(ran > 0, f"decode/hisa: {ran} runs on the device")
        check_integrity(server, check)


def check_decode(server: Server, check: Check, graph: bool) -> None:
    """decode_mode=hisa: it ran for every token, under graphs where they are on."""
    before = runs(server, "decode/hisa")
    answers = []
    for num_tokens in WITHIN_BUDGET:
        server.flush()
        answers.append(server.generate(prompt(num_tokens, num_tokens), NEW_TOKENS))
    long = server.generate(prompt(LONG[0], LONG[0]), 24)
    check.record["decode_answers"] = [*answers, long]
    ran = runs(server, "decode/hisa") - before
    expected = (NEW_TOKENS - 1) * len(WITHIN_BUDGET) + 23
    check.expect(ran >= expected, f"decode/hisa: {ran} runs on the device for {expected} decode steps")
    captured = [entry for entry in server.status()["captured"] if entry["mode"] == "hisa"]
    check.expect(bool(captured) == graph, f"decode/hisa {'in' if graph else 'without'} CUDA graphs")
    check.expect(len(long) == 24 and len({tuple(a) for a in answers}) > 1, "long context served")
    check_integrity(server, check)


def check_sets(server: Server, check: Check, layers: int) -> None:
    """Token sets against native's: the same within the budget, others beyond it, well-formed everywhere.

    Native again is the yardstick: SGLang's top-k cuts equal scores at the boundary as it likes. Only layer 0 has the
    same input in all modes; behind it every layer sees what the one before attended to.
    """
    record: dict = check.record.setdefault("shares_of_native", {})
    for num_tokens in SET_PROMPTS:
        within = num_tokens <= 8192
        want = None
        for name in ("native", "native again", *MODES[1:]):
            mode = name.split()[0]
            server.switch_prefill(mode)
            server.flush()
            before = runs(server, f"prefill/{mode}")
            got = selected_sets(server, prompt(num_tokens, num_tokens), layers, 2048)
            want = got if want is None else want
            found = shares(got, want)
            record.setdefault(str(num_tokens), {})[name] = found
            if mode == "native":
                check.expect(found[0] > 0.9999, f"{num_tokens} tokens, {name}: layer 0 has {found[0]:.6f} of its sets")
                continue
            check.expect(runs(server, f"prefill/{mode}") > before, f"{num_tokens} tokens, {mode}: the device ran it")
            if within and mode != "misa":
                check.expect(found[0] > 0.9999, f"{num_tokens} tokens, {mode}: layer 0 has {found[0]:.6f} of native's")
            else:
                pruned = 0.05 < found[0] < 0.9999  # native again has more
                check.expect(pruned, f"{num_tokens} tokens, {mode}: another selection, {found[0]:.3f} of native's")


def check_layers(server: Server, check: Check) -> None:
    """LAYERS_FILE: every layer's mode is counted and ran on the device."""
    answers = []
    for num_tokens in (*WITHIN_BUDGET, LONG[0]):
        server.flush()
        answers.append(server.generate(prompt(num_tokens, num_tokens), NEW_TOKENS))
    listed = [one for one in server.status()["calls"] if one["phase"] == "prefill"]
    names = ("native", "misa_rerank", "hisa")
    ran = {mode: sum(one["calls"] for one in listed if one["mode"] == mode) for mode in names}
    check.record |= {"layer_answers": answers, "layer_calls": ran}
    even = ran["hisa"] > 0 and ran["native"] == ran["hisa"] and ran["misa_rerank"] == 2 * ran["hisa"]
    check.expect(even, f"calls of layers native, misa_rerank, hisa, misa_rerank: {ran}")
    for name in ("misa_rerank", "hisa"):
        check.expect(runs(server, f"prefill/{name}") > 0, f"layers: the device ran {name}")


def run_scenario(name: str, model: Path, out: Path, repeats: int, layers: int, port: int, arguments: list[str]) -> dict:
    check = Check(name)
    options = {
        "modes": ({"prefill_mode": "misa_rerank", "decode_mode": "native", "runtime_switch": "1"}, [], {}),
        "decode_graph": ({"prefill_mode": "native", "decode_mode": "hisa", "check_integrity": "1"}, [], {}),
        "paged": (
            {"prefill_mode": "hisa", "decode_mode": "hisa", "runtime_switch": "1", "check_integrity": "1"},
            ["--dsa-prefill-backend", "flashmla_kv", "--disable-cuda-graph"],
            {},
        ),
        "unfused": (
            {"prefill_mode": "misa_rerank", "decode_mode": "native", "runtime_switch": "1"},
            ["--enable-mixed-chunk"],
            {"SGLANG_DSA_FUSE_TOPK": "0"},
        ),
        "eagle_native": ({"prefill_mode": "native", "decode_mode": "native"}, EAGLE, {}),
        "eagle": ({"prefill_mode": "native", "decode_mode": "hisa", "check_integrity": "1"}, EAGLE, {}),
        "sets": (
            {"prefill_mode": "misa_rerank", "decode_mode": "native", "runtime_switch": "1"},
            # SGLang keeps the sets of every token of the pool in host memory: a small pool.
            ["--enable-return-indexer-topk", "--max-total-tokens=32768", "--context-length=20000"],
            {"SGLANG_DSA_FUSE_TOPK": "0"},
        ),
        "layers": (
            {"settings_file": str(out / "layers_settings.json"), "decode_mode": "native"},
            [],
            {},
        ),
    }
    options["answers"] = options["modes"]
    options["answers_graph"] = ({**options["modes"][0], "shadow_rate": "1"}, [], {})
    options["answers_decode"] = options["decode_graph"]
    options["answers_bf16"] = (
        options["decode_graph"][0],
        ["--kv-cache-dtype=bf16", "--dsa-decode-backend=flashmla_sparse"],
        {"SGLANG_DSA_FUSE_TOPK": "0"},
    )
    (out / "layers_settings.json").write_text(json.dumps(LAYERS_FILE, indent=1))
    settings, extra, environ = options[name]
    print(f"{name}: {settings} {' '.join(extra)}", flush=True)
    extra = [*extra, *arguments]
    dummy = not name.startswith("answers")
    model = model if dummy else SMALL_MODEL
    check.record["model"] = json.loads((model / "config.json").read_text()) | {"dummy_weights": dummy}
    left_out = ["--disable-prefill-cuda-graph"] if name == "answers_graph" else []
    settings = {**settings, "strict": "1"}
    with launch(
        model, out / f"{name}.log", settings, extra, environ, port, dummy, arguments_without(*left_out)
    ) as server:
        check.record["start_s"] = server.start_s
        if name == "modes":
            check_modes(server, check, MODES, *dummy_prompts())
            measure_ttft(server, check, repeats)
        elif name == "answers":
            check_answers(server, check, MODES)
        elif name == "answers_graph":
            check_graph_answers(server, check, MODES)
        elif name in ("answers_decode", "answers_bf16"):
            check_needle_decode(server, check)
        elif name == "decode_graph":
            check_decode(server, check, graph=True)
        elif name.startswith("eagle"):
            check_drafts(server, check, "native" if name == "eagle_native" else "hisa")
        elif name == "sets":
            check_sets(server, check, layers)
        elif name == "layers":
            check_layers(server, check)
        else:
            check_modes(server, check, ("native", "misa_rerank", "hisa"), *dummy_prompts())
            if name == "paged":
                server.switch_prefill("native")
                check_decode(server, check, graph=False)
        check.record["status"] = server.status()
    (out / f"{name}.json").write_text(json.dumps(check.record, indent=1))
    return check.record


def compare_decode(out: Path) -> list[str]:
    """What differs between the answers of decode_mode=hisa, or of LAYERS_FILE, and native's, within the budget.

    Two servers of one model, so it is asked once the records of both are there, whichever call finished last.
    """
    differing = []
    for name, answers, native, answers_of in (
        ("decode_graph", "decode_answers", "modes", lambda record: record["answers"]["native"]["alone"]),
        ("layers", "layer_answers", "modes", lambda record: record["answers"]["native"]["alone"]),
        ("eagle", "decode_answers", "eagle_native", lambda record: record["decode_answers"]),
    ):
        paths = [out / f"{name}.json", out / f"{native}.json"]
        if not paths[0].is_file():
            continue
        if not paths[1].is_file():
            print(f"  ---- {name}: not compared with native, {paths[1]} is missing: run --scenarios {native} too")
            continue
        decode, other = (json.loads(path.read_text()) for path in paths)
        want = answers_of(other)[: len(WITHIN_BUDGET)]
        got = decode[answers][: len(WITHIN_BUDGET)]
        decode["equals_native_within_budget"] = got == want
        decode["answers_tell"] = other.get("answers_tell", False)
        paths[0].write_text(json.dumps(decode, indent=1))
        print(f"  {'ok  ' if got == want else 'FAIL'} {name}: native's answers to prompts of {WITHIN_BUDGET} tokens")
        differing += [] if got == want else [f"{name}: other answers than native's within the budget"]
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny model is written to OUT/model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16, help="16: one rank of 8-way tensor parallelism")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=30000)
    args, arguments = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.model or args.out / "model"
    if args.model is None:
        write_model(model, args.layers, args.heads)
    failures: list[str] = []
    for name in args.scenarios:
        record = run_scenario(name, model, args.out, args.repeats, args.layers, args.port, arguments)
        failures += [f"{name}: {failure}" for failure in record["failures"]]
    failures += compare_decode(args.out)
    print("\n".join(["failed:", *failures]) if failures else "all checks passed", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
