"""The tables of README.md and docs/ state what the records in docs/results hold, rounded as they are shown."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
MODES = ("misa", "misa_rerank", "hisa", "group_rerank")
TTFT = {"16": "ttft_16_heads.json", "128": "ttft_128_heads.json"}
STATISTICS = {
    "mean, sum, 1024 (MISA's)": "mean, sum, 1024",
    "**mean, 128** (the default)": "mean, 128",
    "mean and spread, 1024": "spread, 1024",
    "mean and spread, 128": "spread, 128",
    "signed mean, 128": "signed, 128",
    "per-channel bounds, 128": "bounds, 128",
    "one key of 16, no block": "keys, 1 of 16",
    "oracle (what native's tokens score)": "oracle",
}

KERNELS = {  # row of the table: what the kernels' names hold whose times add up to it
    "DeepGEMM logits": ("sm90_fp8_mqa_logits",),
    "scan with 8 heads, a bit a token": ("routed_mask",),
    "scores of listed tokens": ("token_scores",),
    "sample: scan, threshold": ("routed_scores", "sample_threshold"),
    "lists from bits": ("bit_list",),
    "head routing": ("head_route",),
    "block scores": ("block_score",),
    "choice of blocks": ("page_select",),
    "DeepGEMM logits of chosen pages": ("sm90_fp8_paged_mqa_logits<",),
    "top-k": ("::topk_",),
}


def record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(page: str, *head: str) -> list[list[str]]:
    """Cells of the table on the page whose head begins with these cells."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| " + " | ".join(head)))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows, head
    return rows


def agree(cell: str, *values: float) -> bool:
    """Whether the numbers that a cell shows first are these values, rounded to as many digits."""
    shown = re.findall(r"\d+\.\d+|\d+", cell)[: len(values)]
    digits = [len(text.partition(".")[2]) for text in shown]
    return len(shown) == len(values) and all(
        abs(float(text) - value) <= 0.5 * 10**-places + 1e-9 for text, places, value in zip(shown, digits, values)
    )


def test_numbers_are_compared_as_they_are_shown():
    assert agree("**9.06x** (10)", 9.0596) and agree("0.975 (0.803)", 0.9746, 0.8032) and agree("50 us", 49.76)
    assert not agree("9.07x", 9.0596) and not agree("0.975 (0.804)", 0.9746, 0.8032) and not agree("-", 1.0)


def test_stage():
    found = {
        (one["heads"], one["rows"], one["keys"], one["mode"]): one
        for one in record("prefill_stage/stage.json")["results"]
    }
    for heads, rows, keys, native, *modes in table("docs/performance.md", "H", "rows", "keys"):
        case = int(heads), int(rows), int(keys)
        assert agree(native, found[(*case, "native")]["ms"]), (case, native)
        for mode, cell in zip(MODES, modes, strict=True):
            assert agree(cell, found[(*case, mode)]["times_native"]), (case, mode, cell)


def test_decode():
    found = {
        (one["batch"], one["context"], one["mode"]): one
        for one in record("decode_stage/decode.json")["results"]
        if one["heads"] == 64
    }
    for batch, context, native, hisa, times, _ in table("docs/performance.md", "batch", "context"):
        case = int(batch), int(context)
        assert agree(native, found[(*case, "native")]["us"]) and agree(hisa, found[(*case, "hisa")]["us"]), case
        assert agree(times, found[(*case, "hisa")]["times_native"]), (case, times)


@pytest.mark.parametrize(("page", "head"), [("docs/performance.md", "heads"), ("README.md", "time to first token")])
def test_time_to_first_token(page, head):
    for cells in table(page, head):
        heads, prompt = cells[:2] if head == "heads" else ("16", cells[0])
        tokens = 1024 * int(re.findall(r"\d+", prompt)[0])
        times = record(f"prefill_stage/{TTFT[heads]}")["ttft_s"][str(tokens)]
        medians = {mode: statistics.median(values) for mode, values in times.items()}
        native, *modes = cells[2:] if head == "heads" else cells[1:]
        assert agree(native, medians["native"]), (prompt, native)
        for mode, cell in zip((*MODES, "auto"), modes, strict=True):
            assert agree(cell, medians["native"] / medians[mode]), (prompt, mode, cell)


