"""Which backend serves a call, and what is said when it is not the one hoped for."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from indexer_kernels import backend, select_ragged
from indexer_kernels.params import IndexerParams
from tests.support.inputs import make_batch
from tests.support.small import SMALL

PAGES = IndexerParams(candidate_unit="page")
CUDA_Q = SimpleNamespace(device=torch.device("cuda", 0), shape=(4, 64, 128))


@pytest.fixture
def refused(monkeypatch):
    """The gpu backend refuses every call for this reason."""
    monkeypatch.setattr(backend, "gpu_refusal", lambda mode, q, params: f"no {mode} today")
    monkeypatch.setattr(backend, "_logged", set())


def test_auto_on_cpu_is_the_reference_and_silent(caplog):
    batch = make_batch([70], [2], num_heads=2)
    with caplog.at_level(logging.DEBUG, logger="indexer_kernels"):
        auto = select_ragged("hisa", *batch.ragged, SMALL)
    assert torch.equal(auto, select_ragged("hisa", *batch.ragged, SMALL, backend="reference"))
    assert not caplog.records


def test_auto_logs_each_reason_once(refused, caplog):
    with caplog.at_level(logging.WARNING, logger="indexer_kernels"):
        for mode in ("hisa", "misa", "hisa", "misa"):
            assert backend.use_gpu(mode, CUDA_Q, IndexerParams(), "auto") is False
    assert [record.getMessage() for record in caplog.records] == [
        "the reference backend serves mode 'hisa': no hisa today",
        "the reference backend serves mode 'misa': no misa today",
    ]


def test_gpu_raises_the_reason(refused):
    with pytest.raises(NotImplementedError, match="backend='gpu', mode='hisa': no hisa today"):
        backend.use_gpu("hisa", CUDA_Q, IndexerParams(), "gpu")


def test_reference_never_asks(refused):
    assert backend.use_gpu("hisa", CUDA_Q, IndexerParams(), "reference") is False


def test_accepted(monkeypatch):
    monkeypatch.setattr(backend, "gpu_refusal", lambda mode, q, params: None)
    assert backend.use_gpu("hisa", CUDA_Q, IndexerParams(), "auto")
    assert backend.use_gpu("hisa", CUDA_Q, IndexerParams(), "gpu")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    reason = backend.gpu_refusal("hisa", CUDA_Q, IndexerParams())
    assert reason == "tilelang and deep_gemm not installed"


def test_page_means_ask_for_the_device_alone(monkeypatch, caplog):
    pytest.importorskip("deep_gemm", reason="the gpu backend imports DeepGEMM")
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(backend, "_logged", set())
    assert backend.use_gpu_on(CUDA_Q.device, "auto") and backend.use_gpu_on(CUDA_Q.device, "gpu")
    assert not backend.use_gpu_on(CUDA_Q.device, "reference") and not backend.use_gpu_on(torch.device("cpu"), "auto")
    capability[0] = (8, 0)
    with caplog.at_level(logging.WARNING, logger="indexer_kernels"):
        assert not backend.use_gpu_on(CUDA_Q.device, "auto")
    reason = "compute capability (8, 0), kernels are built for (9, 0)"
    assert [record.getMessage() for record in caplog.records] == [f"the reference backend serves page means: {reason}"]
    with pytest.raises(NotImplementedError, match=re.escape(f"backend='gpu', page means: {reason}")):
        backend.use_gpu_on(CUDA_Q.device, "gpu")


@pytest.mark.parametrize(
    ("mode", "params", "reason"),
    [
        ("misa", IndexerParams(route_statistic="max", route_block=64), None),
        ("misa", IndexerParams(local_tokens=8192), None),  # it forces nothing
        ("misa_rerank", IndexerParams(route_statistic="max", route_block=64), None),
        ("misa_rerank", IndexerParams(candidates=8200), None),
        ("misa_rerank", IndexerParams(local_tokens=10175), None),
        ("misa_rerank", IndexerParams(local_tokens=10176), "candidates=10240 leaves no token beside the forced ones"),
        ("misa_rerank", IndexerParams(active_heads=5), "active_heads=5, kernels are built for 4, 8 and 16"),
        ("misa_rerank", IndexerParams(route_block=96), "route_block=96 is not a multiple of 64"),
        ("misa_rerank", PAGES, None),
        ("misa_rerank", replace(PAGES, local_tokens=10049), None),
        ("misa_rerank", replace(PAGES, local_tokens=10050), "leaves no page beside the 160 forced ones"),
        ("group_rerank", IndexerParams(group=2), None),
        ("group_rerank", IndexerParams(group=3), "group=3, kernels are built for (2, 4)"),
        ("group_rerank", IndexerParams(candidates=8200), None),
        ("group_rerank", IndexerParams(local_tokens=10176), "candidates=10240 leaves no token beside the forced ones"),
        ("group_rerank", IndexerParams(), None),
        ("misa", IndexerParams(active_heads=5), "active_heads=5, kernels are built for 4, 8 and 16"),
        ("hisa", IndexerParams(route_statistic="max"), None),
        ("misa_rerank", IndexerParams(), None),
    ],
    ids=str,
)
def test_settings_that_no_kernel_serves(mode, params, reason):
    pytest.importorskip("deep_gemm", reason="the gpu backend imports DeepGEMM")
    from indexer_kernels.gpu.refusals import mode_refusal

    refused = mode_refusal(mode, params)
    assert refused is None if reason is None else reason in refused
