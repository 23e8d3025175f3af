"""No change moves a number: 200 random calls give the bits they gave, on both CPU backends.

On a machine whose bits are on file they are equal; on every machine the norms agree. The norms of
the C++ form stand for both: its results and those of plain torch differ by roundings only. Where a
change of bits is meant, `python -m tests.engine.digests --write` on the machines of the file, and
say in the commit why.
"""

import math
from pathlib import Path

import pytest
import torch

import orpo_kernels
from tests.engine import digests

# Ten times the largest difference between both backends, instructions from SSE4.1 to AVX-512 and
# MKL's compatible mode: 2e-6 where all is float32 or float64 and 5e-4 where a GEMM is 16-bit, in
# sparse calls, where another rounding keeps another entry.
TOLERANCE = {"wide": 2e-5, "narrow": 5e-3}


@pytest.fixture(scope="module")
def known():
    return digests.recorded()


@pytest.fixture(scope="module")
def found(known):
    process = digests.elsewhere("torch")  # works while this process does
    results = {}
    if list(Path(orpo_kernels.__file__).parent.glob("_C*")):
        results["c++"] = digests.measured(known["budgets"])
    results["torch"] = digests.result(process)
    return results


def problems(known):
    return [digests.draw(number, known["budgets"][number]) for number in range(digests.COUNT)]


def arithmetic(problem):
    dtypes = (*problem.dtypes[:2], problem.options["compute_dtype"])
    is_narrow = problem.autocast or any(each is not None and each.itemsize == 2 for each in dtypes)
    return "narrow" if is_narrow else "wide"


@pytest.mark.parametrize("backend", ["c++", "torch"])
def test_norms_agree(backend, known, found):
    if backend not in found:
        pytest.skip("the C++ tile operations are not built")
    for problem, expected in zip(problems(known), known["norms"], strict=True):
        tolerance, actual = TOLERANCE[arithmetic(problem)], found[backend]["norms"][problem.number]
        assert len(actual) == len(expected), str(problem)
        for one, other in zip(actual, expected, strict=True):
            # Below 1e-12: of a vocabulary of one entry, where the truth is 0.
            assert math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-12), str(problem)


@pytest.mark.parametrize("backend", ["c++", "torch"])
def test_bits_are_equal(backend, known, found):
    bits = known["machines"].get(digests.machine())
    if bits is None or backend not in found:
        pytest.skip(f"no digests of {backend} on {digests.machine()}")
    pairs = zip(problems(known), bits[backend], found[backend]["digests"], strict=True)
    moved = [str(problem) for problem, expected, actual in pairs if expected != actual]
    assert not moved, f"{len(moved)} of {digests.COUNT} moved:\n" + "\n".join(moved[:5])


def test_a_bit_or_an_exchange_of_two_elements_shows():
    results = {"logps": torch.arange(1.0, 9.0)}
    bit, exchanged = results["logps"].clone(), results["logps"].flip(0)
    bit.view(torch.int32)[3] ^= 1
    assert digests.digest({"logps": bit}) != digests.digest(results)
    assert digests.norms({"logps": exchanged}) != digests.norms(results)


def test_the_problems_are_of_every_kind(known):
    drawn = problems(known)
    assert {arithmetic(each) for each in drawn} == set(TOLERANCE)
    for gradient in ("exact", "sparse", "auto"):
        of = [each for each in drawn if each.options["gradient"] == gradient]
        assert {len(each.frozen) for each in of} == {0, 1, 2}
        assert {each.sets for each in of} == {1, 2}
        assert any(each.rank for each in of)
        assert any(each.packed for each in of)
        assert any(each.strided for each in of)
        assert any(known["budgets"][each.number] for each in of)
