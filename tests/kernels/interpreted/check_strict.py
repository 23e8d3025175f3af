"""The strict interpreter itself: each planted bug is caught, and bf16 is torch's."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreted.strict import State


@triton.jit
def _copy_kernel(out_ptr, x_ptr, n, limit, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < limit, other=0.0)
    tl.store(out_ptr + offs, (x.to(tl.float32) * 3.0).to(out_ptr.dtype.element_ty), mask=offs < n)


def copy(n=100, limit=100, step=64, x=None, out=None):
    x = torch.randn(n) if x is None else x
    out = torch.empty_like(x) if out is None else out
    _copy_kernel[(2,)](out, x, n, limit, step, BLOCK=64)
    return x, out


def test_clean():
    x, out = copy()
    assert torch.equal(out, x * 3)


def test_out_of_bounds():
    with pytest.raises(InterpreterError, match="OUT OF BOUNDS"):
        copy(limit=101)


def test_between_the_rows_of_a_view():
    view = torch.randn(2, 64)[:, :63]
    with pytest.raises(InterpreterError, match="OUT OF BOUNDS"):
        copy(n=127, limit=127, x=view, out=torch.empty(127))


def test_two_programs_write_one_element():
    with pytest.raises(InterpreterError, match="RACE"):
        copy(step=63)


def test_one_program_reads_what_another_writes():
    x = torch.randn(128)
    shifted = x[1:]  # in place, one element further: program 0 writes what program 1 reads
    with pytest.raises(InterpreterError, match="RACE"):
        copy(n=127, limit=127, x=x[:127], out=shifted)


@triton.jit
def _number_kernel(out_ptr, x, y, KIND: tl.constexpr):
    if KIND == "mul":
        number = x * y
    elif KIND == "add":
        number = x + y
    else:
        number = x - y
    tl.store(out_ptr, number)


# 16,744 rows of 128,256 logits are past 2^31; one less in either direction is not.
@pytest.mark.parametrize(
    ("kind", "x", "y"),
    [("mul", 16744, 128256), ("add", 2**31 - 1, 1), ("sub", 1 - 2**31, 2)],
)
def test_int32_overflow(kind, x, y):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="overflow"):
        _number_kernel[(1,)](out, x, y, KIND=kind)
    _number_kernel[(1,)](out, x - 1 if x > 0 else x + 1, y, KIND=kind)
    assert out.item() == {"mul": 16743 * 128256, "add": 2**31 - 1, "sub": -(2**31)}[kind]


@triton.jit
def _program_kernel(out_ptr):
    program = (tl.program_id(0) * 3 + tl.program_id(1)) * 4 + tl.program_id(2)
    tl.store(out_ptr + program, program)


def test_every_program_runs_once_in_no_order():
    out = torch.full((60,), -1, dtype=torch.int32)
    _program_kernel[(5, 3, 4)](out)
    assert out.tolist() == sorted(State.order) == list(range(60))
    assert State.order != list(range(60))


def test_bf16_rounds_like_torch():
    x = torch.randn(100)
    _, out = copy(x=x.bfloat16(), out=torch.empty(100, dtype=torch.bfloat16))
    assert torch.equal(out, (x.bfloat16().float() * 3).bfloat16())