def test_recall_of_the_served_model():
    lines = record("token_candidates/recall_served.json")["lines"]
    found = {(one["context"], one["mode"], one["layer"]): one for one in lines}
    for context, mode, *layers, of_all, mass in table("docs/quality.md", "context", "mode", "layer 0"):
        case = 1024 * int(context.removesuffix("K")), mode
        for layer, cell in enumerate(layers):
            assert agree(cell, found[(*case, layer)]["recall_mean"]), (case, layer, cell)
        whole = found[(*case, None)]
        assert agree(of_all, whole["recall_mean"], whole["recall_min"]) and agree(mass, whole["mass_mean"]), case


def test_answers_of_the_served_model():
    cells = [
        one for name in ("ruler_32k", "ruler_32k_hard") for one in record(f"small_dsa_served/{name}.json")["cells"]
    ]
    found = {(one["cell"], one["mode"]): one for one in cells}
    for tasks, *scores in table("docs/quality.md", "32K", "native"):
        first, *others = tasks.split(", ")
        for task in (first, *(first.rpartition("_")[0] + "_" + other for other in others)):
            for mode, cell in zip(("native", "misa_rerank", "group_rerank", "misa", "hisa"), scores, strict=True):
                one = found[f"{task}/32768", mode]
                wanted = [one["score"], one["standard_error"]] if "(" in cell else [one["score"]]
                assert agree(cell, *wanted), (task, mode, cell)


def test_heads_and_budget():
    lines = [one for one in record("token_candidates/sweep_heads_candidates.json")["lines"] if one["layer"] is None]
    found = {(one["params"]["active_heads"], one["params"]["candidates"]): one for one in lines}
    for candidates, *cells in table("docs/quality.md", "candidates", "4 heads"):
        for heads, cell in zip((4, 8, 16), cells, strict=True):
            one = found[heads, int(candidates)]
            assert agree(cell, one["recall_mean"], one["work"]), (heads, candidates, cell)


def test_statistics_that_route():
    entries = record("token_candidates/routing_study.json")["entries"]
    for name, *cells in table("docs/quality.md", "statistic (largest"):
        for (heads, candidates), cell in zip(((8, 8192), (8, 12288), (16, 8192), (16, 12288)), cells, strict=True):
            wanted = (STATISTICS.get(name, name), heads, candidates)
            layers = [one for one in entries if (one["statistic"], one["heads"], one["candidates"]) == wanted]
            values = [statistics.mean(one["recall"] for one in layers)]
            values += [one["recall"] for one in layers if one["layer"] == 0] if "(" in cell else []
            assert agree(cell, *values), (name, cell, values)


def test_computed_traces():
    lines = record("small_dsa/recall_modes_32k.json")["lines"]
    for name, *layers, of_all, mass, work in table("docs/quality.md", "mode", "layer 0"):
        unit = "page" if "pages" in name else "token"
        mine = [one for one in lines if one["mode"] == name.partition(",")[0]]
        found = {one["layer"]: one for one in mine if one["params"].get("candidate_unit", unit) == unit}
        for layer, cell in enumerate(layers):
            assert agree(cell, found[layer]["recall_mean"]), (name, layer, cell)
        whole = found[None]
        assert agree(of_all, whole["recall_mean"], whole["recall_min"]), (name, of_all)
        assert agree(mass, whole["mass_mean"]) and agree(work, whole["work"]), (name, mass, work)


def test_study_of_decode():
    found = record("small_dsa/study_decode.json")
    entries = found["tasks"]["niah_multikey_2"]
    rows = table("docs/quality.md", "candidates of an answer's rows")
    for (name, read, answers, tokens, layer), (choice, entry) in zip(rows, entries.items(), strict=True):
        assert int(answers) == entry["answers"] and int(tokens) == entry["right"], name
        assert (entry["questions"], entry["tokens"]) == (12, 36)
        assert int(read) == found["bytes"].get(choice, 132), name
        of_layer = entry["layers"].get("2", {"recall": 1.0, "best": 1.0})
        assert agree(layer, of_layer["recall"], of_layer["best"]), (name, layer)


def test_kernel_times():
    found = {one["mode"]: one["kernels"] for one in record("prefill_stage/profile.json")["results"]}
    rows = table("docs/performance.md", "kernel", "native")
    assert {row[0] for row in rows} == set(KERNELS)
    for name, *cells in rows:
        for mode, cell in zip(("native", "misa", "misa_rerank", "hisa"), cells):
            times = [one["ms"] for one in found[mode] if any(part in one["kernel"] for part in KERNELS[name])]
            assert agree(cell, sum(times)) if times else cell == "", (name, mode, cell)


