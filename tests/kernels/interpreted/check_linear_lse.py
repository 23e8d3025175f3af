"""The GEMM without logits in the strict interpreter against float64: forms, options, edges."""

import pytest
import torch

from orpo_kernels import kernels, linear_logps, reference
from orpo_kernels.engine import policy
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.linear_lse import linear_lse
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.tuning import Device, Share, Tile, share_columns
from tests.kernels.interpreted.engine import short_steps
from tests.kernels.interpreted.plugin import launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS32 = torch.finfo(torch.float32).eps
HOPPER, AMPERE = Device("datacenter", 3, 90), Device("datacenter", 3, 80)
# Device, (R, H, V), extra columns of the stored rows of hidden and of weight, form taken, and why.
CASES = [
    pytest.param(HOPPER, (150, 64, 700), (0, 0), "wgmma", id="TMA, ragged rows and columns"),
    pytest.param(HOPPER, (130, 100, 600), (4, 28), "wgmma", id="TMA, ragged H, strides unlike"),
    pytest.param(AMPERE, (150, 72, 700), (8, 0), "pointers", id="pointers, ragged everywhere"),
    pytest.param(AMPERE, (3, 64, 256), (0, 64), "pointers", id="few rows, one block of columns"),
    pytest.param(AMPERE, (1, 8, 1), (0, 0), "pointers", id="one logit"),
    pytest.param(HOPPER, (70, 33, 300), (0, 0), "elements", id="odd H: single elements"),
    pytest.param(AMPERE, (70, 64, 300), (1, 0), "elements", id="odd stride: single elements"),
]
OPTIONS = [
    pytest.param(1.0, None, False, 1, id="plain"),
    pytest.param(0.3, None, True, 2, id="scale, bias, two label sets"),
    pytest.param(1.7, 2.0, True, 2, id="scale, bias, softcap, two label sets"),
    pytest.param(-0.5, 30.0, False, 1, id="negative scale, softcap"),
]


@pytest.fixture
def device(monkeypatch):
    def use(device):
        monkeypatch.setattr(tuning, "device_info", lambda _: device)

    return use


def matrix(rows, columns, extra, dtype):
    """In memory that starts with the first element and ends with the last; NaN in between."""
    stride = columns + extra
    # 16 bytes of room, so that the first element can start on a boundary.
    storage = torch.full(((rows - 1) * stride + columns,), torch.nan).to(dtype)
    return storage.as_strided((rows, columns), (stride, 1)).copy_(torch.randn(rows, columns))


def problem(shape, extra, dtype, sets, with_bias):
    R, H, V = shape
    hidden, weight = matrix(R, H, extra[0], dtype), matrix(V, H, extra[1], dtype)
    weight.mul_(4 * H**-0.5)
    labels = torch.randint(-1, V, (sets, R))
    labels[0, 0], labels[-1, -1] = 0, V - 1
    return hidden, weight, torch.randn(V).to(dtype) if with_bias else None, labels


