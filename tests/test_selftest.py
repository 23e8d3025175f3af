"""The self-test passes here, and finds and names what is broken on purpose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_kernels import loss, odds_ratio, selftest
from orpo_kernels import sequence_mean as sequence_mean_module
from orpo_kernels.engine import operands, scoring, tile_loop
from orpo_kernels.engine.linear_lse import linear_lse
from orpo_kernels.engine.tiles import NATIVE, csr_matmul_, softmax_collect_
from orpo_kernels.selftest import Check, SelfTestReport, logps, schedule
from orpo_kernels.selftest.figures import EPS32, Setting, like_torch, rounded_once
from tests.csrc.forms import plain

CPU = torch.device("cpu")
MonkeyPatch = pytest.MonkeyPatch


def run(*ops: str, model: bool = False) -> list[Check]:
    """The checks of these ops that fail."""
    cases = selftest._cases(CPU, torch.get_num_threads(), with_model=model)
    checks, _ = schedule.run([case for case in cases if case.op in ops], CPU)
    assert checks, f"no check of {ops}"
    return [check for check in checks if not check.passed]


@contextmanager
def kernel(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """`function` as what CPU tensors get, over C++ and plain torch alike."""
    with torch.library._scoped_library("orpo_kernels", "IMPL") as library:
        library.impl(name, function, "CPU")
        yield


@pytest.fixture(scope="module")
def passed() -> SelfTestReport:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.no_grad():
        result = selftest.self_test("cpu")
        assert not torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return result


def test_passes_here(passed: SelfTestReport) -> None:
    assert passed.passed, passed.text()
    assert passed.advice == ()
    assert {check.dtype for check in passed.checks} == {"float32", "bfloat16", "float16"}
    assert passed.environment["device"].startswith("cpu")
    assert set(passed.backends) == set(NATIVE)
    assert passed.backends["softmax_stats"] in ("c++", "plain torch")


def test_covers_every_registered_operation(passed: SelfTestReport) -> None:
    # A backward is checked with its forward; the mean logit is a metric, of the fused head.
    parts = {
        "head_mean_logits",
        "linear_logps_hidden_gradient_", "exact_linear_logps_dweight",
        "sparse_token_logps_dweight", "odds_ratio_backward", "sequence_mean_backward",
    }  # fmt: skip
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("orpo_kernels::")}
    checked = {check.op for check in passed.checks}
    assert "linear_logps" in checked
    assert registered - parts <= checked | {"exact_linear_logps"}  # by its public name


def test_text_has_every_figure_in_a_column_of_its_own(passed: SelfTestReport) -> None:
    lines = passed.text().splitlines()
    assert lines[-1].endswith("all passed")
    header = next(line for line in lines if re.search(r"float32 +bfloat16 +float16$", line))
    rows = [line for line in lines if re.match(r"linear_logps: ", line)]
    assert len(rows) == len({check.case for check in passed.checks if check.op == "linear_logps"})
    assert {len(row) for row in rows} == {len(header)}


def test_json_parses_and_has_no_nan(
    capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_cases", only("column_sums"))
    with kernel("column_sums", lambda tile, a: a.new_full(tile.shape[1:], torch.nan)):
        assert selftest.main(["--json", "--device", "cpu"]) == 1
    content = json.loads(capsys.readouterr().out, parse_constant=_refuse)
    assert content["passed"] is False
    assert [check["op"] for check in content["checks"]] == ["column_sums"] * 3
    assert content["checks"][0]["error"] is None
    assert content["environment"]["torch"] == torch.__version__
    assert any("--json" in advice for advice in content["advice"])


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def only(op: str) -> Callable[..., Iterator[Any]]:
    """The cases of this op."""
    cases = selftest._cases
    return lambda *args, **options: (each for each in cases(*args, **options) if each.op == op)


# Tile operations: right ones, written anew, and what is planted in them.


def _logits(logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = scale * (logits.float() if bias is None else logits.float() + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _label_columns(z: Tensor, labels: Tensor, first_column: int) -> Tensor:
    columns = torch.arange(first_column, first_column + z.shape[1])
    return (labels[:, :, None] == columns).any(0)


def _stats(
    logits: Tensor, bias: Any, labels: Tensor, first: int, scale: float, softcap: Any,
    with_logit_sum: bool = False,
) -> Any:  # fmt: skip
    z = _logits(logits, bias, scale, softcap)
    logit_sum = z.sum(1) if with_logit_sum else z.new_empty(0)
    z = z.masked_fill(_label_columns(z, labels, first), -torch.inf)
    row_max = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    return row_max, torch.exp(z - row_max[:, None]).sum(1), logit_sum


def _grad(
    logits: Tensor, bias: Any, labels: Tensor, first: int, reference: Tensor, scale: float,
    softcap: float | None, out: Tensor | None = None, *, slope: bool = True, step: int = 0,
) -> None:  # fmt: skip
    z = _logits(logits, bias, scale, softcap)
    probs = torch.exp(z - reference[:, None]) * scale
    if softcap is not None and slope:
        probs *= 1.0 - (z / softcap).square()
    probs.masked_fill_(_label_columns(z, labels, first), 0.0)
    if step:
        probs[:, step // 2 :: step] = 0.0
    (logits if out is None else out).copy_(probs)


def _sums(tile: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients @ tile.float()


def _zero_one_percent(*arguments: Any) -> None:
    _grad(*arguments, step=100)


def _no_slope(*arguments: Any) -> None:
    _grad(*arguments, slope=False)


def _one_label_set(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, bias, labels, *rest: function(logits, bias, labels[:1], *rest)


def _sum_off_by_ten_thousandth(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_max, sum_exp, logit_sum = _stats(*arguments)
    return row_max, sum_exp * (1 + 1e-4), logit_sum


def _logit_sum_without_labels(
    logits: Tensor, bias: Any, labels: Tensor, first: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    row_max, sum_exp, logit_sum = _stats(logits, bias, labels, first, *options)
    z = _logits(logits, bias, *options[:2])
    of_labels = z.masked_fill(~_label_columns(z, labels, first), 0.0).sum(1)
    return row_max, sum_exp, logit_sum - of_labels if options[2:] else logit_sum


def _lse_of_one_label_set(*arguments: Any) -> Any:
    one_set = arguments[3].clone()
    one_set[1] = -1
    return plain(linear_lse, *arguments[:3], one_set, *arguments[4:])


def _lse_with_half_the_sum(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, logit_sum = plain(linear_lse, *arguments)
    return *rest, logit_sum / 2


def _misses_an_entry(*arguments: Any) -> Any:
    return plain(softmax_collect_, *arguments[:10], 3, *arguments[11:])


def _redoes_nothing(*arguments: Any) -> Any:
    return plain(softmax_collect_, *arguments[:7], None, None, *arguments[9:])


def _ends_a_row_early(sums: Tensor, offsets: Tensor, *rest: Tensor) -> None:
    short = rest[1].clone()
    short[offsets[4] - 1] = 0.0
    plain(csr_matmul_, sums, offsets, rest[0], short, rest[2])


def _ignores_strides(tile: Tensor, coefficients: Tensor) -> Tensor:
    return _sums(torch.as_strided(tile, tile.shape, (tile.shape[1], 1)), coefficients)


def _accumulate(
    accumulator: Tensor, partial: Tensor, rescale: Tensor | None, alpha: float = 1.0
) -> None:
    if rescale is not None:
        accumulator *= rescale[:, None]
    accumulator += alpha * partial.float()


def _never_rescales(accumulator: Tensor, partial: Tensor, _: Any, alpha: float = 1.0) -> None:
    _accumulate(accumulator, partial, None, alpha)


def _raises(*_: Any) -> Tensor:
    raise RuntimeError("planted: out of resource: shared memory\nRequired: 131072")


@pytest.mark.parametrize(
    ("name", "function", "cases"),
    [
        # One wrong column in a hundred is far less than the rounding of a bf16 gradient.
        ("softmax_grad_", _zero_one_percent, 9),
        ("softmax_grad_", _no_slope, 3),
        ("softmax_grad_", _one_label_set(_grad), 9),
        ("softmax_stats", _one_label_set(_stats), 9),
        ("softmax_stats", _sum_off_by_ten_thousandth, 9),
        ("softmax_stats", _logit_sum_without_labels, 3),
        ("softmax_collect_", _misses_an_entry, 9),
        ("softmax_collect_", _redoes_nothing, 6),  # in float32 there is nothing to redo
        ("csr_matmul_", _ends_a_row_early, 3),
        ("linear_lse", _lse_of_one_label_set, 6),
        ("linear_lse", _lse_with_half_the_sum, 6),
        ("column_sums", _ignores_strides, 3),
        ("accumulate_", _never_rescales, 3),
    ],
)
def test_finds_a_wrong_kernel(name: str, function: Callable[..., Any], cases: int) -> None:
    with kernel(name, function):
        failed = run(name)
    assert [check.op for check in failed] == [name] * cases
    everywhere = {"float32"} if function is not _redoes_nothing else set()
    assert {check.dtype for check in failed} == {"bfloat16", "float16"} | everywhere
    assert all("is off by" in check.message for check in failed)
    assert run(name) == []  # and the plant is gone


def test_right_kernels_pass() -> None:
    right: dict[str, Callable[..., Any]] = {
        "softmax_stats": _stats, "softmax_grad_": _grad, "column_sums": _sums,
        "accumulate_": _accumulate,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, function in right.items():
            stack.enter_context(kernel(name, function))
        assert run(*right) == []


def test_a_kernel_that_raises_is_reported_and_the_rest_still_runs() -> None:
    with kernel("column_sums", _raises):
        failed = run("column_sums", "softmax_stats")
    assert {check.op for check in failed} == {"column_sums"}
    assert failed[0].message == "raised RuntimeError: planted: out of resource: shared memory"


def test_finds_a_race() -> None:
    def noisy(*arguments: Any) -> Any:
        lists = plain(softmax_collect_, *arguments)
        arguments[5].mul_(1 + EPS32 * torch.randint(-1, 2, arguments[5].shape))  # the sum
        return lists

    with kernel("softmax_collect_", noisy):
        failed = run("softmax_collect_", "linear_logps")
    assert {check.case for check in failed} == {"bitwise repeatable"}


# The engine, the loss, the model: a fault is in the rows of its op, and not in those before it.


def test_finds_a_wrong_label_gradient(monkeypatch: MonkeyPatch) -> None:
    right = operands.Statistics.label_shares
    monkeypatch.setattr(
        operands.Statistics, "label_shares", lambda *given: [1.02 * x for x in right(*given)]
    )
    failed = run("linear_logps", "softmax_grad_")
    assert {check.op for check in failed} == {"linear_logps"}
    assert len({check.dtype for check in failed}) == 3
    assert "frozen head" not in {check.case for check in failed}  # it has no dweight
    assert any("dweight" in check.message for check in failed)


def test_finds_blocks_that_do_not_fit_together(monkeypatch: MonkeyPatch) -> None:
    def without_rescaling(accumulator: Tensor, _: Tensor, *rest: Tensor) -> None:
        right(accumulator, torch.ones(accumulator.shape[0]), *rest)

    right = tile_loop.accumulate_product_
    monkeypatch.setattr(tile_loop, "accumulate_product_", without_rescaling)
    in_blocks = {"trainable head, recomputed in blocks", "all of it, in blocks"}
    sums = "log-probs <= 0, gradients sum to 0"  # in blocks too
    assert {check.case for check in run("linear_logps")} == {*in_blocks, sums}


def test_finds_a_lost_second_label_set(monkeypatch: MonkeyPatch) -> None:
    def first_only(self: Any, dlogps: Tensor) -> Any:
        return right(self, dlogps * torch.tensor([1.0, 0.0])[: dlogps.shape[0], None])

    right = scoring.Scored.coefficients
    monkeypatch.setattr(scoring.Scored, "coefficients", first_only)
    failed = run("linear_logps")
    assert {check.case for check in failed} == {"two label sets", "all of it, in blocks"}


def test_finds_gemms_in_too_few_bits(monkeypatch: MonkeyPatch) -> None:
    def bf16(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return right(out, a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype))

    right = tile_loop.matmul_into
    monkeypatch.setattr(tile_loop, "matmul_into", bf16)
    failed = run("linear_logps")
    # fp16 rounds nearly as much by itself.
    assert {check.dtype for check in failed} == {"float32"}
    assert len(failed) >= len(logps.VARIANTS)


def test_finds_cancellation_in_the_pair_term(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(odds_ratio, "_log1mexp", lambda x: torch.log1p(-torch.exp(x)))
    failed = run("odds_ratio", "sequence_mean")
    assert {check.op for check in failed} == {"odds_ratio"}


def test_finds_a_mean_over_padding(monkeypatch: MonkeyPatch) -> None:
    def over_all(values: Tensor, *rest: Any) -> Tensor:
        return right(torch.ones_like(values) if bool((values >= 0).all()) else values, *rest)

    right = sequence_mean_module._sums
    monkeypatch.setattr(sequence_mean_module, "_sums", over_all)
    assert {check.op for check in run("sequence_mean", "odds_ratio")} == {"sequence_mean"}


def test_finds_swapped_sides(monkeypatch: MonkeyPatch) -> None:
    def swapped(mean: Tensor, count: Tensor, **options: Any) -> Any:
        odds, *nll = mean.roll(mean.shape[1] // 2, 1)[:1], mean[1:]
        return right(torch.cat((odds, *nll)), count, **options)

    right = loss.pair_loss
    monkeypatch.setattr(loss, "pair_loss", swapped)
    failed = run("orpo_loss", "odds_ratio", "pair_loss")
    assert {check.op for check in failed} == {"orpo_loss"}
    assert "or_loss" in failed[0].message


def test_finds_a_loss_that_does_not_fall(monkeypatch: MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    right = loss.sequence_mean

    def negated(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        mean, count = right(*given, **options)
        return -mean, count

    monkeypatch.setattr(loss, "sequence_mean", negated)
    failed = run("fuse_head", model=True)
    assert len(failed) == 2  # float32 and bf16
    assert "loss after" in failed[0].message


# The measuring itself.


def test_blocks_are_blocks(monkeypatch: MonkeyPatch) -> None:
    starts = []

    def recorded(*arguments: Any) -> Any:
        starts.append(arguments[3])
        return plain(softmax_collect_, *arguments)

    setting = Setting(CPU, torch.float32)
    with kernel("softmax_collect_", recorded):
        logps._results(logps.problem(setting, logps.IN_BLOCKS), logps.IN_BLOCKS)
        assert len(set(starts)) > 1
        starts.clear()
        logps._results(logps.problem(setting, logps.TRAINS), logps.TRAINS)
        assert set(starts) == {0}


def test_nan_is_not_within_any_limit() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    wrong = torch.tensor([1.0, torch.nan, 1.0])
    assert not rounded_once("x", wrong, truth).passed
    assert not like_torch("x", wrong, truth, torch.ones(3), torch.float32).passed
    assert rounded_once("x", torch.ones(3), truth).passed
    assert not rounded_once("x", torch.full((3,), 1.0 + 8 * EPS32), truth).passed
