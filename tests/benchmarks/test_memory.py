"""Peak memory: what was allocated is what is reported, in a process of its own."""

import sys

import pytest
import torch

from benchmarks.heads import Case, Sizes
from benchmarks.memory import HighWaterMark, peak_in_child

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MIB = 1 << 20


@LINUX
def test_high_water_mark_sees_what_is_freed_before_the_end():
    with HighWaterMark() as peak:
        # 64 MiB: well over the noise of an interpreter; filled, so that its pages are resident.
        torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
    assert 60 * MIB < peak.peak_bytes < 80 * MIB
    assert peak.method in ("VmHWM", "sampled RSS")


@LINUX
def test_a_child_weighs_a_step():
    # 4 M logits, 16 MiB in float32: plain torch keeps several such, over what a process wobbles by.
    case = Case("memory", "frozen", "flat", dtype="float32", sizes=Sizes(64, 16_384, 256))
    found = peak_in_child(case, "eager")
    assert "error" not in found
    assert found["peak_bytes"] > 2 * 16 * MIB
    rows = 2 * 157  # 2 T for one pair of 256 scored tokens
    assert found["gradient_bytes"] == rows * 64 * 4


@LINUX
def test_a_child_that_fails_says_why():
    assert "KeyError" in peak_in_child(Case("cpu"), "no-such-implementation", tiny=True)["error"]
