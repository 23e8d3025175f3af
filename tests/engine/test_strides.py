"""Every stride works, on both CPU backends: a layout in memory is no part of a call's meaning.

A call on operands laid out in some way is compared with the same call on contiguous copies. Hidden
and head are small ratios of integers, so that a logit is exact in whatever order a GEMM sums it:
the log-probs, and what the sparse gradient keeps, are equal to the bit. So is every gradient as
long as the operands of the GEMMs (hidden, weight and their low-rank parts) stand as they do in the
copies. Where these are transposed or stepped BLAS may take another kernel and another order for
`E W` and `E^T h`: gradients then agree within a few roundings of their largest element (measured in
plain torch: 2.6 eps of float32 and half an eps of bfloat16; 16 and 2 are allowed).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_kernels import linear_logps

SWITCH = "ORPO_KERNELS_CPU_BACKEND"
# H and V divide by no vector's width.
B, T, H, V, RANK = 6, 5, 9, 521, 3
# Of 16 rows and 256 columns, the smallest tile there is: two chunks of three blocks, with room for
# copies of their operands (24 KB), and far from the next larger one.
WORKSPACE = {torch.float32: 160_000, torch.bfloat16: 220_000}
EPS = 2.0**-7  # keeps a few entries of a row
GEMM_OPERANDS = ("hidden", "weight", "hidden_r", "weight_r")
MODES = [(gradient, head) for gradient in ("exact", "sparse") for head in ("frozen", "trained")]
LAYOUTS = {
    # name: operand, order of its dimensions in memory, steps, first elements left out, expanded
    "W.t()": ("weight", (1, 0), (1, 1), 0, ()),
    "W.t(), every second column": ("weight", (1, 0), (1, 2), 0, ()),
    "W, every second entry": ("weight", (0, 1), (2, 1), 0, ()),
    "W, every second column": ("weight", (0, 1), (1, 2), 0, ()),
    "W, part of a wider one": ("weight", (0, 1), (1, 1), 1, ()),
    "W, one entry expanded": ("weight", (0, 1), (1, 1), 0, (0,)),
    "W, one column expanded": ("weight", (0, 1), (1, 1), 0, (1,)),
    "hidden (N, H).t()": ("hidden", (1, 0), (1, 1), 0, ()),
    "hidden (N, H), every second row": ("hidden", (0, 1), (2, 1), 0, ()),
    "hidden (N, H), every second column": ("hidden", (0, 1), (1, 2), 0, ()),
    "hidden (N, H), one row expanded": ("hidden", (0, 1), (1, 1), 0, (0,)),
    "hidden (N, H), one column expanded": ("hidden", (0, 1), (1, 1), 0, (1,)),
    "hidden, (T, B, H) in memory": ("hidden", (1, 0, 2), (1, 1, 1), 0, ()),
    "hidden, (B, H, T) in memory": ("hidden", (0, 2, 1), (1, 1, 1), 0, ()),
    "hidden, without the last token": ("hidden", (0, 1, 2), (1, 1, 1), 1, ()),
    "hidden, every second token and column": ("hidden", (0, 1, 2), (1, 2, 2), 0, ()),
    "hidden, one token expanded": ("hidden", (0, 1, 2), (1, 1, 1), 0, (1,)),
    "hidden, one number expanded": ("hidden", (0, 1, 2), (1, 1, 1), 0, (0, 1, 2)),
    "bias[::2]": ("bias", (0,), (2,), 0, ()),
    "bias, part of a longer one": ("bias", (0,), (1,), 1, ()),
    "bias, one number expanded": ("bias", (0,), (1,), 0, (0,)),
    "hidden_r, (T, B, r) in memory": ("hidden_r", (1, 0, 2), (1, 1, 1), 0, ()),
    "hidden_r, (r, B, T) in memory": ("hidden_r", (2, 0, 1), (1, 1, 1), 0, ()),
    "weight_r.t()": ("weight_r", (1, 0), (1, 1), 0, ()),
    "weight_r, every second entry": ("weight_r", (0, 1), (2, 1), 0, ()),
    "labels, transposed": ("labels", (1, 0), (1, 1), 0, ()),
    "tail_groups, one row expanded": ("tail_groups", (0, 1), (1, 1), 0, (0,)),
    "upstream, one number expanded": ("upstream", (0, 1), (1, 1), 0, (0, 1)),
}


def laid_out(values, order, steps, skipped, expanded):
    """The values in that layout; the memory between them is NaN, or no label."""
    shape, count = values.shape, len(order)
    for dim in expanded:
        values = values.narrow(dim, 0, 1)
    gap = torch.nan if values.is_floating_point() else 2**40
    sizes = [values.shape[dim] * steps[dim] + 2 * skipped for dim in order]
    view = torch.full(sizes, gap, dtype=values.dtype).permute(
        [order.index(d) for d in range(count)]
    )
    ends = zip(values.shape, steps, strict=True)
    view = view[tuple(slice(skipped, skipped + size * step, step) for size, step in ends)]
    view.copy_(values)
    return view.expand(shape)


def operands(dtype, rows, ignored, *, low_rank):
    def exact(*shape):
        return (torch.randint(-8, 9, shape) / 8).to(dtype)

    labels = torch.randint(0, V, rows).masked_fill(torch.rand(rows) < ignored, -100)
    given = {
        "hidden": exact(*rows, H), "weight": exact(V, H) * 2, "bias": exact(V), "labels": labels,
        "tail_groups": torch.randint(0, 2, rows), "upstream": torch.randn(rows),
    }  # fmt: skip
    extra = {"hidden_r": exact(*rows, RANK), "weight_r": exact(V, RANK)} if low_rank else {}
    return given | extra


def results(given, mode, **options):
    """Log-probs, and the gradients by name."""
    gradient, head = mode
    given = {name: each.detach() for name, each in given.items()}
    names = ("hidden", "hidden_r", *(("weight", "bias", "weight_r") if head == "trained" else ()))
    trained = [name for name in names if name in given]
    for name in trained:
        given[name].requires_grad_()
    if "hidden_r" in given:
        options["low_rank"] = (given["hidden_r"], given["weight_r"])
    logps = linear_logps(
        given["hidden"], given["weight"], given["labels"], given["bias"], gradient=gradient,
        eps=EPS, tail_groups=given["tail_groups"], logit_scale=0.7, softcap=8.0, **options,
    )  # fmt: skip
    found = torch.autograd.grad(logps, [given[name] for name in trained], given["upstream"])
    return logps.detach(), dict(zip(trained, found, strict=True))


def assert_same(given, mode, **options):
    """What the call gives is what contiguous copies give: see the top of this file."""
    copies = {name: each.contiguous().clone() for name, each in given.items()}
    logps, found = results(given, mode, **options)
    expected_logps, expected = results(copies, mode, **options)
    assert torch.equal(logps, expected_logps)
    moved = [
        name for name in GEMM_OPERANDS
        if name in given and given[name].stride() != copies[name].stride()
    ]  # fmt: skip
    for name, gradient in found.items():
        other = expected[name]
        assert gradient.shape == other.shape
        eps = max(torch.finfo(gradient.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        bound = 2 * eps * float(other.abs().max()) if moved else 0.0
        assert (gradient.double() - other.double()).abs().max() <= bound, name


# A cast keeps strides, and it is the cast block that a GEMM reads.
DTYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float32 in bfloat16": (torch.float32, torch.bfloat16),
}


# Which rows are scored decides whether hidden is gathered. Some and all of them; in one tile and in
# several, which start inside the operands.
CASES = [(0.3, {}), (0.0, {}), (0.0, WORKSPACE)]


@pytest.mark.usefixtures("_bfloat16_gemms")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, mode, dtypes):
    (name, *how), (dtype, compute_dtype) = LAYOUTS[layout], DTYPES[dtypes]
    rows = (B * T,) if name == "hidden" and len(how[0]) == 2 else (B, T)
    for ignored, workspace in CASES:
        given = operands(dtype, rows, ignored, low_rank=name.endswith("_r"))
        given[name] = laid_out(given[name], *how)
        assert not given[name].is_contiguous() or "part of" in layout
        workspace_bytes = workspace.get(compute_dtype or dtype)
        assert_same(given, mode, compute_dtype=compute_dtype, workspace_bytes=workspace_bytes)


@st.composite
def layouts(draw, dims):
    order = draw(st.permutations(range(dims)))
    steps = draw(st.tuples(*[st.integers(1, 3)] * dims))
    return order, steps, draw(st.integers(0, 2)), draw(st.sets(st.integers(0, dims - 1)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    data=st.data(), mode=st.sampled_from(MODES), rows=st.sampled_from(((B, T), (B * T,))),
    ignored=st.sampled_from((0.0, 0.3, 0.9)), dtypes=st.sampled_from(sorted(DTYPES)),
    tiles=st.booleans(), low_rank=st.booleans(),
)  # fmt: skip
def test_any_layout_of_all_operands(data, mode, rows, ignored, dtypes, tiles, low_rank):
    torch.manual_seed(0)
    dtype, compute_dtype = DTYPES[dtypes]
    laid = {
        name: laid_out(each, *data.draw(layouts(each.ndim), label=name))
        for name, each in operands(dtype, rows, ignored, low_rank=low_rank).items()
    }
    workspace_bytes = WORKSPACE[compute_dtype or dtype] if tiles else None
    assert_same(laid, mode, compute_dtype=compute_dtype, workspace_bytes=workspace_bytes)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get(SWITCH) == "torch", reason="this process has that backend")
def test_plain_torch_too():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", __file__]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env={**os.environ, SWITCH: "torch"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
