"""The check of a head that trains and keeps E on a GPU, as is planned where it saves time.

It saves none in a call as small as a check, so the shapes are given here: whole rows, of which the
first half keeps E, and blocks of the vocabulary for which the others are computed again.
"""

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.engine import gemm
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import runs_triton
from orpo_kernels.selftest import logps
from orpo_kernels.selftest.figures import Case, Figure, Setting, like_torch

VARIANT = logps.Variant("E kept of half the rows", vocabulary=logps.WIDE, rows=20)


def cases(setting: Setting) -> Iterator[Case]:
    """The one check, where Triton's kernels run."""
    if runs_triton(setting.device, setting.dtype):
        yield Case("linear_logps", VARIANT.name, setting, _kept)


def _kept(setting: Setting) -> Iterator[Figure]:
    here = logps.problem(setting, VARIANT)
    truth = here.true().evaluate(logps.definition)
    eager = here.evaluate(logps.materialised)
    for what, actual in _evaluate(here).items():
        yield like_torch(what, actual, truth[what], eager[what], setting.dtype)


def _evaluate(here: logps.Problem) -> dict[str, Tensor]:
    """Log-probs, and both gradients, of the loops as a call has them that keeps E."""
    of_gpu = "orpo_kernels.engine.gpu."
    forward, backward, shapes, plans = (
        importlib.import_module(of_gpu + each) for each in ("forward", "backward", "shapes", "plan")
    )
    kernel, slopes_of, scaling = (
        importlib.import_module(f"orpo_kernels.kernels.{each}")
        for each in ("inputs", "coefficients", "scale_rows")
    )
    hidden, weight = (here.leaves[each].detach() for each in ("hidden", "weight"))
    labels, dtype = here.labels[0], hidden.dtype
    places = (labels != IGNORE_INDEX).nonzero()[:, 0]
    wide = torch.float32 if gemm.gemm_widens(hidden.device, dtype) else dtype
    inputs = kernel.Inputs(
        (hidden,), (weight,), None, labels[places], None, places, None, 1.0, None, dtype, wide
    )
    (N, _), M, V = hidden.shape, len(places), weight.shape[0]
    half, kept = M // 2, hidden.new_empty((M // 2, shapes.pitch(V)))
    statistics, g = hidden.new_zeros((7, N), dtype=torch.float32), torch.zeros_like(hidden)
    plan = plans.ForwardPlan(shapes.Shape(M, M, V), shapes.Shape(half, half, V), False, 0, 0.0)
    forward.forward(inputs, plan, kept, Results(statistics, g, g[:, :0]))

    slopes = slopes_of.Slopes(here.coefficients[0][None], labels[None], IGNORE_INDEX)
    out = HeadGradients((torch.empty_like(weight),), None)
    sweeps = (shapes.Sweep(0, V, N, shapes.MOST_HELD // 2),)
    backward.weight_gradient(inputs, statistics, slopes, sweeps, kept, out)
    scaling.scale_rows((g,), statistics, slopes, (weight,), dtype)
    found = torch.where(labels == IGNORE_INDEX, 0.0, statistics[3])
    return {"log-probs 1": found, "dhidden": g, "dweight": out.wanted[0]}
