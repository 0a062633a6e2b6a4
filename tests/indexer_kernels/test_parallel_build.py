"""Kernels built by several threads: at once, each once, outcomes in order, no error hides another."""

import subprocess
import sys
import textwrap
import threading
from functools import partial

import pytest
import torch

from indexer_kernels.gpu import parallel_build
from indexer_kernels.gpu.build_once import build_once, lock_of
from indexer_kernels.gpu.parallel_build import InCallersThread, build_all, default_workers

WAIT = 60  # seconds until a test that does not end fails


def fails(words: str) -> None:
    raise RuntimeError(f"first line\n{words}")


def test_builders_run_at_once():
    """A barrier that two pass together or not at all."""
    both = threading.Barrier(2)
    builders = [partial(both.wait, WAIT), partial(both.wait, timeout=WAIT)]
    assert list(build_all(builders, 2)) == [None, None]


def test_outcomes_come_in_order_whatever_ends_first():
    ended = threading.Event()
    builders = [partial(ended.wait, WAIT), ended.set, partial(fails, "b"), partial(fails, "c"), partial(int, "5")]
    assert list(build_all(builders, 2)) == [None, None, "RuntimeError: b", "RuntimeError: c", None]
    assert list(build_all(builders[2:], 1)) == ["RuntimeError: b", "RuntimeError: c", None]


def test_an_error_without_words():
    def fails_silently():
        raise KeyError

    assert list(build_all([fails_silently], 2)) == ["KeyError: "]


@pytest.mark.parametrize("workers", [1, 2])
def test_equal_builders_are_called_once(workers):
    calls = []

    def build(*setting):
        calls.append(setting)
        if setting == (2,):
            fails("two")

    settings = [(1,), (2,), (1,), (2,), (3,)]
    outcomes = list(build_all([partial(build, *setting) for setting in settings], workers))
    assert outcomes == [None, "RuntimeError: two", None, "RuntimeError: two", None]
    assert sorted(calls) == [(1,), (2,), (3,)]
    assert list(build_all([partial(dict, a=1), partial(dict, a=2)], workers)) == [None, None]


def test_what_must_not_leave_the_callers_thread_stays():
    here, threads = threading.get_ident(), []
    builders = [
        partial(lambda: threads.append(("worker", threading.get_ident()))),
        InCallersThread(lambda *_: threads.append(("caller", threading.get_ident())), 1),
        InCallersThread(fails, "here"),
    ]
    assert list(build_all(builders, 2)) == [None, None, "RuntimeError: here"]
    assert dict(threads)["caller"] == here != dict(threads)["worker"]


def test_one_worker_is_the_callers_thread_and_builds_when_asked():
    built = []
    outcomes = build_all([partial(built.append, 1), partial(built.append, 2)], 1)
    assert next(outcomes) is None and built == [1]


def test_what_had_not_begun_is_not_built_for_nobody():
    """A strict server that ends at the first error does not compile the rest before it does."""
    begun, go = threading.Barrier(3), threading.Event()
    built = []

    def wait():
        begun.wait(WAIT)
        go.wait(WAIT)

    builders = [partial(fails, "no"), partial(wait), lambda: wait(), *(partial(built.append, n) for n in range(20))]
    outcomes = build_all(builders, 2)
    assert next(outcomes) == "RuntimeError: no"
    begun.wait(WAIT)
    threading.Timer(0.2, go.set).start()
    outcomes.close()
    assert built == []


def test_workers_work_on_the_callers_device(monkeypatch):
    """A thread starts on device 0, whichever rank it belongs to."""
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.get_ident())))
    both = threading.Barrier(2)
    assert list(build_all([partial(both.wait, WAIT), lambda: both.wait(WAIT)], 2)) == [None, None]
    assert [device for device, _ in devices] == [3, 3]
    assert threading.get_ident() not in {thread for _, thread in devices}


@pytest.mark.parametrize(("cpus", "workers"), [(2, 2), (8, 8), (192, 8), (None, 1)])
def test_number_of_workers(monkeypatch, cpus, workers):
    monkeypatch.setattr(parallel_build.os, "cpu_count", lambda: cpus)
    assert default_workers() == workers


