"""The tolerance policy and the allocation meter of all tests."""

import torch
from torch.profiler import ProfilerActivity, profile

from orpo_kernels import reference


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
    tile, bias = tile.cpu().double(), None if bias is None else bias.cpu().double()
    z, _ = reference.transform(tile if bias is None else tile + bias, scale, softcap)
    error = (sums.cpu().double() - reference.logit_sum(tile, bias, scale, softcap)).abs()
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
