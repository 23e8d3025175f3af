"""`use_backend`: which form of the tile operations runs, in every thread, and for how long."""

import threading

import pytest
import torch

from orpo_kernels import kernels, linear_logps, use_backend
from orpo_kernels.engine.tiles import native
from tests.helpers import problem


def backends():
    return native.cpu_backend(), kernels.gpu_backend()


@pytest.mark.skipif(native.cpu_backend() == "torch", reason="there is no other form here")
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_forms_run(gradient, dtype):
    # V 2,999: several vectors and a rest.
    given = problem(40, 32, 2999, dtype)
    hidden, weight = given.hidden.requires_grad_(), given.weight.requires_grad_()

    def call():
        logps = linear_logps(hidden, weight, given.labels[0], ignore_index=-1, gradient=gradient)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))]

    own = call()
    with use_backend("torch"):
        assert backends() == ("torch", "torch")
        assert native.cpu_backend_reason() == "use_backend('torch')"
        plain = call()
    # C++ and torch add in another order: not the same bits, the same numbers.
    assert any(not torch.equal(one, other) for one, other in zip(own, plain, strict=True))
    scale = torch.finfo(dtype).eps * 8
    for one, other in zip(own, plain, strict=True):
        assert (one - other).abs().max() <= scale * other.abs().max()
    assert all(torch.equal(one, other) for one, other in zip(own, call(), strict=True))


def test_contexts_nest_and_hold_in_every_thread():
    before = backends()
    seen = []
    with use_backend("torch"):
        with use_backend("auto"):
            assert backends() == before
        thread = threading.Thread(target=lambda: seen.append(backends()))
        thread.start()
        thread.join()
    assert seen == [("torch", "torch")]
    assert backends() == before


def test_contexts_may_close_in_another_order():
    before, first, second = backends(), use_backend("torch"), use_backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends() == before
    second.__exit__(None, None, None)
    assert backends() == before


def test_an_error_inside_closes_it():
    before = backends()
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert backends() == before


def test_other_names_are_refused():
    with (
        pytest.raises(ValueError, match=r"backend must be one of .*'torch'.*got 'triton'"),
        use_backend("triton"),
    ):
        pass