def test_no_workers():
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        next(build_all([], 0))


# One kernel, one build


def test_two_threads_that_want_a_kernel_get_the_same_one():
    began, asked, builds = threading.Event(), threading.Event(), []

    @build_once
    def build(setting):
        builds.append(setting)
        began.set()
        asked.wait(0.5)  # long enough for the other to build it too, if it could
        return object()

    kernels = []
    threads = [threading.Thread(target=lambda: kernels.append(build(8))) for _ in range(2)]
    threads[0].start()
    assert began.wait(WAIT)
    threads[1].start()
    for thread in threads:
        thread.join(WAIT)
    assert builds == [8] and len(kernels) == 2 and kernels[0] is kernels[1] is build(8)


def test_other_settings_do_not_wait():
    both = threading.Barrier(2)

    @build_once
    def build(setting):
        both.wait(WAIT)
        return setting

    assert list(build_all([partial(build, 1), partial(build, 2)], 2)) == [None, None]
    assert build(1) == 1 and build(2) == 2


def test_a_failed_build_is_tried_again():
    errors = [RuntimeError("once")]

    @build_once
    def build(setting):
        if errors:
            raise errors.pop()
        return setting

    with pytest.raises(RuntimeError, match="once"):
        build(4)
    assert build(4) == 4


def test_a_kernel_that_is_there_takes_no_lock():
    """Every launch asks for it, while another thread may be building."""

    @build_once
    def build(setting):
        return setting

    build(4)
    with lock_of((build.__wrapped__.__wrapped__, (4,))):
        assert build(4) == 4


# TVM

LOWERED = """
    import threading
    from functools import partial

    import tilelang
    import tvm_ffi
    from tilelang import tvm

    from indexer_kernels.gpu import bit_list_kernel, head_route_kernel, routed_scores_kernel, token_scores_kernel
    from indexer_kernels.gpu import sample_threshold_kernel
    from indexer_kernels.gpu.target import PASS_CONFIGS, TARGET


    def types():
        return set(map(str, tvm_ffi.registry.get_registered_type_keys()))


    before = types()
    for prim_func in (
        head_route_kernel.head_route_prim_func(64, 8, 128, "max"),
        routed_scores_kernel.routed_scores_prim_func(8, "scores", 132),
        bit_list_kernel.bit_list_prim_func(32, 10240, 64, 1024, True),
        sample_threshold_kernel.sample_threshold_prim_func(2048, 0, 0, 16, 8192, 5.0, 1024),
        token_scores_kernel.token_scores_prim_func(64, 1),
    ):
        target = tvm.target.Target(TARGET)
        with tvm.transform.PassContext(opt_level=3, config=PASS_CONFIGS), target:
            tilelang.lower(prim_func, target=target, enable_host_codegen=True, enable_device_compile=False)
    assert "tirx.PrimFunc" in before, sorted(before)[:20]
    print("new:", sorted(types() - before))
"""


BUILT_TWICE = """
    import tilelang
    import triton

    from indexer_kernels import IndexerParams
    from indexer_kernels.gpu.compile_check import GPU_MODES, kernel_builders
    from indexer_kernels.gpu.parallel_build import build_all

    compiled = []
    tilelang.compile = lambda func, **_: compiled.append(func)
    triton.compile = lambda source, **_: None
    builders = [
        lambda build=build: build()  # no two are equal
        for mode in 2 * GPU_MODES
        for build in kernel_builders(IndexerParams(), 64, (mode,)).values()
    ]
    assert not any(build_all(builders, 4))
    kernels = {(func.attrs["global_symbol"], func.script()) for func in compiled}
    assert len({name for name, _ in kernels}) >= 8, sorted(name for name, _ in kernels)
    print(len(compiled), len(kernels))
"""


def run(code: str) -> str:
    """The last line that a process of its own prints."""
    pytest.importorskip("tilelang", reason="the gpu extra is not installed")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_lowering_registers_no_type():
    """TVM's table of types has no lock: threads may only read it."""
    assert run(LOWERED) == "new: []"


def test_every_tilelang_kernel_is_compiled_once_however_many_threads_ask_for_it():
    compiled, kernels = map(int, run(BUILT_TWICE).split())
    assert compiled == kernels
