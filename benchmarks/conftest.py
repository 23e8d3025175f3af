"""Fixtures of the benchmarks: inputs and their truth are made once per case, one case at a time."""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from benchmarks import settings
from benchmarks.cases import label
from benchmarks.heads import Case
from benchmarks.truth import Truth, compute_truth
from benchmarks.workloads import Workload, make_workload

# No network at run time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Prepared:
    """A case's inputs and what is right for them."""

    case: Case
    workload: Workload
    truth: Truth
    tiny: bool


@pytest.fixture(scope="session")
def _prepared() -> dict[str, Prepared]:
    return {}  # holds one entry: two heads of 262,144 tokens would not fit a small machine


@pytest.fixture
def prepare(_prepared: dict[str, Prepared]) -> Callable[[Case, bool], Prepared]:
    """`prepare(case, tiny)`: the inputs on this run's device, the last ones kept."""

    def get(case: Case, tiny: bool) -> Prepared:
        # The mode only says which gradients are wanted: the inputs are the same.
        key = f"{case.head} {case.logits} {case.pairs} {case.dtype} {case.sizes} {tiny}"
        if key not in _prepared:
            _prepared.clear()
            workload = make_workload(case, settings.device(), tiny=tiny)
            _prepared[key] = Prepared(case, workload, compute_truth(workload), tiny)
        return _prepared[key]

    return get


@pytest.fixture
def unfinished(request: pytest.FixtureRequest) -> None:
    """Skip what the record already has, and everything after the deadline."""
    case, name = request.getfixturevalue("case"), request.getfixturevalue("name")
    done = {(each["case"], each["implementation"]) for each in settings.recorded()}
    if (label(case), name) in done:
        pytest.skip("already in the record")
    if settings.late():
        pytest.skip("no time left in this run; run the same command again")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' own warnings; ours are tested in tests/
        yield
