"""Kernels of the self-test are compiled in processes beside it, for a GPU that is not here."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs

from orpo_kernels.kernels import odds_ratio, score_rows, start
from orpo_kernels.selftest import compilers, forks
from orpo_kernels.selftest.forks import COMPILED, FAILED, KNOWN
from tests.kernels.dryrun import dryrun
from tests.kernels.test_dryrun import forward_and_backward, launchers  # noqa: F401
from tests.kernels.test_dryrun_sparse import engine, whole_loss  # noqa: F401


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Whether Triton found the kernels of this process in its cache, which is empty at first."""
    hits = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert knobs.cache.dir == str(tmp_path)  # no test before left it set
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda *, cache_hit, **_rest: hits.append(cache_hit)
    )
    forks.load_kernels()
    return hits


def launch(architecture=90):
    """Of `odds_ratio`, forward and backward: two kernels that share what they call."""
    with dryrun(architecture) as log:
        forget(odds_ratio._odds_ratio_kernel, odds_ratio._odds_ratio_backward_kernel)
        chosen, rejected = (torch.empty(5, device="cuda") for _ in range(2))
        odds_ratio.odds_ratio(chosen, rejected)
        odds_ratio.odds_ratio_backward(chosen, chosen, chosen, rejected)
        return [each.name for each in log]


def forget(*functions):
    """As in a new process: Triton keeps what it has compiled."""
    for function in functions:
        function.device_caches.clear()


def test_workers_compile_what_is_launched(found):
    with compilers.compiling_beside(2) as workers:
        assert len(launch()) == 2
    assert found == [True, True]
    assert workers.answers == {COMPILED: 2}
    assert workers._parent.exitcode == 0  # who has forked them, and ended them
    assert knobs.runtime.jit_cache_hook is None


def test_what_is_in_the_cache_no_worker_is_asked_for(found, monkeypatch):
    with compilers.compiling_beside(1):
        launch()
    with compilers.compiling_beside(1) as workers:
        launch()
        assert workers.answers == {KNOWN: 2}
        assert not workers._begun
        workers.announce(None)  # what is launched later is not looked at
    assert workers._parent.exitcode == -signal.SIGKILL  # there was none to end
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    with compilers.compiling_beside(1) as workers:
        launch()
    assert workers.answers == {COMPILED: 2}
    assert found == [True] * 4 + [False] * 2  # in the thread again, as ever


def test_another_cache_of_triton_is_looked_through_by_a_worker(found, monkeypatch):
    with compilers.compiling_beside(1):
        launch()
    monkeypatch.setattr(forks, "is_cached", lambda *given: False)
    with compilers.compiling_beside(1) as workers:
        launch()
    assert workers.answers == {KNOWN: 2}
    assert found == [True] * 4


def test_each_target_is_compiled_for(found):
    with compilers.compiling_beside(1) as workers:
        launch(90)
        launch(80)
    assert found == [True] * 4
    assert workers.answers == {COMPILED: 4}


def test_what_two_threads_launch_is_compiled_once(found):
    told = {"specialization_data": "the same"}
    fn = SimpleNamespace(module=odds_ratio.__name__, name="_odds_ratio_kernel")
    with dryrun(90), compilers.compiling_beside(2) as workers:
        asking = [threading.Thread(target=lambda: workers(fn=fn, compile=told)) for _ in range(4)]
        for each in asking:
            each.start()
        for each in asking:
            each.join()
    assert workers.answers == {FAILED: 1}  # "the same" is no specialisation


def test_what_is_made_ready_is_compiled_before_it_is_launched(found, monkeypatch):
    asked = []
    with dryrun(90), compilers.compiling_beside(1) as workers:
        forget(score_rows._score_rows_kernel)
        told = start.announced
        monkeypatch.setattr(
            start, "announced", lambda each: (told(each), asked.append(len(workers._asked)))
        )
        labels = torch.empty(1, 9, dtype=torch.int64, device="cuda")
        score_rows.score_rows(labels, -100, 32, None)
    assert asked == [1]
    assert found == [True]
    assert workers.answers == {COMPILED: 1}  # as it was launched, and not with other types
    assert start.announced is None


