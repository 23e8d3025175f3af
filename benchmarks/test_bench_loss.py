"""The ORPO loss: forward and backward, frozen and trainable head, and evaluation.

    pytest benchmarks --benchmark-only                  # everything, at this machine's sizes
    pytest benchmarks --benchmark-only -k "cpu and frozen and trained"
    pytest benchmarks --benchmark-disable               # once, tiny, as tests

Rows are ours or a peer's, and say in `extra_info` what the time is worth: errors, ratio to the bare
GEMM, passes, peak bytes, device, versions.
"""

from typing import Any

import pytest
from torch import Tensor

from benchmarks import settings
from benchmarks.cases import planned
from benchmarks.heads import Case, sizes_of
from benchmarks.implementations import IMPLEMENTATIONS, Implementation
from benchmarks.machine import command, versions
from benchmarks.measure import (
    ROUND_BUDGET_S,
    SLOW_S,
    SMALL_BUDGET_S,
    PairedRounds,
    Stopwatch,
    bare_gemm,
    count_gemm_flop,
    passes,
    rounds_for,
)
from benchmarks.memory import measure_peak_cuda, peak_in_child
from benchmarks.steps import Step
from benchmarks.truth import errors, judge
from benchmarks.workloads import Workload, softmax_rows, sparsity
from orpo_kernels.engine.tiles.native import cpu_backend

PLAN = planned(settings.plan())
MAIN_HEADS = {"cpu": "cpu", "cuda": "llama-3-8b"}
IDS = [f"{case.group} {name}".replace(" ", "-") for case, name in PLAN]
PROFILE_ROWS = 256  # rows whose kept share is stored: four blocks of 64


@pytest.mark.parametrize(("case", "name"), PLAN, ids=IDS)
@pytest.mark.usefixtures("unfinished")
def test_loss(case: Case, name: str, benchmark: Any, prepare: Any) -> None:
    implementation = IMPLEMENTATIONS[name]
    tiny = not benchmark.enabled or settings.tiny()
    if tiny and implementation.compiled and (case.head, case.mode) != ("cpu", "frozen"):
        pytest.skip("compiles for seconds: one case is enough for a test")
    prepared = prepare(case, tiny)
    device = settings.device()
    reason = implementation.missing(prepared.workload, device)
    if reason is not None:
        settings.record({"case": case.group, "implementation": name, "skipped": reason})
        pytest.skip(f"{name}: {reason}")

    benchmark.group = case.group
    tolerated = implementation.peer and benchmark.enabled
    with settings.failures_recorded(case.group, name, tolerated=tolerated):
        result = _measure(case, implementation, prepared, benchmark)
    benchmark.extra_info.update(result, device=device, versions=versions(), command=command())
    if benchmark.enabled:
        settings.record(result)


def _measure(
    case: Case, implementation: Implementation, prepared: Any, benchmark: Any
) -> dict[str, Any]:
    """Check, count, time and weigh: one result."""
    workload, name = prepared.workload, implementation.name
    step = Step(implementation, workload, case.mode)
    loss, flop, first_s = _first_runs(step, implementation, Stopwatch(settings.device()))
    found = errors(prepared.truth, loss, *step.gradients)
    accurate = judge(found, case.dtype, peer=implementation.peer)
    is_main = case.head == MAIN_HEADS[settings.device()]
    count = rounds_for(first_s, ROUND_BUDGET_S if is_main else SMALL_BUDGET_S)
    rounds = _time(benchmark, step, bare_gemm(workload), count)
    result = {
        "case": case.group,
        "implementation": name,
        **_problem(case, workload, prepared.tiny),
        "errors": {key: float(f"{value:.3g}") for key, value in found.items()},
        "accurate": accurate,
        **_backend(implementation),
        "gemm_passes": None if flop is None else passes(flop, workload),
        **rounds.summary(),
        **({} if prepared.tiny or first_s > SLOW_S else _memory(case, name, step)),
    }
    step.clear()
    return result


def _first_runs(
    step: Step, implementation: Implementation, watch: Stopwatch
) -> tuple[Tensor, int | None, float]:
    """The loss of the run that is checked (its gradients stay), the FLOP counted, seconds of a run.

    No FLOP where the products are inside Triton kernels. What is not compiled runs once only: the
    counter costs nothing beside the work, and on a CPU a run may take many seconds.
    """
    losses: list[Tensor] = []

    def run() -> None:
        step.clear()
        losses.append(step.run())

    if implementation.name == "cce" and step.workload.hidden.is_cuda:
        run()
        return losses[-1], None, watch(run)
    flops: list[int] = []
    first_s = watch(lambda: flops.append(count_gemm_flop(run)))
    if implementation.compiled:
        run()
    if implementation.compiled or first_s < 3:  # a first call also compiles, packs, imports
        first_s = watch(run)
    return losses[-1], flops[0], first_s


def _time(benchmark: Any, step: Step, gemm: Any, count: int) -> PairedRounds:
    """Rounds of the step, each between two bare GEMMs."""
    watch, rounds = Stopwatch(settings.device()), PairedRounds()
    gemm()  # its first call packs and allocates

    def before() -> None:
        step.clear()
        rounds.gemm_s.append(watch(gemm))

    def timed() -> None:
        rounds.rounds_s.append(watch(step.run))

    benchmark.pedantic(timed, setup=before, rounds=count, iterations=1, warmup_rounds=0)
    rounds.gemm_s.append(watch(gemm))
    return rounds


def _problem(case: Case, workload: Workload, tiny: bool) -> dict[str, Any]:
    sizes = sizes_of(case, settings.device(), tiny=tiny)
    rows = workload.hidden.detach()[workload.union_labels >= 0][:PROFILE_ROWS]
    profile = sparsity(softmax_rows(rows, workload.weight.detach(), workload.softcap), 2.0**-12)
    return {
        "head": case.head, "mode": case.mode, "logits": case.logits, "pairs": case.pairs,
        "dtype": case.dtype, "H": sizes.hidden_size, "V": sizes.vocab_size, "N": workload.scored,
        "T": workload.labels.shape[1], "scored_share": round(workload.scored_share, 3),
        "kept_share_64": round(profile.kept_shares[64], 4),
    }  # fmt: skip


def _backend(implementation: Implementation) -> dict[str, str]:
    """Which form of the tile operations ours ran with on a CPU."""
    if implementation.peer or settings.device() != "cpu":
        return {}
    plain = implementation.name == "ours-exact-torch"
    return {"backend": "torch" if plain else cpu_backend()}


def _memory(case: Case, name: str, step: Step) -> dict[str, Any]:
    if settings.device() == "cuda":
        return measure_peak_cuda(step)
    # The smaller heads say nothing new about memory; the sweep of test_bench_memory.py does.
    is_measured = (case.head, case.logits, case.dtype) == ("cpu", "trained", "bfloat16")
    return peak_in_child(case, name) if is_measured else {}
