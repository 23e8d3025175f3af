"""Counting, pairing, choosing: the parts of the harness that could mislead quietly."""

import time

import pytest
import torch

from benchmarks import settings
from benchmarks.cases import label, memory_sweep, planned
from benchmarks.heads import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.measure import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    PairedRounds,
    Stopwatch,
    bare_gemm,
    count_gemm_flop,
    kernels_in,
    passes,
    rounds_for,
    totals,
)
from benchmarks.steps import Step
from benchmarks.workloads import make_workload
from orpo_kernels.engine.tiles import native


@pytest.fixture(scope="module")
def workload():
    return make_workload(Case("cpu", pairs=2, dtype="float32"), tiny=True)


def test_processor_time_leaves_out_what_others_took(monkeypatch):
    # Asleep as if somebody else had the processor: 50 ms by the wall, none of this process.
    assert Stopwatch("cpu")(lambda: time.sleep(0.05)) >= 0.05
    monkeypatch.setenv(settings.CLOCK, "cpu")
    assert Stopwatch("cpu")(lambda: time.sleep(0.05)) < 0.04


def test_kernels_among_events():
    # Of a real profile, what runs on the host, counted as if it ran on a device.
    x = torch.ones(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        x.add_(1).mul_(2)
    cpu = prof.profiler.kineto_results.events()
    assert totals(kernels_in(cpu)) == {"launches": 0, "kernels_ms": 0.0}

    class OnDevice:
        def __init__(self, event, name):
            self.event, self.name = event, lambda: name
            self.duration_ns = event.duration_ns

        def device_type(self):
            return torch.autograd.DeviceType.CUDA

    events = [event for event in cpu if event.name() in ("aten::add_", "aten::mul_")]
    names = ["gemm_kernel", "Memcpy DtoH (Device -> Pinned)"]
    found = kernels_in([OnDevice(*each) for each in zip(events, names, strict=True)])
    first, second = (event.duration_ns() / 1e6 for event in events)
    assert found == {"gemm_kernel": (1, first)}

    # Two templates whose names differ late are one line, of both.
    names = ["template" * 9 + suffix for suffix in "ab"]
    found = kernels_in([OnDevice(*each) for each in zip(events, names, strict=True)])
    assert totals(found) == pytest.approx({"launches": 2, "kernels_ms": first + second})
    assert [count for count, _ in found.values()] == [2]


# What each does by construction: materialised 2 and 3, recomputation one more, padding on top.
@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("ours-exact", "frozen", 2), ("ours-exact-kept", "trainable", 3), ("ours-exact", "eval", 1),
        ("eager", "frozen", 2), ("eager", "trainable", 3), ("eager", "eval", 1),
        ("trl-chunked", "frozen", 3), ("trl-chunked", "trainable", 4),
        ("torch-lce", "frozen", 3), ("torch-lce", "trainable", 4),
    ],
)  # fmt: skip
def test_passes_on_the_scored_rows(workload, name, mode, expected):
    if reason := IMPLEMENTATIONS[name].missing(workload, "cpu"):
        pytest.skip(reason)
    step = Step(IMPLEMENTATIONS[name], workload, mode)
    assert passes(count_gemm_flop(step.run), workload) == pytest.approx(expected, rel=0.01)


# Of a pass over the padding frozen: forward and dhidden, and TRL's fused head recomputes as well.
@pytest.mark.parametrize(("name", "frozen"), [("trl-orpo", 2), ("liger", 2), ("trl-fused", 3)])
def test_whole_losses_multiply_the_padding_too(workload, name, frozen):
    if reason := IMPLEMENTATIONS[name].missing(workload, "cpu"):
        pytest.skip(reason)
    step = Step(IMPLEMENTATIONS[name], workload, "frozen")
    padded = frozen / workload.scored_share
    assert passes(count_gemm_flop(step.run), workload) == pytest.approx(padded, rel=0.01)


def test_the_bare_gemm_is_one_pass(workload):
    assert passes(count_gemm_flop(bare_gemm(workload)), workload) == 1


def test_ratios_are_taken_to_the_gemms_beside_the_round():
    # The machine is twice as slow in the second round: both double, the ratio stays.
    rounds = PairedRounds(rounds_s=[2.0, 4.0, 2.0], gemm_s=[1.0, 1.0, 3.0, 1.0])
    summary = rounds.summary()
    assert summary["ratio_to_gemm"] == {"median": 2.0, "iqr": 0.5}  # 2, 2, 1
    assert summary["time_ms"]["median"] == 2000
    assert summary["rounds"] == 3


def test_nothing_timed_is_nothing_claimed():
    assert PairedRounds().summary() == {}


def test_rounds_fit_the_budget():
    assert rounds_for(0.001) == MAX_ROUNDS
    assert rounds_for(1.5, budget_s=6) == 4
    assert rounds_for(3, budget_s=6) == MIN_ROUNDS
    assert rounds_for(5, budget_s=60) == 2  # over LONG_S
    assert rounds_for(60, budget_s=6) == 1  # over SLOW_S


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_names_what_exists_once(device):
    plan = planned(device) + memory_sweep(device)
    keys = [(label(case), name) for case, name in plan]
    assert len(keys) == len(set(keys))
    assert {name for _, name in keys} == set(IMPLEMENTATIONS)
    assert all(case.mode in IMPLEMENTATIONS[name].modes for case, name in plan)


def test_every_mode_asks_for_its_gradients_and_no_other(workload):
    for mode, needs in (
        ("frozen", (True, False)),
        ("trainable", (True, True)),
        ("eval", (False, False)),
    ):
        step = Step(IMPLEMENTATIONS["eager"], workload, mode)
        step.run()
        assert tuple(each is not None for each in step.gradients) == needs
        step.clear()
        assert step.gradients == (None, None)


def test_a_missing_peer_says_so(monkeypatch, workload):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in IMPLEMENTATIONS["liger"].missing(workload, "cpu")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "2.13" in IMPLEMENTATIONS["torch-lce"].missing(workload, "cpu")


def test_a_peer_without_softcap_is_skipped_by_name():
    capped = make_workload(Case("gemma-2-2b"), tiny=True)
    assert "softcap" in IMPLEMENTATIONS["liger"].missing(capped, "cpu")
    assert "softcap" in IMPLEMENTATIONS["torch-lce"].missing(capped, "cpu")
    assert IMPLEMENTATIONS["ours-exact"].missing(capped, "cpu") is None


def test_the_plain_torch_form_is_really_what_runs(workload):
    plain = IMPLEMENTATIONS["ours-exact-torch"]
    with plain.around():
        assert native.cpu_backend() == "torch"
        step = Step(plain, workload, "frozen")
        inside = step.run()
    step.clear()
    torch.testing.assert_close(step.run(), inside)
