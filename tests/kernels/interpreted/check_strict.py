"""The strict interpreter itself: each planted bug is caught, and bf16 is torch's."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreted.strict import State
from tests.kernels.overlaps import BY_ELEMENT


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
    x = torch.randn(192)  # a block further: program 0 writes what program 1 reads
    with pytest.raises(InterpreterError, match="RACE"):
        copy(n=128, limit=128, x=x[:128], out=x[64:])


@pytest.mark.parametrize("further", [0, 1])
def test_a_program_writes_what_it_has_read(further):
    # In place, and one element further: on a GPU another warp may not have read it.
    x = torch.randn(65)
    with pytest.raises(InterpreterError, match=r"HAZARD.*read or written"):
        copy(n=64, limit=64, x=x[:64], out=x[further:])


def test_what_is_listed_may_be_written_by_the_element_that_read_it(monkeypatch):
    monkeypatch.setitem(BY_ELEMENT, "_copy_kernel", ("x_ptr", "out_ptr"))
    x = torch.randn(65)
    before = x.clone()
    copy(n=64, limit=64, x=x[:64], out=x[:64])
    assert torch.equal(x[:64], before[:64] * 3)
    with pytest.raises(InterpreterError, match="HAZARD"):
        copy(n=64, limit=64, x=x[:64], out=x[1:])


@triton.jit
def _reverse_kernel(x_ptr, HALF: tl.constexpr, BARRIER: tl.constexpr, AGAIN: tl.constexpr):
    lane = tl.arange(0, 64)
    x = tl.load(x_ptr + lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + (63 - lane), x)
    if AGAIN:
        tl.store(x_ptr + HALF + lane, tl.load(x_ptr + lane))


def test_a_barrier_orders_the_warps_of_a_program():
    x = torch.arange(64.0)
    _reverse_kernel[(1,)](x, HALF=0, BARRIER=True, AGAIN=False)
    assert x.tolist() == list(range(63, -1, -1))
    with pytest.raises(InterpreterError, match=r"HAZARD.*read or written"):
        _reverse_kernel[(1,)](x, HALF=0, BARRIER=False, AGAIN=False)
    with pytest.raises(InterpreterError, match=r"HAZARD.* loads byte .* written, with no barrier"):
        _reverse_kernel[(1,)](torch.zeros(128), HALF=64, BARRIER=True, AGAIN=True)


@triton.jit
def _count_kernel(count_ptr):
    tl.store(count_ptr, tl.load(count_ptr) + 1)


def test_a_number_that_every_warp_reads_and_one_writes():
    with pytest.raises(InterpreterError, match="HAZARD"):
        _count_kernel[(1,)](torch.zeros(1))


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
