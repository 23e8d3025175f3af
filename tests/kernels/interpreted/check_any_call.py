"""Calls drawn at random, through the launchers, against float64: what no list of cases thought of.

`linear_logps` as it plans for a GPU, tiles as its budget makes them: of the smallest budget blocks
of the vocabulary and chunks of rows, of a larger one whole rows. A search of this kind, of some
1,700 calls, found seven faults (November 2026); these are few enough for every run of the tests.
"""

import math
import re

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orpo_kernels import linear_logps, reference
from orpo_kernels.engine.sparse import scan_loop
from orpo_kernels.kernels import live_columns
from tests.kernels.interpreted.engine import as_on_a_gpu, short_steps

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Of a product's operands: rounding of an entry of P, of what multiplies h, of the result.
ROUNDING = {F32: 2.0**-20, BF16: 2.0**-7, FP16: 2.0**-9}


def least_bytes(call):
    """What the smallest tile takes, as the refusal of one byte says."""
    try:
        call(1)
    except ValueError as refusal:
        return max(int(each.replace(",", "")) for each in re.findall(r"\d[\d,]*", str(refusal)))
    return None  # nothing is scored


@st.composite
def problems(draw):
    """Sizes, dtype and options; the numbers themselves by a seed."""
    return {
        "rows": draw(st.integers(1, 140)),  # up to three blocks of 64, ragged
        "H": draw(st.integers(1, 40)),
        "V": draw(st.integers(2, 600)),  # up to three tiles of 256 in a block, and its rest
        "dtype": draw(st.sampled_from((F32, BF16, FP16))),
        "widens": draw(st.booleans()),  # whether 16-bit operands give float32: since sm_80
        "scale": draw(st.sampled_from((1.0, 0.125, 20.0))),
        "softcap": draw(st.sampled_from((None, None, 3.0, 200.0))),
        "sets": draw(st.integers(1, 2)),
        "rank": draw(st.sampled_from((0, 0, 1, 5))),
        "bias": draw(st.booleans()),
        "trains": draw(st.booleans()),
        "unscored": draw(st.sampled_from((0.0, 0.3, 0.95))),
        "budget": draw(st.sampled_from((1, 4, None))),  # of the least
        "gradient": draw(st.sampled_from(("exact", "sparse"))),
        "seed": draw(st.integers(0, 2**31)),
    }


# Not made smaller where it fails: that takes many times as long, and says what was drawn anyway.
@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=(Phase.generate,))
@given(problems())
def test_any_call(drawn):
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch, widens=drawn["widens"] or drawn["dtype"] == F32)
        short_steps(patch)
        # Of so few tokens most columns are live: no call is left to the exact loop for that.
        patch.setattr(scan_loop, "MOST_DENSE", 1.0)
        patch.setattr(live_columns, "MOST_LIVE", 1)
        judge(**drawn)


def judge(
    rows, H, V, dtype, widens, scale, softcap, sets, rank, bias, trains, unscored, budget, gradient,
    seed,
):  # fmt: skip
    """Compares one call with the same of the reference."""
    torch.manual_seed(seed)
    shapes = {"hidden": (rows, H), "weight": (V, H), "bias": (V,)}
    shapes |= {"hidden_r": (rows, rank), "weight_r": (V, rank)}
    # Logits of a few nats; a quarter of the tokens stands out, as in text.
    size = {"hidden": 3.0 / (scale * H**0.5), "hidden_r": 1.0 / (scale * max(rank, 1) ** 0.5)}
    mine = {k: (torch.randn(shape) * size.get(k, 1.0)).to(dtype) for k, shape in shapes.items()}
    mine["bias"] += (torch.rand(V) < 0.25) * 6.0 / scale
    labels = torch.randint(0, V, (sets, rows))
    labels[torch.rand(sets, rows) < unscored] = -100
    if sets == 2:  # chosen rows of the one are those of the other, where both are scored
        same = torch.rand(rows) < 0.5
        labels[1, same] = labels[0, same]
    left_out = ({"bias"} if not bias else set()) | ({"hidden_r", "weight_r"} if not rank else set())
    mine = {k: v for k, v in mine.items() if k not in left_out}
    trained = {k for k in mine if trains or k.startswith("hidden")}
    true = {k: v.double().requires_grad_(k in trained) for k, v in mine.items()}
    mine = {k: v.requires_grad_(k in trained) for k, v in mine.items()}

    def call(workspace):
        low_rank = (mine["hidden_r"], mine["weight_r"]) if rank else None
        given = tuple(labels) if sets == 2 else labels[0]
        eps = None if gradient == "exact" else 2.0**-12
        out = linear_logps(
            mine["hidden"], mine["weight"], given, mine.get("bias"), logit_scale=scale,
            softcap=softcap, low_rank=low_rank, gradient=gradient, eps=eps,
            workspace_bytes=workspace,
        )  # fmt: skip
        return torch.stack(out) if sets == 2 else out[None]

    least = least_bytes(call) if budget else None
    logps = call(least and budget * least)
    low_rank = (true["hidden_r"], true["weight_r"]) if rank else None
    expected = reference.linear_logps(
        true["hidden"], true["weight"], labels, true.get("bias"), logit_scale=scale,
        softcap=softcap, low_rank=low_rank,
    )  # fmt: skip
    rounding = ROUNDING[dtype]
    # A logit that is written in 16 bits is off by its own rounding, up to 2^6 of these problems.
    off = 1e-4 if widens or dtype == F32 else rounding * 64
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=off)

    a = torch.rand(sets, rows) + 0.5
    found = torch.autograd.grad((logps * a).sum(), [mine[k] for k in sorted(trained)])
    wanted = torch.autograd.grad((expected * a).sum(), [true[k] for k in sorted(trained)])
    # Of the sparse gradient entries up to eps are their average: the root of eps, of a fifth of a
    # row's mass, three times for what a row of the head is longer than the gradient.
    dropped = 0.02 if gradient == "sparse" else 0.0
    for name, each, truth in zip(sorted(trained), found, wanted, strict=True):
        assert each.dtype == dtype
        assert torch.isfinite(each).all(), name
        # Terms of either sign: what they add up to may be less than one of them.
        factor = true[{"h": "weight", "w": "hidden"}.get(name[0], "bias")].detach()
        term = factor.reshape(len(factor), -1).norm(dim=1).amax() if name != "bias" else 1.0
        floor = (rounding + off) * scale * float(a.norm() * term) * math.sqrt(sets)
        limit = (2 * rounding + off + dropped) * float(truth.norm()) + floor
        assert float((each.double() - truth).norm()) <= limit, name
