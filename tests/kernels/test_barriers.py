"""In compiled code a barrier orders what a program reads and writes, and is missed if it goes."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.language.semantic import TritonSemantic

from orpo_kernels import kernels
from tests.kernels import barriers, compile_cases, overlaps
from tests.kernels.dryrun import _Driver, dryrun

# Kernels that have a `tl.debug_barrier()`.
RESTING = {
    "combine_rows", "live_columns", "pack_slots", "scan", "softmax_block", "weight_probs",
}  # fmt: skip
CASES = [
    case
    for case in compile_cases.cases()
    if case.dtype != torch.float16 and case.kernel.removesuffix("_softcap") in RESTING
]


def found(target, cases):
    """Names of the kernels launched, and of those with a fault."""
    names, faulty = set(), set()
    with dryrun(target) as log:
        for case in cases:
            case.launch()
    for launch in log:
        name = launch.name.removeprefix("_").removesuffix("_kernel")
        names.add(name)
        if list(barriers.faults(launch.name, launch.compiled, launch.shared)):
            faulty.add(name)
    return names, faulty


@pytest.mark.parametrize("target", [80, 90, 120, "gfx942"])
def test_all_warps_have_read_what_one_writes(target):
    names, faulty = found(target, CASES)
    assert names >= RESTING
    assert faulty == set()


def test_a_barrier_that_goes_is_missed(monkeypatch, tmp_path):
    # On AMD: for an NVIDIA card some have a reduction's barrier in the same place today.
    plain = [case for case in CASES if "float32, " not in case.label and "all" not in case.label]
    monkeypatch.setattr(TritonSemantic, "debug_barrier", lambda self: None)
    # A device and a cache of its own: nothing is compiled yet, and nothing is left to others.
    monkeypatch.setattr(_Driver, "get_current_device", lambda self: 999)
    with knobs.cache.scope():  # which monkeypatch would leave set, to what it was
        knobs.cache.dir = str(tmp_path)
        _, faulty = found("gfx942", plain)
    assert faulty == RESTING


def test_what_is_listed_is_there():
    listed = (*overlaps.BY_ELEMENT.items(), *overlaps.APART.items())
    modules = [
        importlib.import_module(f"{kernels.__name__}.{each.name}")
        for each in pkgutil.iter_modules(kernels.__path__)
    ]
    for name, tensors in listed:
        kernel = next(getattr(each, name) for each in modules if hasattr(each, name))
        assert set(tensors) <= set(kernel.arg_names)
