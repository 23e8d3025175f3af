"""The self-test launches every kernel that a call on a GPU can."""

import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from orpo_kernels import kernels

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
    # The log-probs without a gradient are folded, the tile operation's sums have a total too.
    assert found["_linear_lse_kernel"]["WITH_TOTAL"] == [False, True]


def test_older_cards_launch_what_only_they_do():
    assert set(launched(75)["constants"]) >= BEFORE_TENSOR_CORES


@pytest.mark.parametrize("name", ["trainable head, recomputed in blocks", "all of it, in blocks"])
def test_blocks_are_blocks_of_the_vocabulary(name):
    for counts in launched(90)["checks"][f"linear_logps: {name}"]:
        assert counts["_softmax_block_kernel"] >= 3 * counts["_finish_rows_kernel"] > 0
