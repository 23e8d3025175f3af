"""The self-test launches every kernel that a call on a GPU can."""

import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from orpo_kernels import kernels, selftest
from orpo_kernels.kernels import start
from orpo_kernels.selftest import schedule
from tests.kernels.dryrun import dryrun
from tests.kernels.test_dryrun import forward_and_backward, launchers  # noqa: F401

BEFORE_TENSOR_CORES = {"_reach_kernel"}  # of GEMMs that write float16


@functools.cache
def launched(capability):
    """Of all checks on a card of this compute capability: constants, and launches by check."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.selftest_launches", str(capability)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)


def written():
    """The kernels there are."""
    modules = (
        importlib.import_module(f"{kernels.__name__}.{each.name}")
        for each in pkgutil.iter_modules(kernels.__path__)
    )
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def test_every_kernel_is_launched():
    found = launched(90)["constants"]
    assert written() - set(found) == BEFORE_TENSOR_CORES
    # Vocabularies in whole tiles, which is a loop of its own, and others.
    assert found["_scan_kernel"]["RAGGED"] == [False, True]
    # A head that trains keeps E where that is faster, of whole rows, mostly without a bias.
    assert found["_weight_probs_kernel"]["KEPT"] == [False, True]
    assert found["_softmax_rows_kernel"]["HAS_BIAS"] == [False, True]
    # The log-probs without a gradient are folded, the tile operation's sums have a total too.
    assert found["_linear_lse_kernel"]["WITH_TOTAL"] == [False, True]


def test_older_cards_launch_what_only_they_do():
    assert set(launched(75)["constants"]) >= BEFORE_TENSOR_CORES


@pytest.mark.parametrize("name", ["trainable head, recomputed in blocks", "all of it, in blocks"])
def test_blocks_are_blocks_of_the_vocabulary(name):
    for counts in launched(90)["checks"][f"linear_logps: {name}"]:
        assert counts["_softmax_block_kernel"] >= 3 * counts["_finish_rows_kernel"] > 0


def first(count):
    """Kernels of the checks that are begun first where Triton compiles, one of each dtype's."""
    cases = list(selftest._cases(torch.device("cpu"), 1, with_model=False))
    order = schedule._order(cases, schedule.Plan(6, schedule.Turns(4), 2))
    checks = launched(90)["checks"]
    return set().union(*(checks[f"{cases[i].op}: {cases[i].name}"][0] for i in order[:count]))


@pytest.mark.usefixtures("launchers")
def test_what_a_training_step_launches_is_checked_first(monkeypatch):
    of_a_step = {"_sequence_mean_kernel", "_sequence_mean_backward_kernel", "_pair_loss_kernel"}
    monkeypatch.setattr(
        start.Start, "_start", lambda self, *given: of_a_step.add(self.kernel.__name__)
    )
    with dryrun(90):
        # Llama 3's head, frozen and trained, in blocks and in whole rows.
        for budget in (2**28, 2**31):
            for trains in (False, True):
                forward_and_backward(8192, 4096, 128256, trains=trains, budget=budget)
    assert {"_softmax_block_kernel", "_softmax_rows_kernel", "_weight_probs_kernel"} <= of_a_step
    assert of_a_step <= first(3)
    of_slots = {"_remake_slots_kernel", "_slot_products_kernel", "_sum_products_kernel"}
    assert written() - first(18) <= {
        *of_slots,
        *BEFORE_TENSOR_CORES,
    }  # no cases on a CPU have slots
