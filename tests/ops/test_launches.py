"""How many operations a call starts: on a GPU each is a launch, and small ones are all they cost.

Counted on a CPU with a dispatch mode: views start nothing, and an operation of ours is one. Beside
the vocabulary loop a whole call, forward, backward and metrics, may start 40.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels import orpo_loss
from orpo_kernels.loss import orpo_loss_from_logps

P, T, H, V = 2, 5, 4, 9  # sizes do not enter


class Operations(TorchDispatchMode):
    """The names of what is dispatched, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removeprefix("orpo_kernels::")
        if not func.is_view and name != "promote_types":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def labels():
    return [torch.randint(0, V, (2 * P, T)) for _ in range(2)]


LOSS = ["sequence_mean", "pair_loss", "ones_like", "mul", "sequence_mean_backward"]


@pytest.mark.parametrize("two_sets", [False, True])
def test_the_loss_of_log_probs(two_sets):
    first, second = labels()
    logps = [(-torch.rand(2 * P, T)).requires_grad_() for _ in range(2)]
    sets = (logps[0], first, logps[1], second) if two_sets else (logps[0], first)
    with Operations() as started:
        orpo_loss_from_logps(*sets).loss.backward()
    assert started.names == LOSS
    with Operations() as started:  # a count that is a number takes one, a tensor none
        orpo_loss_from_logps(*sets, num_pairs=3, num_nll_tokens=torch.tensor(7))
    assert started.names == ["sequence_mean", "full", "pair_loss"]


def test_packed_log_probs():
    ids = torch.arange(2 * P).repeat_interleave(T)
    first, second = (each.view(-1) for each in labels())
    logps = [(-torch.rand(2 * P * T)).requires_grad_() for _ in range(2)]
    with Operations() as started:
        orpo_loss_from_logps(
            logps[0], first, logps[1], second, sequence_ids=ids, num_sequences=2 * P
        ).loss.backward()
    # A CPU looks at the range of the ids; a GPU starts five for an assertion about it.
    checks = ["aminmax", "_local_scalar_dense", "_local_scalar_dense"]
    assert started.names == [*checks, *LOSS]


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("trains_head", [False, True])
def test_the_whole_loss(two_sets, trains_head):
    first, second = labels()
    hidden = torch.randn(2 * P, T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=trains_head)
    with Operations() as started:
        orpo_loss(hidden, weight, first, nll_labels=second if two_sets else None).loss.backward()
    loop = [name for name in started.names if "linear_logps" in name]
    assert len(loop) == 2 + trains_head
    assert len(started.names) - len(loop) <= 14, started.names
