"""The operands, the tolerance policy and the allocation meter of all tests; a rank's end."""

import math
import os
import sys
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from orpo_kernels import reference


class Problem(NamedTuple):
    """What a head is given: hidden (*rows, H), weight (V, H), bias (V,) or None, labels (K, *rows).

    `problem` makes one.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor

    @property
    def tile(self):
        """Its raw logits (*rows, V), summed in at least float32 and rounded to the dtype once."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        return (self.hidden.to(wide) @ self.weight.to(wide).t()).to(self.hidden.dtype)


def problem(
    rows, H, V, dtype=torch.float32, *, spread=4.0, peaked=False, bias=False, sets=1,
    unscored=-1, first_column=None, device="cpu",
):  # fmt: skip
    """Random operands of one call, or of one tile of it.

    Args:
        rows: N, or a shape.
        H: columns of hidden and weight.
        V: entries of the head, or columns of the tile.
        dtype: of hidden and weight, drawn in float64 and rounded.
        spread: standard deviation of the logits. The default is a trained head's: a few entries of
            a row hold most of its mass.
        peaked: instead, hidden stands near the entries of three tokens, the first of them the label
            of the first set.
        bias: a dtype, True for that of the others, or False for none.
        sets: K.
        unscored: the label of three positions in ten; None: all are scored.
        first_column: of a tile, where it begins in the vocabulary: labels lie before it, in it and
            behind it; the very first in its first column, the very last nowhere.
        device: where they are put; what is drawn does not depend on it.
    """
    rows = (rows,) if isinstance(rows, int) else tuple(rows)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    weight, hidden = draw(V, H), draw(*rows, H) * (spread * H**-0.5)
    labels = torch.randint(0, V if first_column is None else first_column + 2 * V, (sets, *rows))
    if peaked:
        near = torch.cat((labels[:1], torch.randint(0, V, (2, *rows))))
        shares = torch.rand(3, *rows, 1) * 14 / H
        hidden = (shares * weight[near]).sum(0) + draw(*rows, H) / H
    if first_column is not None:
        flat = labels.view(sets, math.prod(rows))
        flat[:1, :1], flat[-1:, -1:] = first_column, -1
    elif unscored is not None:
        labels[torch.rand(labels.shape) < 0.3] = unscored
    of_bias = dtype if bias is True else bias or None
    added = None if of_bias is None else draw(V).to(device, of_bias)
    return Problem(hidden.to(device, dtype), weight.to(device, dtype), added, labels.to(device))


def assert_accurate(actual, truth, eager=None):
    """Compares with the float64 truth computed on the same rounded inputs.

    Without `eager`, tier A, one final rounding from float32: at most
    `eps(dtype) |truth| + 4 eps(float32) max |truth|`. With `eager`, tier B, low-precision
    intermediates: maximal and RMS error at most twice the error of the same computation in plain
    torch in the same dtype, plus `eps(dtype)` of the scale.
    """
    assert actual.shape == truth.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - truth.double()).abs()
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    scale = truth.abs().max().double()
    if eager is None:
        bound = eps * truth.abs().double() + 4 * torch.finfo(torch.float32).eps * scale
        assert (error <= bound).all(), f"error {float((error - bound).max()):.2e} over the bound"
        return
    eager_error = (eager.double() - truth.double()).abs()
    assert error.max() <= 2 * eager_error.max() + eps * scale
    rms = truth.double().square().mean().sqrt()
    assert error.square().mean().sqrt() <= 2 * eager_error.square().mean().sqrt() + eps * rms


def assert_logit_sums(sums, tile, bias, scale, softcap):
    """Compares sums of logits with float64's: at most 8 eps of the sum of their magnitudes.

    Every term and every addition is rounded; sums of one sign measured at most 2 eps.
    """
    tile, bias = tile.double(), None if bias is None else bias.double()
    z, _ = reference.transform(tile if bias is None else tile + bias, scale, softcap)
    error = (sums.double() - reference.logit_sum(tile, bias, scale, softcap)).abs()
    assert sums.shape == error.shape
    assert (error <= 8 * torch.finfo(sums.dtype).eps * z.abs().sum(1)).all()


def peak_bytes(function):
    """Most bytes `function` held at once beyond what was there before it, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del result
    return peak


def leave():
    """End a process of gloo's whose results are written, without the interpreter's own end.

    A thread of gloo's that drops a tensor then wants the GIL: with torch 2.13 two ranks in ten
    waited for ever in the destructor of DDP's reducer, and others aborted.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
