"""Stored block statistics in a captured decode step: replays follow keys, lengths and pages, and the check counts."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("tilelang", reason="the gpu extra is not installed")
pytest.importorskip("deep_gemm", reason="DeepGEMM (it comes with SGLang) is not installed")

from indexer_kernels.page_layout import KEY_BYTES
from indexer_kernels.page_means import check_page_means, page_mean_buffer, update_page_means
from sglang_ext import statistics
from sglang_ext.runner import OutputForm
from sglang_ext.settings import Settings
from sglang_ext.stage import Stage
from tests.support.inputs import make_batch
from tests.support.stage_calls import Attention

pytestmark = pytest.mark.gpu

LENGTHS = [20000, 9000, 12288, 700]
SHORTER = [19999, 8960, 129, 63]
LAYERS = (0, 1)


class Cache:
    """Stands for SGLang's cache of index keys: what a pool's statistics hang on."""


class Served:
    """Two layers over keys of their own, with the stage's statistics, and a step that SGLang would capture."""

    def __init__(self, mode: str, checked: bool = True) -> None:
        own = {"mode": "native", "decode_mode": mode, "check_integrity": checked}
        self.batch = make_batch(LENGTHS, 1, num_heads=64, device="cuda", seed=1)
        other = self.batch.k_pages.clone()
        scales = other[:, KEY_BYTES:].contiguous().view(torch.float32)
        other[:, KEY_BYTES:] = (scales * (0.5 + torch.rand_like(scales))).view(torch.uint8)
        self.pools = [self.batch.k_pages, other]
        self.stage = Stage(Settings(**own), {})
        for layer in LAYERS:
            self.stage.start({"sglang_ext": own}, layer, 64, 128, 2048, torch.device("cuda"))
        self.cache = Cache()
        self.kept = self.stage.allocate_statistics(self.cache, self.pools, 0)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
        self.attention = Attention()
        self.out = torch.full((2, 4, 2048), -1, dtype=torch.int32, device="cuda")
        for layer in LAYERS:
            self.stage.fill_means(self.kept, layer, self.pools[layer], self.batch.page_table, self.lengths)

    def step(self) -> torch.Tensor:
        for layer in LAYERS:
            batch, table = self.batch, self.batch.page_table
            if self.stage.settings.check_integrity:
                self.stage.step_means(self.kept, layer, self.pools[layer], table, self.lengths)
            forward = self.stage.decode(
                self.attention, self.lengths, table, 4, batch.q, layer, unsupported=lambda: None
            )
            assert self.stage.takes(forward, layer), forward.decision
            means = self.kept.of_layer(layer)
            self.stage.run(
                forward,
                layer,
                batch.q,
                batch.weights,
                self.pools[layer],
                table,
                OutputForm("position"),
                self.out[layer],
                means,
                update_means=not self.stage.settings.check_integrity,
            )
        return self.out

    def wrong(self) -> int:
        """Means that are not those of the keys, asked of the kernels alone."""
        table = self.batch.page_table
        return sum(
            int(check_page_means(self.pools[layer], table, self.lengths, self.kept.of_layer(layer))) for layer in LAYERS
        )

    def integrity(self) -> tuple[int, int]:
        snapshot = self.stage.counters.snapshot()
        return snapshot["integrity_checked"], snapshot["integrity_mismatches"]


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """As SGLang captures: two eager runs, then the capture."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def pages_of(lengths: list[int]) -> int:
    return sum(length // 64 for length in lengths)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("mode", ["hisa", "misa_rerank"])
def test_replays_follow(mode, checked):
    served = Served(mode, checked)
    assert served.stage.wants_statistics()
    graph = captured(served.step)
    compared = 2 * pages_of(LENGTHS) * 3 if checked else 0
    assert served.integrity() == (compared, 0), "fill and two eager runs, not the capture"
    for lengths in (LENGTHS, SHORTER, LENGTHS):
        served.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        for layer in LAYERS:  # the last full page of each request gets other keys, as when drafts are written over
            for row, length in enumerate(lengths):
                if length >= 64:
                    page = served.batch.page_table[row, length // 64 - 1].long()
                    served.pools[layer][page, :KEY_BYTES] = torch.randint(0, 0x70, (KEY_BYTES,), device="cuda").byte()
        before = served.integrity()
        graph.replay()
        replayed = served.out.clone()
        assert served.integrity() == (before[0] + (2 * pages_of(lengths) if checked else 0), 0)
        assert served.wrong() == 0
        eager = served.step().clone()
        assert torch.equal(replayed.sort(dim=2).values, eager.sort(dim=2).values)


def test_a_stale_mean_is_counted_in_a_replay():
    served = Served("hisa")
    graph = captured(served.step)
    before = served.integrity()
    served.kept.of_layer(1)[served.batch.page_table[0, 5].long()] += 1
    graph.replay()
    assert served.integrity() == (before[0] + 2 * pages_of(LENGTHS), before[1] + 1)


def test_what_runs_beside_native_is_captured_too():
    """Both branches are in the graph, and it ends after both."""
    batch = make_batch(LENGTHS, 1, num_heads=1, device="cuda", seed=3)
    lengths, means = (
        torch.tensor(SHORTER, dtype=torch.int32, device="cuda"),
        page_mean_buffer(len(batch.k_pages), "cuda"),
    )
    counted = torch.zeros(1, dtype=torch.int64, device="cuda")

    def work() -> None:
        statistics.beside(
            batch.k_pages.device,
            lambda: statistics.step(means, batch.k_pages, batch.page_table, lengths),
            lambda: counted.add_(1),
        )

    update_page_means(batch.k_pages, batch.page_table, lengths, means)
    graph = captured(work)
    # decode on: every page that fills on the way is some step's last full page
    whole = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    while bool((lengths < whole).any()):
        lengths.copy_(torch.minimum(lengths + 64, whole))
        graph.replay()
    assert int(check_page_means(batch.k_pages, batch.page_table, whole, means)) == 0
    assert int(counted) > 180
