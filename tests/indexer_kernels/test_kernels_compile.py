"""Every TileLang and Triton kernel, compiled for sm_90a on a machine without a GPU: no spills, no vanished products."""

import functools
import re
import subprocess

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")

from indexer_kernels.gpu import (
    bit_list_kernel,
    block_score_kernel,
    compile_check,
    decode_scores_kernel,
    group_scan_kernel,
    head_route_kernel,
    page_means_kernel,
    page_select_kernel,
    rescan_kernel,
    routed_pack_kernel,
    routed_scores_kernel,
    sample_kernel,
    sample_threshold_kernel,
    token_scores_kernel,
)
from indexer_kernels.gpu.compile_check import H200_SMS, compile_all, kernel_builders
from indexer_kernels.gpu.lists import empty_lists
from indexer_kernels.page_layout import PAGE_TOKENS
from indexer_kernels.params import IndexerParams
from indexer_kernels.row_plan import TILE_ROWS
from tests.support.sm90a import TRITON_TOOLS, compile_sm90a, opcodes_of

# name: (prim_func, matrix instructions it must keep: one per 32 bytes of head dim in fp8, per 16 elements in bf16;
# three times as many where a loop is pipelined, which peels its last two turns)
KERNELS = {
    "head_route 64 of 8": (lambda: head_route_kernel.head_route_prim_func(64, 8, 1024, "sum"), ("HGMMA.64x128x16", 24)),
    "head_route 32 of 8": (lambda: head_route_kernel.head_route_prim_func(32, 8, 1024, "sum"), ("HGMMA.64x128x16", 24)),
    "head_route 64 of 16 by maxima": (
        lambda: head_route_kernel.head_route_prim_func(64, 16, 64, "max"),
        ("HGMMA.64x128x16", 24),
    ),
    "block_score 64": (lambda: block_score_kernel.block_score_prim_func(64, 128), ("HGMMA.64x256x16", 24)),
    "block_score 32": (lambda: block_score_kernel.block_score_prim_func(32, 128), ("HGMMA.64x256x16", 24)),
    "routed_pack": (lambda: routed_pack_kernel.routed_pack_prim_func(64, 8), None),
    **{
        f"routed_scores {active} {form}": (
            functools.partial(routed_scores_kernel.routed_scores_prim_func, active, form, H200_SMS),
            (f"QGMMA.64x{columns}x32", 4),
        )
        for active, columns in ((4, 128), (8, 256), (16, 256))
        for form in ("scores", "maxima", "mask")
    },
    **{
        f"token_scores {heads} of {rows}": (
            functools.partial(token_scores_kernel.token_scores_prim_func, heads, rows),
            (f"QGMMA.64x{max(16, heads * rows)}x32", 4),
        )
        for heads, rows in ((64, 1), (32, 1), (64, 2), (64, 4), (32, 4), (4, 1), (8, 1), (16, 1))
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_and_keeps_its_products(name, tmp_path):
    prim_func, products = KERNELS[name]
    kernel = compile_sm90a(prim_func(), tmp_path)
    assert kernel.spill_bytes == 0, f"{name} spills {kernel.spill_bytes} bytes"
    assert kernel.count("LDL") == kernel.count("STL") == 0, f"{name} uses local memory"
    assert "producer_ws" not in kernel.source, "TileLang's own warp specialisation must stay off"
    if products is None:
        assert kernel.count("QGMMA") == kernel.count("HGMMA") == 0
    else:
        opcode, number = products
        assert kernel.count(opcode) == number, f"{name}: {kernel.count(opcode)} {opcode}, expected {number}"


@pytest.mark.parametrize(
    ("unit_rows", "with_positions", "by_row"),
    [(32, False, False), (32, True, False), (16, False, False), (32, False, True), (32, True, True)],
)
def test_lists_of_bits_fit_three_blocks_and_wait_only_where_written(unit_rows, with_positions, by_row, tmp_path):
    prim_func = bit_list_kernel.bit_list_prim_func(unit_rows, 8192, 64, 128, with_positions, by_row)
    kernel = compile_sm90a(prim_func, tmp_path, bit_list_kernel.CONFIGS)
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    assert f"__launch_bounds__({bit_list_kernel.ROWS * 32}, {bit_list_kernel.CTAS_PER_SM})" in kernel.source
    # A barrier that TileLang adds would stand where only the warps with tokens left come by.
    assert kernel.source.count("__syncthreads()") == 1


@pytest.mark.parametrize("held", sample_threshold_kernel.HELD)
def test_thresholds_fit_their_blocks(held, tmp_path):
    constants = (sample_kernel.CELL, sample_kernel.MOST, sample_kernel.SIGMAS)
    prim_func = sample_threshold_kernel.sample_threshold_prim_func(8192, 64, 128, *constants, held)
    kernel = compile_sm90a(prim_func, tmp_path, sample_threshold_kernel.CONFIGS)
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    threads = sample_threshold_kernel.HELD[held]
    assert f"__launch_bounds__({threads}, {1536 // threads})" in kernel.source
    assert kernel.count("ATOMS.POPC.INC") == 2 * held // threads, "adds to a bin that lanes share are one operation"


@pytest.mark.parametrize("capacity", page_select_kernel.CAPACITIES)
@pytest.mark.parametrize(("budget", "unit_pages", "values"), [(128, 1, 4), (64, 2, 1)])
def test_page_select_does_not_spill(budget, unit_pages, values, capacity, tmp_path):
    if capacity * unit_pages > page_select_kernel.CAPACITIES[-1]:
        pytest.skip("a block never needs the capacity of the longest page list")
    compiled = page_select_kernel.compile_for(budget, unit_pages, values, 128, capacity)
    cubin = tmp_path / "page_select.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    opcodes = opcodes_of(cubin)
    assert sum(opcodes.values()) > 100
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills to local memory"


@pytest.mark.parametrize(
    ("compiled", "products"),
    [
        (sample_kernel.compile_sample_keys, None),
        (rescan_kernel.compile_gather, None),
        (lambda: rescan_kernel.compile_scores(8), "QGMMA.64x16x32"),
        (lambda: rescan_kernel.compile_choice(8, 8192, 64, 128, False), "QGMMA.64x16x32"),
    ],
    ids=[
        "sample_keys",
        "rescan_gather",
        "rescan_scores",
        "rescan_choice",
    ],
)
def test_token_kernels_do_not_spill_and_keep_their_products(compiled, products, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled().asm["cubin"])
    opcodes = opcodes_of(cubin)
    assert sum(opcodes.values()) > 100
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills to local memory"
    found = sum(count for opcode, count in opcodes.items() if "GMMA" in opcode)
    assert found == (4 if products else 0), "64 keys a warpgroup, one instruction per 32 bytes of head dim"
    assert found == sum(count for opcode, count in opcodes.items() if opcode.startswith(products or "no product"))


@pytest.mark.parametrize(
    ("kernel", "dynamic"),
    [
        (page_select_kernel.page_select_kernel, page_select_kernel.DYNAMIC),
        (sample_kernel.sample_keys_kernel, sample_kernel.COPIED),
        (rescan_kernel.gather_unsure_kernel, rescan_kernel.GATHERED),
        (rescan_kernel.rescan_scores_kernel, rescan_kernel.SCORED),
        (rescan_kernel.rescan_choice_kernel, rescan_kernel.CHOSEN),
    ],
    ids=str,
)
def test_runtime_arguments_do_not_specialise(kernel, dynamic):
    """A batch may change every argument that is not a constexpr; none of them may compile a second variant."""
    runtime = [param for param in kernel.params if not param.is_constexpr]
    assert [param.name for param in runtime] == dynamic
    assert all(param.do_not_specialize and param.do_not_specialize_on_alignment for param in runtime)


ROUTING = {"block_means 128", "head_route H=64", "routed_pack H=64"}
DECODE = {
    "page_means",
    "page_means from a page",
    "page_means of last pages",
    "page_means check",
    "candidate_counts",
    *(f"block_select {capacity}" for capacity in (512, 1024, 2048, 4096)),  # of 8192 pages, two to a block
}
ROUTED_DECODE = DECODE | {"route_statistics", "misa_rerank decode_scores"}
SCANS = {"routed_scores scores", "routed_scores mask", "sample_keys", "rescan_gather", "rescan_scores"}
STEPS = (
    *(f"sample_threshold {held}" for held in sample_threshold_kernel.HELD),
    *(f"{step} {output}" for step in ("candidate_list", "rescan_choice") for output in ("slot", "position")),
    "token_scores",
)


@pytest.mark.parametrize(
    ("mode", "unit", "names"),
    [
        ("misa", "token", SCANS | {f"misa {step}" for step in STEPS}),
        ("misa_rerank", "token", ROUTED_DECODE | SCANS | {f"misa_rerank {step}" for step in STEPS}),
        (
            "misa_rerank",
            "page",
            ROUTED_DECODE
            | {"routed_scores maxima"}
            | {f"page_select {capacity}" for capacity in page_select_kernel.CAPACITIES},
        ),
    ],
    ids=str,
)
def test_what_a_routed_mode_compiles(mode, unit, names):
    assert set(kernel_builders(IndexerParams(candidate_unit=unit), 64, (mode,))) == ROUTING | names


@pytest.mark.parametrize("positions", [False, True])
def test_a_list_finds_what_was_compiled_ahead_of_it(positions, monkeypatch):
    """By the very arguments that `functools.cache` compares; positions are for top-k that is not fused."""
    asked, params = [], IndexerParams()

    def build(*setting):
        asked.append(setting)
        return lambda *_arguments: None

    monkeypatch.setattr(bit_list_kernel, "build", build)
    builders = kernel_builders(params, 64, ("misa_rerank",))
    for name in ("slot", "position"):
        builders[f"misa_rerank candidate_list {name}"]()
    ahead, row = asked[:], torch.zeros(TILE_ROWS, dtype=torch.int32)
    unit = (1, 4, routed_scores_kernel.mask_words(params.active_heads))
    lists = empty_lists(TILE_ROWS, 128, positions, row.device)
    forced = (PAGE_TOKENS, params.local_tokens)
    bit_list_kernel.list_bits(
        row.new_zeros(unit), row, row, row, row, row.view(1, -1), lists, params.candidates, *forced
    )
    assert asked[-1] in ahead


def test_scans_are_compiled_for_the_sms_of_the_device(monkeypatch):
    """As a call asks for them: an H20 has 78 SMs, and must not compile its scans again during the first prompt."""
    asked = []
    for module in (routed_scores_kernel, group_scan_kernel):
        monkeypatch.setattr(module, "build", lambda *setting: asked.append(setting))
    params = IndexerParams(candidate_unit="page")

    def compile_scans():
        asked.clear()
        for mode, setting in (("misa_rerank", params), ("misa", params), ("group_rerank", params)):
            for name, build in kernel_builders(setting, 64, (mode,)).items():
                if name.startswith(("routed_scores", "group_scan")):
                    build()
        return {setting[-1] for setting in asked}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compile_scans() == {H200_SMS} and len(asked) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compile_check, "num_sms", lambda device: 78 if device.type == "cuda" else 0)
    assert compile_scans() == {78}


def test_what_hisa_compiles():
    prefill = {"block_means 128", "block_means 128 stored", "block_score H=32"}
    scores = {"hisa decode_scores", "hisa decode_scores and update"}
    assert set(kernel_builders(IndexerParams(), 32, ("hisa",))) == prefill | DECODE | scores
    near = kernel_builders(IndexerParams(local_tokens=127), 32, ("hisa",))
    assert "hisa decode_scores and update" not in near, "pages updated might be pages scored"
    odd = kernel_builders(IndexerParams(block_size=96), 32, ("misa_rerank",))
    assert "page_means" in odd and not set(odd) & {"route_statistics", "candidate_counts", "misa_rerank decode_scores"}


@pytest.mark.parametrize("num_heads", [64, 32])
@pytest.mark.parametrize("kernel", ["scores", "scores and update", "routed scores", "statistics"])
def test_decode_scores_read_means_in_whole_vectors_ahead_of_their_use(kernel, num_heads, tmp_path):
    if kernel == "statistics":
        compiled = decode_scores_kernel.compile_statistics(num_heads, IndexerParams())
    else:
        setting = (kernel == "routed scores", kernel == "scores and update")
        compiled = decode_scores_kernel.compile_scores(num_heads, IndexerParams(), *setting)
    opcodes = triton_opcodes(compiled, tmp_path)
    products = {opcode: count for opcode, count in opcodes.items() if "GMMA" in opcode}
    assert products == {f"HGMMA.64x{num_heads}x16.F32.BF16": 8}, "64 blocks, one instruction per 16 dimensions"
    vectors = sum(count for opcode, count in opcodes.items() if opcode.startswith("LDG") and opcode.endswith(".128"))
    assert vectors >= 16, "two pages of 64 blocks by 128 threads"
    narrow = sum(count for opcode, count in opcodes.items() if opcode.startswith("LDG") and ".U" in opcode)
    assert narrow == (64 if kernel == "scores and update" else 0), "a dimension per thread of the page that is updated"
    if kernel != "statistics":
        assert opcodes["LDGSTS.E.BYPASS.128"] >= 16, "the loop must be pipelined"
        assert compiled.metadata.shared <= 56 * 1024 and registers(tmp_path) <= 128, "four programs an SM"
    assert opcodes["HADD2.BF16_V2"] == 32, "pairs of means are added as pairs"


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: page_means_kernel.compile_update(False, False),
        lambda: page_means_kernel.compile_update(False, True),
        lambda: page_means_kernel.compile_update(True, False),
        page_means_kernel.compile_check,
        lambda: page_means_kernel.compile_blocks(2, False),
        lambda: page_means_kernel.compile_blocks(16, False),
    ],
    ids=["all", "from a page", "last", "check", "blocks of 2", "blocks of 16"],
)
def test_page_means_add_in_one_order(compiled, tmp_path):
    """64 fused multiply-adds for each of a thread's 4 dimensions, no sum over lanes: what makes means bitwise equal."""
    opcodes = triton_opcodes(compiled(), tmp_path)
    assert opcodes["FFMA"] == 4 * 64 and opcodes["FADD"] in (0, 4), "a block adds its pages up"
    assert not [opcode for opcode in opcodes if opcode.startswith("LDG.E.U8")]