def test_answers_when_decode_chooses_by_blocks():
    scores = [
        {one["cell"]: one for one in record(f"decode_served/ruler_{mode}.json")["cells"]} for mode in ("native", "hisa")
    ]
    for task, *cells in table("docs/quality.md", "decode, 32K"):
        for of_mode, cell in zip(scores, cells, strict=True):
            one = of_mode[f"{task}/32768"]
            assert agree(cell, one["score"], *([one["standard_error"]] if "(" in cell else [])), (task, cell)
    averages = [statistics.mean(one["score"] for one in of_mode.values()) for of_mode in scores]
    for page in ("README.md", "docs/performance.md"):
        text = " ".join((ROOT / page).read_text().split())
        [(hisa, native)] = re.findall(r"answers (\d+) % of needles (?:at 32K )?where native answers (\d+) %", text)
        assert agree(native, averages[0]) and agree(hisa, averages[1]), page


def test_tokens_per_second():
    stages = {(one["context"], one["mode"]): one["us"] for one in record("decode_stage/decode_32.json")["results"]}
    records = {"20": "rate_20_layers", "12": "rate_12_layers_128k"}
    for layers, context, native, hisa, times, *rest in table("docs/performance.md", "layers", "context"):
        found = record(f"decode_served/{records[layers]}.json")
        medians = {mode: statistics.median(found["tokens_per_s"][mode]) for mode in ("native", "hisa")}
        assert (found["batch"], found["context"]) == (32, int(context))
        assert agree(native, medians["native"]) and agree(hisa, medians["hisa"])
        assert agree(times, medians["hisa"] / medians["native"]), layers
        steps = [1e3 * found["batch"] / medians[mode] for mode in ("native", "hisa")]
        wanted = [*steps, *(stages[int(context), mode] for mode in ("native", "hisa"))]
        assert all(agree(cell, value) for cell, value in zip(rest, wanted, strict=True)), (layers, rest, wanted)


@pytest.mark.parametrize(("head", "name"), [("32K, 4 clients", "bench"), ("128K, 4 clients", "bench_128k")])
def test_benchmark_of_a_served_model(head, name):
    found = {one["mode"]: one["values"] for one in record(f"deployment/{name}.json")["results"]}
    measured = ("median_ttft_ms", "median_tpot_ms", "total_throughput")
    for metric, (_, *cells) in zip(measured, table("docs/results/deployment.md", head), strict=True):
        medians = [statistics.median(found[mode][metric]) for mode in ("native", "misa_rerank", "hisa")]
        for cell, value in zip(cells, medians, strict=True):
            times = value / medians[0] if metric == "total_throughput" else medians[0] / value
            assert agree(cell.replace(",", ""), value, *([times] if "(" in cell else [])), (metric, cell)


def test_throughput_of_the_front_page():
    text = " ".join((ROOT / "README.md").read_text().split())
    [shown] = re.findall(r"clients: ([\d.]+)x native's throughput with misa_rerank, ([\d.]+)x with hisa", text)
    found = {
        one["mode"]: statistics.median(one["values"]["total_throughput"])
        for one in record("deployment/bench_128k.json")["results"]
    }
    for mode, times in zip(("misa_rerank", "hisa"), shown, strict=True):
        assert agree(times, found[mode] / found["native"]), mode


def test_soaks():
    seconds = statistics_read = retractions = 0
    for server, _, shown, requests, prompts, compared, retracted, held in table("docs/performance.md", "server"):
        [name] = re.findall(r"`(soak\w*)", server)
        [run] = record(f"decode_served/{name}.json")["runs"]
        totals, read = run["totals"], run["after"]["integrity_checked"] - run["before"]["integrity_checked"]
        assert agree(shown, run["seconds"]) and int(requests) == sum(totals["requests"].values()), server
        share = 100 * totals["cached_tokens"] / totals["prompt_tokens"]
        assert agree(prompts, totals["prompt_tokens"] / 1e6, share) and agree(compared, read / 1e6), server
        assert totals["errors"] == run["after"]["integrity_mismatches"] == 0
        assert int(retracted) == totals["retractions"], server
        if held != "not judged":
            memory = [mib for _, mib in run["memory_mib" if "on the GPU" in held else "reserved_mib"]]
            half = len(memory) // 2
            assert agree(held.replace("the same", "0"), max(memory[half:]) - max(memory[:half])), server
        seconds, statistics_read = seconds + run["seconds"], statistics_read + read
        retractions += totals["retractions"]
    assert (round(seconds / 60), round(statistics_read / 1e6), retractions) == (40, 976, 639)