def check(inputs, scale, softcap, with_logit_sum=True):
    hidden, weight, bias, labels = inputs
    found = linear_lse(*inputs, scale, softcap, with_logit_sum)
    wide = [None if each is None else each.double() for each in (hidden, weight, bias)]
    true_max, true_sum, true_dots, true_total = reference.linear_lse(*wide, labels, scale, softcap)
    row_max, sum_exp, dots, total = (each.double() for each in found)
    some = ~torch.isinf(true_max)
    # Products summed in float32, then z rounded once: relative to the terms of a dot.
    terms = hidden.double().norm(dim=1).max() * weight.double().norm(dim=1).max()
    z_error = 4 * EPS32 * max(1.0, abs(scale) * float(terms), *true_max[some].abs().tolist())
    torch.testing.assert_close(row_max[some], true_max[some], rtol=0, atol=z_error)
    shifted = true_sum[some] * torch.exp(true_max[some] - row_max[some])
    torch.testing.assert_close(sum_exp[some], shifted, rtol=2 * z_error + 3e-6, atol=0)
    assert not sum_exp[~some].any()
    assert (row_max[~some] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(dots, true_dots, rtol=0, atol=4 * EPS32 * float(terms))
    if with_logit_sum:
        columns = weight.shape[0]
        torch.testing.assert_close(total, true_total, rtol=1e-5, atol=z_error * columns**0.5 * 4)
    else:
        assert total.shape == (0,)
    return found


@pytest.mark.parametrize(("scale", "softcap", "with_bias", "sets"), OPTIONS)
@pytest.mark.parametrize(("card", "shape", "extra", "form"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, card, shape, extra, form, dtype, scale, softcap, with_bias, sets):
    device(card)
    before = len(launches)
    inputs = problem(shape, extra, dtype, sets, with_bias)
    check(inputs, scale, softcap, with_logit_sum=sets == 1)
    transformed = "_transformed" if with_bias or softcap is not None else ""
    assert launches[before:] == [f"linear_lse_{form}{transformed}", "label_dots"]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_extremes(device):
    device(AMPERE)
    hidden, weight = torch.zeros(4, 8), torch.zeros(400, 8)
    hidden[:, 0] = torch.tensor([-1e4, 1.0, torch.nan, 0.0])
    weight[:, 0] = 1.0
    weight[300, 0] = 81.0
    labels = torch.tensor([[-1, 300, -1, 5]])
    row_max, sum_exp, dots, _ = linear_lse(hidden, weight, None, labels, 1.0, None, False)
    # Far below 0 (a maximum that starts at 0 would stay there), a label that is the top, NaN.
    torch.testing.assert_close(row_max[:2], torch.tensor([-1e4, 1.0]), rtol=2e-7, atol=0)
    torch.testing.assert_close(sum_exp[:2], torch.tensor([399.0, 399.0]), rtol=2e-3, atol=0)
    assert torch.isnan(sum_exp[2])
    assert sum_exp[3] == 399.0
    assert dots.tolist() == [[0.0, 81.0, 0.0, 0.0]]


def test_same_bits_in_any_order(device):
    device(HOPPER)
    inputs = problem((150, 64, 1000), (0, 0), torch.bfloat16, 2, False)
    first = linear_lse(*inputs, 1.0, None, True)
    for _ in range(3):
        again = linear_lse(*inputs, 1.0, None, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_several_groups_of_rows(device, monkeypatch):
    # 5 blocks of rows in groups of 2, the last one short; 3 splits of 4 blocks of columns.
    device(AMPERE)
    small = (Tile(16, 32, 16, 4, 2),)
    monkeypatch.setitem(tuning.TABLE, ("linear_lse_pointers", "datacenter", torch.float32), small)
    from orpo_kernels.kernels import linear_lse as launcher

    monkeypatch.setattr(launcher, "share_columns", lambda *_: Share(3, 2))
    check(problem((70, 24, 120), (0, 0), torch.float32, 2, False), 1.0, None)


def test_without_a_kernel_the_plain_form(device):
    device(AMPERE)
    before = len(launches)
    hidden, weight, _, labels = problem((4, 8, 20), (0, 0), torch.float32, 1, False)
    linear_lse(hidden.double(), weight.double(), None, labels, 1.0, None, False)
    linear_lse(hidden, torch.randn(8, 20).t(), None, labels, 1.0, None, False)
    linear_lse(hidden, weight, None, labels.expand(3, 4), 1.0, None, False)
    assert not [name for name in launches[before:] if "lse" in name]


def test_old_cards_are_refused_by_name(device):
    from orpo_kernels.kernels.linear_lse import linear_lse as launcher

    device(Device("consumer", 40, 75))
    inputs = problem((4, 8, 20), (0, 0), torch.float32, 1, False)
    with pytest.raises(NotImplementedError, match="sm_80 or newer, this device is sm_75"):
        launcher(*inputs, 1.0, None, False)


def test_the_users_allocator_stays(device):
    import triton
    from triton.runtime import _allocation

    def mine(size, alignment, stream):
        raise AssertionError

    device(HOPPER)
    triton.set_allocator(mine)
    linear_lse(*problem((4, 8, 20), (0, 0), torch.bfloat16, 1, False), 1.0, None, False)
    assert _allocation._allocator.get() is mine


@pytest.mark.parametrize("processors", [24, 108, 132, 170])
def test_the_shares_fill_the_device(processors):
    tile = Tile(128, 256, 64, 8, 4)
    for row_blocks in (1, 2, 5, 16, 64, 100, 1000):
        for column_blocks in (126, 501, 1024):
            splits, group = share_columns(row_blocks, column_blocks, tile, processors)
            assert splits * group <= processors
            waves = -(-row_blocks * splits // processors)
            ideal = row_blocks * column_blocks / processors
            spent = waves * -(-column_blocks // splits)
            # At most MAX_SPLITS programs share a row: one block of rows cannot fill a large card.
            usable = min(1.0, row_blocks * tuning.MAX_SPLITS / processors)
            assert spent <= 1.25 * ideal / usable + 1


@pytest.fixture
def chosen(device, monkeypatch):
    """The engine takes linear_lse wherever it can: on a card that is slow to pass logits on."""
    device(AMPERE)
    monkeypatch.setattr(policy, "device_class", lambda _: "cuda sm_80+")
    monkeypatch.setattr(policy, "card_of", lambda _: Card(3, 1e12, 1e9, 80))
    short_steps(monkeypatch)
    kernels._installed_backend.cache_clear()


@pytest.mark.parametrize("low_rank", [False, True], ids=["head as it is", "joined with a LoRA"])
def test_log_probs_and_weight_gradient_without_a_tile(chosen, low_rank):
    N, H, V = 40, 32, 1500
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H) / 3, torch.randn(V)
    weight.requires_grad_()
    labels = (torch.randint(0, V, (N,)), torch.randint(0, V, (N,)))
    for each in labels:
        each[::5] = -100
    lora = (torch.randn(N, 8), torch.randn(V, 8) / 3) if low_rank else None
    before = len(launches)
    options = {"softcap": 5.0, "logit_scale": 0.7}
    budget = 260_000 if low_rank else 2**20  # blocks of 1,024 columns of the joined head, two
    with torch.no_grad():
        found = linear_logps(
            hidden, weight, labels, bias, low_rank=lora, workspace_bytes=budget, **options
        )
    product = [*["take_rows"] * low_rank, "linear_lse_pointers_transformed"]
    further = [*product, "combine_rows"] * low_rank
    assert launches[before:] == [
        "score_rows", "choose_rows", "take_rows", *product, "label_terms", "combine_rows", *further,
        "finish_rows",
    ]  # fmt: skip
    wide = [each.detach().double() for each in (hidden, weight, bias)]
    wide[1].requires_grad_()
    wide_lora = None if lora is None else tuple(each.double() for each in lora)
    truth = [
        reference.linear_logps(wide[0], wide[1], each, wide[2], low_rank=wide_lora, **options)
        for each in labels
    ]
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true.detach(), rtol=1e-5, atol=1e-5)
    # Too little to keep E: the backward recomputes, relative to the maximum found here.
    trained = linear_logps(
        hidden, weight, labels, bias, low_rank=lora, workspace_bytes=300_000, **options
    )
    assert launches[-2:] == ["combine_rows", "finish_rows"]
    a, b = torch.randn(2, N)
    (trained[0] @ a + trained[1] @ b).backward()
    (truth[0] @ a.double() + truth[1] @ b.double()).backward()
    assert (weight.grad - wide[1].grad).norm() <= 1e-5 * wide[1].grad.norm()


def test_kilobytes_are_enough():
    hidden, weight = torch.randn(40, 64), torch.randn(600, 64)
    labels = torch.randint(0, 600, (40,))
    found = linear_logps(hidden, weight, labels, workspace_bytes=40_000)
    truth = reference.linear_logps(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the smallest tile"):
        linear_logps(hidden, weight, labels, workspace_bytes=1_000)