@pytest.mark.usefixtures("launchers", "engine")
def test_floats_are_known_by_name(monkeypatch):
    floats, integers = set(), set()

    def record(self, programs, numbers):
        names = [each.name for each in self.kernel.params if not each.is_constexpr]
        for name, number in zip(names[len(self.tensors) :], numbers, strict=True):
            (floats if isinstance(number, float) else integers).add(name)

    monkeypatch.setattr(start.Start, "_start", record)
    with dryrun(90):
        for trains in (False, True):
            forward_and_backward(300, 64, 4096, bias=trains, trains=trains)
            whole_loss(300, 64, 4096, bias=trains, trains=trains)
    assert floats <= compilers.FLOATS
    assert {"logit_scale", "ratio", "largest_slope"} <= floats
    assert not integers & compilers.FLOATS


def test_without_a_worker_the_thread_compiles(found):
    with compilers.compiling_beside(1) as workers:
        workers._parent.kill()
        workers._parent.join()
        assert len(launch()) == 2
    assert found == [False, False]
    assert workers.answers == {FAILED: 2}


def test_a_worker_that_dies_is_asked_once(found, monkeypatch):
    monkeypatch.setattr(forks, "compile_into_cache", lambda kernel: os._exit(1))
    with compilers.compiling_beside(1) as workers:
        assert len(launch()) == 2
    assert found == [False, False]
    assert workers.answers == {FAILED: 2}