def registers(folder):
    """Of a thread of the kernel that `triton_opcodes` was asked for last."""
    command = [TRITON_TOOLS / "cuobjdump", "-res-usage", str(folder / "kernel.cubin")]
    return int(re.search(r"REG:(\d+)", subprocess.run(command, capture_output=True, text=True).stdout).group(1))


def triton_opcodes(compiled, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    opcodes = opcodes_of(cubin)
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills to local memory"
    return opcodes


@pytest.mark.parametrize(
    ("module", "kernel", "names"),
    [
        (page_means_kernel, "update_means_kernel", "UPDATED"),
        (page_means_kernel, "check_means_kernel", "CHECKED"),
        (page_means_kernel, "block_means_kernel", "BLOCKS"),
        (decode_scores_kernel, "route_statistics_kernel", "ROUTED"),
        (decode_scores_kernel, "decode_scores_kernel", "SCORED"),
    ],
)
def test_runtime_arguments_specialise_on_alignment_alone(module, kernel, names):
    """Tensors whose rows are read whole: torch aligns them, always, so there is one variant all the same."""
    runtime = [param for param in getattr(module, kernel).params if not param.is_constexpr]
    assert [param.name for param in runtime] == getattr(module, names)
    for param in runtime:
        aligned = param.name in module.ALIGNED
        assert param.do_not_specialize == param.do_not_specialize_on_alignment == (not aligned)
        assert not aligned or param.name in ("q", "means", "page_means", "out", "keys", "scales"), "never a number"


def test_compile_all_reports_every_kernel_and_its_error(monkeypatch):
    def broken(*_args):
        raise RuntimeError("first line\nlast line")

    for module in (
        head_route_kernel,
        bit_list_kernel,
        group_scan_kernel,
        sample_threshold_kernel,
        block_score_kernel,
        routed_pack_kernel,
        routed_scores_kernel,
        token_scores_kernel,
    ):
        monkeypatch.setattr(module, "build", lambda *args: None)
    monkeypatch.setattr(head_route_kernel, "build", broken)
    outcome = dict(tuple(kernel) for kernel in compile_all())
    assert {"misa token_scores", "misa_rerank candidate_list slot", "group rescan_choice slot"} <= set(outcome)
    assert not [name for name in outcome if name.startswith("page_select")], "the default candidates are tokens"
    assert {"hisa decode_scores", "misa_rerank decode_scores"} <= set(outcome)
    assert {name for name in outcome if name.startswith("block_select")} == {
        f"block_select {capacity}"
        for capacity in (512, 1024, 2048, 4096)  # of 8192 pages, two to a block
    }
    assert outcome.pop("head_route H=64") == "RuntimeError: last line"
    assert set(outcome.values()) == {None}


def test_compile_each_tells_each_of_its_own_kernels_and_of_those_they_share(monkeypatch):
    built = []

    def build(*setting):
        built.append(setting)
        if setting == (32, 8):
            raise RuntimeError("no registers left")

    few, many = IndexerParams(), IndexerParams(candidates=12288)
    builders = {
        ("misa", few): {"pack": functools.partial(build, 32, 8), "list": functools.partial(build, 2048)},
        ("misa_rerank", few): {"pack": functools.partial(build, 32, 8), "list": functools.partial(build, 10240)},
        ("misa_rerank", many): {"pack": functools.partial(build, 32, 8), "list": functools.partial(build, 12288)},
    }
    monkeypatch.setattr(compile_check, "kernel_builders", lambda params, heads, modes: builders[modes[0], params])
    outcomes = list(compile_check.compile_each(list(builders), 32, workers=2))
    assert outcomes == 3 * [[("pack", "RuntimeError: no registers left"), ("list", None)]]
    assert sorted(built) == [(32, 8), (2048,), (10240,), (12288,)], "each kernel once"
