"""The launches of the compile report: every kernel, with every dtype and option that matters."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from orpo_kernels.kernels import (
    column_sums,
    linear_lse,
    odds_ratio,
    pair_loss,
    sequence_mean,
    softmax_grad,
    softmax_stats,
)
from tests.kernels.loop_cases import loop_launches
from tests.kernels.scan_cases import gradient_launches, scan_launches

R, H, V = 256, 4096, 128256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSOR_CORES_SINCE = 80  # sm_75 has no kernel that multiplies

# What linear_lse takes its operands by.
FORMS = {
    80: "pointers", 86: "pointers", 89: "pointers", 90: "wgmma", 100: "tcgen05", 120: "tma",
    "gfx90a": "pointers", "gfx942": "pointers", "gfx1100": "pointers",
}  # fmt: skip


class Case(NamedTuple):
    """A launch under one name: table key, dtype of the streamed tensor, and the launch itself.

    What is asked of wide accesses and operands is asked of one of the kernels launched.
    """

    label: str
    kernel: str
    dtype: torch.dtype
    launch: Callable[[], Any]
    wide_loads: bool = True
    wide_stores: bool = False
    meant: str = ""  # the kernel asked; by default the one the key names
    alone: bool = False  # the launch's other kernels are left to other cases
    operands: str = ""  # of a matrix product: "tiles", "gathered" rows or single "elements"
    since: int = 0  # the first compute capability it is offered on

    def streams(self, name: str) -> bool:
        """Whether the compiled kernel `name` is the one asked."""
        return name == (self.meant or f"_{self.kernel}_kernel")

    def suits(self, target: int | str) -> bool:
        """Whether the launch is offered on the target."""
        return isinstance(target, str) or target >= self.since

    def key(self, target: int | str, architecture: str) -> tuple[str, str, torch.dtype]:
        """In the table."""
        return self.kernel.format(form=FORMS.get(target)), architecture, self.dtype


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _labels(sets: int, rows: int) -> torch.Tensor:
    return _cuda(sets, rows, dtype=torch.int64)


def _tile_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        # Plain as in most heads; and everything on at once, rows on no vector boundary.
        for what, columns, sets, options in (
            ("plain", V, 1, (1.0, None)),
            ("all options, odd V", 32003, 2, (0.5, 30.0)),
        ):

            def bias(columns: int = columns, sets: int = sets) -> torch.Tensor | None:
                return _cuda(columns) if sets == 2 else None

            def stats(
                with_sum=False, dtype=dtype, columns=columns, sets=sets, options=options, bias=bias
            ):
                tile = _cuda(R, columns, dtype=dtype)
                softmax_stats.softmax_stats(
                    tile, bias(), _labels(sets, R), 0, *options, with_logit_sum=with_sum
                )

            yield Case(f"softmax_stats {name}, {what}", "softmax_stats", dtype, stats)
            if sets == 2:
                with_sum = functools.partial(stats, with_sum=True)
                label = f"softmax_stats {name}, all and logit sum"
                yield Case(label, "softmax_stats", dtype, with_sum)
            outs = (None, torch.bfloat16) if dtype == torch.float32 else (None,)
            for out in outs:

                def grad(
                    dtype=dtype, columns=columns, sets=sets, options=options, bias=bias, out=out
                ):
                    tile = _cuda(R, columns, dtype=dtype)
                    target = None if out is None else _cuda(R, columns, dtype=out)
                    softmax_grad.softmax_grad_(
                        tile, bias(), _labels(sets, R), 0, _cuda(R), *options, target
                    )

                to = "" if out is None else " to bfloat16"
                yield Case(
                    f"softmax_grad_ {name}{to}, {what}", "softmax_grad", dtype, grad,
                    wide_stores=True,
                )  # fmt: skip

        def sums(dtype=dtype):
            column_sums.column_sums(_cuda(R, V, dtype=dtype), _cuda(R))

        yield Case(f"column_sums {name}", "column_sums", dtype, sums)


def _gemm_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for what, bias, sets, options in (
            ("plain", None, 1, (1.0, None, False)),
            ("pairs", None, 2, (1.0, None, False)),  # what the loss of a Llama evaluates
            ("all options", dtype, 2, (0.5, 30.0, True)),
        ):

            def lse(h, columns=V, dtype=dtype, bias=bias, sets=sets, options=options):
                hidden, weight = _cuda(R, h, dtype=dtype), _cuda(columns, h, dtype=dtype)
                offsets = None if bias is None else _cuda(columns, dtype=bias)
                linear_lse.linear_lse(hidden, weight, offsets, _labels(sets, R), *options)

            after = "" if bias is None else "_transformed"
            gemm = {"wide_loads": False, "meant": "_linear_lse_kernel", "alone": True}
            gemm["since"] = TENSOR_CORES_SINCE
            even, odd = functools.partial(lse, H), functools.partial(lse, H + 1, 32003)
            kernel = "linear_lse_{form}" + after
            yield Case(f"linear_lse {name}, {what}", kernel, dtype, even, operands="tiles", **gemm)
            kernel = f"linear_lse_elements{after}"
            label = f"linear_lse {name}, {what}, odd H"
            yield Case(label, kernel, dtype, odd, operands="elements", **gemm)
            if what == "plain":
                yield Case(
                    f"label_dots {name}", "label_dots", dtype, even, alone=True,
                    since=TENSOR_CORES_SINCE,
                )  # fmt: skip


def _small_cases() -> Iterator[Case]:
    def means(backward: bool, *shape: int) -> None:
        labels = [_cuda(*shape, dtype=torch.int64) for _ in range(2)]
        ids = labels[0] if len(shape) == 1 else None
        if backward:
            of_sets = (_cuda(2, 4), _cuda(2, 4))
            sequence_mean.sequence_mean_backward(*of_sets, *labels, -100, ids)
        else:
            logps = (_cuda(*shape), labels[0], _cuda(*shape), labels[1])
            sequence_mean.sequence_mean(*logps, -100, ids, 4)

    def loss(sets: int, by_token: bool) -> None:
        given = None if by_token else _labels(1, 1)[0, 0]
        pair_loss.pair_loss(_cuda(sets, 64), _cuda(sets, 64), given, given, 0.1, by_token, by_token)

    def pairs() -> None:
        odds_ratio.odds_ratio(_cuda(64), _cuda(64))
        odds_ratio.odds_ratio_backward(_cuda(64), _cuda(64), _cuda(64), _cuda(64))

    wide = torch.float32
    for what, shape in (("padded", (4, 4096)), ("packed", (4096,))):
        for kernel in ("sequence_mean", "sequence_mean_backward"):
            launch = functools.partial(means, kernel.endswith("backward"), *shape)
            yield Case(f"{kernel}, {what}", kernel, wide, launch, wide_loads=False)
    for sets, by_token in ((1, True), (2, False)):
        launch = functools.partial(loss, sets, by_token)
        yield Case(f"pair_loss, {sets} label sets", "pair_loss", wide, launch, wide_loads=False)
    yield Case("odds_ratio", "odds_ratio", wide, pairs, wide_loads=False)


def _loop_cases() -> Iterator[Case]:
    launches = (*loop_launches(), *scan_launches(), *gradient_launches())
    for label, kernel, dtype, launch, asked in launches:
        meant = "_softmax_rows_kernel" if kernel == "softmax_few_rows" else ""
        yield Case(label, kernel, dtype, launch, **{"meant": meant, **asked})


def cases() -> list[Case]:
    """Every launch of the report."""
    return [
        *_tile_cases(), *_gemm_cases(), *_small_cases(), *_loop_cases(),
    ]  # fmt: skip