def test_workers_end_when_nobody_asks_any_more(tmp_path):
    # Killed, a process ends nobody; what it has forked sees that its pipes are closed.
    script = """
import os, time
from orpo_kernels.selftest import compilers, forks
forks.load_kernels = forks.hash_triton = lambda: None
forks.compile_into_cache = lambda kernel: print(os.getpid(), os.getppid(), flush=True)
workers = compilers.Workers(1)
workers._compile(forks.Specialisation("", "", "", None))
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL  # and its output is closed by all that had it
    assert len(done.stdout.split()) == 2


def test_the_hash_of_triton_is_that_of_another_process(monkeypatch):
    cache = triton.runtime.cache
    before = cache.triton_key
    monkeypatch.setattr(forks, "hash_triton", lambda: "of half a gigabyte")
    with compilers.compiling_beside(1) as workers:
        workers._hashed.result(60)
        assert cache.triton_key() == "of half a gigabyte"
    assert cache.triton_key is before
    made = []
    monkeypatch.setattr(forks, "hash_triton", lambda: made.append("here"))  # and None there
    with compilers.compiling_beside(1) as workers:
        workers._hashed.result(60)
        assert cache.triton_key is before
    assert made == ["here"]


def test_nothing_is_waited_for_where_no_kernel_was(monkeypatch):
    monkeypatch.setattr(forks, "hash_triton", lambda: time.sleep(60))
    begin = time.perf_counter()
    with compilers.compiling_beside(2):
        pass
    assert time.perf_counter() - begin < 30


def test_what_was_begun_first_is_compiled_first(monkeypatch):
    order, release = [], threading.Event()
    monkeypatch.setattr(forks, "is_cached", lambda *given: False)

    def record(kernel):
        order.append(kernel.data)
        release.wait(10)

    with dryrun(90), compilers.compiling_beside(1) as workers:
        monkeypatch.setattr(workers, "_compile", record)
        monkeypatch.setattr(compilers, "asking", SimpleNamespace())
        workers._here.announces = True  # and does not wait
        for rank, data in ((2, "at once"), (5, "third"), (1, "first"), (1, "second")):
            compilers.asking.rank = rank
            workers(fn=SimpleNamespace(module="", name=""), compile={"specialization_data": data})
            while not order:
                time.sleep(0.001)
        release.set()
        for future in workers._asked.values():
            future.result(10)
    assert order == ["at once", "first", "second", "third"]


def test_stuck_workers_are_given_up(found, monkeypatch):
    monkeypatch.setattr(compilers, "_MOST_SECONDS", 0.2)
    monkeypatch.setattr(forks, "compile_into_cache", lambda kernel: time.sleep(60))
    with compilers.compiling_beside(2) as workers:
        assert len(launch()) == 2
        workers._parent.join(10)
        assert workers._parent.exitcode == 0  # it has waited for them
    assert found == [False, False]


def test_workers_end_at_once(monkeypatch):
    monkeypatch.setattr(forks, "compile_into_cache", lambda kernel: time.sleep(60))
    taken = []
    with compilers.compiling_beside(2) as workers:
        take = workers._take
        monkeypatch.setattr(workers, "_take", lambda: (taken.append("kernel"), take())[1])
        kernels = [
            workers._threads.submit(workers._compile, forks.Specialisation("", "", "", i))
            for i in range(6)
        ]
        while not workers._idle.empty():
            time.sleep(0.001)
    assert taken == ["kernel"] * 2  # as many as there were workers for
    assert [each.cancelled() for each in kernels] == [False] * 2 + [True] * 4


def test_workers_may_end_before_those_who_wait(found, monkeypatch):
    monkeypatch.setattr(forks, "compile_into_cache", lambda kernel: time.sleep(60))
    with compilers.compiling_beside(2) as workers:
        workers.end()  # none was needed yet: they stay
        timer = threading.Timer(0.5, workers.end)
        timer.start()
        assert len(launch()) == 2  # the first is waited for, and compiled here
        timer.join()
        workers.end()
    assert found == [False, False]
    assert set(workers.answers) == {FAILED}


def test_what_a_worker_cannot_find_the_thread_compiles(found):
    @triton.jit
    def local(out_ptr, BLOCK: tl.constexpr):
        tl.store(out_ptr + tl.arange(0, BLOCK), 1.0)

    with compilers.compiling_beside(1) as workers, dryrun(90):
        local[(1,)](torch.empty(8, device="cuda"), BLOCK=8)
        local[(1,)](torch.empty(8, device="cuda"), BLOCK=16)
    assert workers.answers == {FAILED: 2}  # and it is still there after the first
    assert found == [False, False]


@pytest.mark.parametrize("compiles", [True, False])
def test_launchers_are_made_where_triton_compiles_them(monkeypatch, compiles):
    made, driver = [], pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(driver, "CudaLauncher", lambda *given: made.append(given))
    monkeypatch.delattr(driver, "make_launcher", raising=False)
    if compiles:  # as Triton 3.6
        monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    compiled = SimpleNamespace(src="src", metadata="metadata")
    forks._make_launcher(compiled, "cuda")
    forks._make_launcher(compiled, "hip")
    assert made == [("src", "metadata")] * compiles


def test_another_listener_is_left_alone(found, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **_told: False)
    with compilers.compiling_beside(1) as workers:
        assert workers is None


def test_without_processes_the_threads_compile(found, monkeypatch):
    def refused(*given):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    with compilers.compiling_beside(1) as workers:
        assert workers is None
        assert len(launch()) == 2
    assert found == [False, False]
    assert knobs.runtime.jit_cache_hook is None


def test_fewer_workers_than_were_asked_for(found, monkeypatch):
    forked = []

    def fork():  # one for what forks them, and one worker
        forked.append(os.getpid())
        if len(forked) > 2:
            raise BlockingIOError("Resource temporarily unavailable")
        return real()

    real = os.fork
    monkeypatch.setattr(os, "fork", fork)
    with compilers.compiling_beside(2) as workers:
        launch()
    assert workers.answers == {COMPILED: 2}


@pytest.mark.parametrize(
    ("share", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 6), (None, 6)]
)
def test_no_more_processors_than_the_share_of_a_container(share, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setattr(compilers, "_SHARE", tmp_path / "cpu.max")
    if share is not None:
        (tmp_path / "cpu.max").write_text(f"{share}\n")
    assert compilers.processors() == expected


def test_no_fork_where_the_gpu_was_used(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compilers.can_fork(cuda) == sys.platform.startswith("linux")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not compilers.can_fork(cuda)
    assert not compilers.can_fork(torch.device("cpu"))


def test_keys_do_not_depend_on_what_was_launched_first():
    script = """
from triton.runtime.jit import JITFunction
from orpo_kernels.kernels import odds_ratio
from orpo_kernels.selftest import forks

def keys(names):
    for each in vars(odds_ratio).values():
        if isinstance(each, JITFunction):
            each.hash, each.used_global_vals = None, {}
    forks.load_kernels()
    return {name: getattr(odds_ratio, name).cache_key for name in names}

names = ["_odds_ratio_kernel", "_odds_ratio_backward_kernel"]
assert keys(names) == keys(names[::-1])
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
