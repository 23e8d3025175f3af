"""Peak memory over the inputs, one pair, frozen head: against T at V = 32,000 and against V.

The time pytest-benchmark shows here is that of measuring, not of the work; `extra_info` has the
bytes.
"""

from typing import Any

import pytest

from benchmarks import settings
from benchmarks.cases import SWEEP, label, memory_sweep
from benchmarks.heads import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.lengths import pair_lengths
from benchmarks.machine import command, versions
from benchmarks.memory import measure_peak_cuda, peak_in_child
from benchmarks.steps import Step
from benchmarks.workloads import make_workload

SWEPT = memory_sweep(settings.plan())
IDS = [f"{label(case)} {name}".replace(" ", "-") for case, name in SWEPT]


@pytest.mark.parametrize(("case", "name"), SWEPT, ids=IDS)
@pytest.mark.usefixtures("unfinished")
def test_memory(case: Case, name: str, benchmark: Any) -> None:
    tiny, sizes = not benchmark.enabled or settings.tiny(), case.sizes
    if tiny and (case, name) != SWEPT[0]:
        pytest.skip("one point is enough for a test")
    implementation = IMPLEMENTATIONS[name]
    small = make_workload(Case("cpu"), tiny=True)
    reason = implementation.missing(small, settings.device())
    if reason is not None:
        settings.record({"case": label(case), "implementation": name, "skipped": reason})
        pytest.skip(f"{name}: {reason}")
    benchmark.group = label(case)
    weigh = _weigh_cuda if settings.device() == "cuda" else peak_in_child
    tolerated = implementation.peer and benchmark.enabled
    with settings.failures_recorded(label(case), name, tolerated=tolerated):
        found = benchmark.pedantic(weigh, args=(case, name), kwargs={"tiny": tiny}, rounds=1)
        if "error" in found:
            raise RuntimeError(found["error"])
    result = {
        "case": label(case), "implementation": name, "head": SWEEP, "mode": case.mode,
        "H": sizes.hidden_size, "V": sizes.vocab_size, "N": sizes.tokens,
        "T": max(pair.longest for pair in pair_lengths(case.pairs, sizes.tokens)), **found,
    }  # fmt: skip
    benchmark.extra_info.update(
        result, device=settings.device(), versions=versions(), command=command()
    )
    if benchmark.enabled:
        settings.record(result)


def _weigh_cuda(case: Case, name: str, *, tiny: bool) -> dict[str, Any]:
    step = Step(IMPLEMENTATIONS[name], make_workload(case, "cuda", tiny=tiny), case.mode)
    step.run()
    return measure_peak_cuda(step)
