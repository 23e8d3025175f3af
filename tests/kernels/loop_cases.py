"""The launches of the loops of a GPU, for the compile report: every kernel of them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from orpo_kernels.kernels.choose_rows import choose_rows
from orpo_kernels.kernels.coefficients import Slopes, coefficients, unit_of
from orpo_kernels.kernels.column_totals import ColumnTotals
from orpo_kernels.kernels.combine_rows import combine_rows
from orpo_kernels.kernels.finish_rows import FinishRows
from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
from orpo_kernels.kernels.label_terms import label_terms
from orpo_kernels.kernels.scale_rows import scale_rows
from orpo_kernels.kernels.score_rows import score_rows
from orpo_kernels.kernels.softmax_block import SoftmaxBlock
from orpo_kernels.kernels.softmax_rows import SoftmaxRows
from orpo_kernels.kernels.take_rows import TakeRows
from orpo_kernels.kernels.weight_probs import WeightProbs

N, M, H, V, RANK = 512, 300, 4096, 128256, 16
BLOCK = 1000  # columns of a tile: every row of the table holds them
Yielded = Iterator[tuple[str, str, torch.dtype, Callable[[], Any], dict[str, bool]]]


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def inputs(dtype: torch.dtype, everything: bool, rows: int = M) -> Inputs:
    """A plain head; or a LoRA on one with a bias, a scale, a softcap, and two label sets."""
    labels = functools.partial(_cuda, rows, dtype=torch.int64)
    columns = (H, RANK) if everything else (H,)
    return Inputs(
        tuple(_cuda(N, each, dtype=dtype) for each in columns),
        tuple(_cuda(V, each, dtype=dtype) for each in columns),
        _cuda(V, dtype=dtype) if everything else None, labels(), labels() if everything else None,
        labels(), None, 0.5 if everything else 1.0, 30.0 if everything else None, dtype,
        torch.float32,
    )  # fmt: skip


def _state(given: Inputs) -> torch.Tensor:
    return _cuda(2 + 2 * given.label_sets, given.labels.shape[0])


def _slopes(given: Inputs) -> Slopes:
    sets = given.label_sets
    return Slopes(_cuda(sets, N), _cuda(sets, N, dtype=torch.int64), -100)


def _tiles(wide: torch.dtype, dtype: torch.dtype, columns: int) -> Tiles:
    """Over the logits where P is narrower or alike and columns are few, else apart."""
    pitch = -(-columns // 8) * 8
    logits = _cuda(M, pitch, dtype=wide)
    if columns == BLOCK or wide == dtype:
        return Tiles(logits, logits.view(dtype), columns)
    return Tiles(logits, _cuda(M, pitch, dtype=dtype), columns)


def _softmax_cases(dtype: torch.dtype, name: str, everything: bool, what: str) -> Yielded:
    # Float32 logits; and those a GEMM could not widen, whose products are summed apart.
    for wide in {torch.float32, dtype}:
        to = f"{str(wide).removeprefix('torch.')} to {name}"
        apart = wide != torch.float32

        def block(wide=wide, apart=apart):
            given = inputs(dtype, everything)
            partial = _cuda(M, given.columns, dtype=dtype) if apart else None
            sums = Sums(_cuda(M, given.columns), partial)
            step = SoftmaxBlock(given, _state(given), _tiles(wide, dtype, BLOCK), sums, 8.0)
            step((0, M), 0, (0, BLOCK), 0)

        def rows(wide=wide, few=False):
            given = inputs(dtype, everything, 100 if few else M)
            tiles = _tiles(wide, dtype, V)
            one_look = wide != dtype
            step = SoftmaxRows(given, _state(given), tiles, 8.0, one_look=one_look)
            step((0, 100), 0, (0, V), 0)

        def probs(wide=wide):
            given, tiles = inputs(dtype, everything), _tiles(wide, dtype, BLOCK)
            unit = _cuda(1) if everything else None
            step = WeightProbs(
                given, tiles.probs, tiles.logits, _cuda(5, M), unit, columns=BLOCK, kept=False
            )
            step((0, M), 0, (0, BLOCK))

        stores = {"wide_stores": True}
        yield f"softmax_block {to}, {what}", "softmax_block", wide, block, stores
        yield f"softmax_rows {to}, {what}", "softmax_rows", wide, rows, stores
        few = functools.partial(rows, few=True)
        yield f"softmax_few_rows {to}, {what}", "softmax_few_rows", wide, few, stores
        yield f"weight_probs {to}, {what}", "weight_probs", wide, probs, stores


def _row_cases(dtype: torch.dtype, name: str, everything: bool, what: str) -> Yielded:
    def terms():
        label_terms(inputs(dtype, everything))

    def take():
        given = inputs(dtype, everything)
        out = _cuda(M, given.columns, dtype=dtype)
        TakeRows(out, given.hidden, given.positions)(0, M)

    def finish():
        given = inputs(dtype, everything)
        g = tuple(_cuda(N, each, dtype=dtype) for each in (H, RANK))
        sums = Sums(_cuda(M, given.columns), None)
        FinishRows(given, _state(given), sums, _cuda(7, N), g)(0, M, 0, 1)

    def scale():
        given = inputs(dtype, everything)
        g = tuple(_cuda(N, part.shape[1], dtype=dtype) for part in given.weight)
        scale_rows(g, _cuda(7, N), _slopes(given), given.weight, dtype)

    stores = {"wide_stores": True}
    yield f"label_terms {name}, {what}", "label_terms", dtype, terms, {}
    yield f"take_rows {name}, {what}", "take_rows", dtype, take, stores
    yield f"finish_rows {name}, {what}", "finish_rows", dtype, finish, stores
    yield f"scale_rows {name}, {what}", "scale_rows", dtype, scale, stores


def loop_launches() -> Yielded:
    """Label, kernel, dtype streamed, the launch, and what is asked of it beside wide loads."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for everything, what in ((False, "plain"), (True, "all options")):
            yield from _softmax_cases(dtype, name, everything, what)
            yield from _row_cases(dtype, name, everything, what)

        def kept(dtype=dtype):
            given = inputs(dtype, everything=False)
            tile = _cuda(M, BLOCK, dtype=dtype)
            source = _cuda(M, V, dtype=dtype)
            step = WeightProbs(given, tile, source, _cuda(5, M), None, columns=BLOCK, kept=True)
            step((0, M), 0, (0, BLOCK))

        def totals(dtype=dtype):
            ColumnTotals(_cuda(1, V), _cuda(M, BLOCK, dtype=dtype))(M, 0, BLOCK, adds=True)

        def reach(dtype=dtype):
            unit_of(_cuda(M), _cuda(M, H, dtype=dtype), None)

        yield f"weight_probs {name}, of E kept", "weight_probs", dtype, kept, {"wide_stores": True}
        yield f"column_totals {name}", "column_totals", dtype, totals, {}
        yield f"reach {name}", "reach", dtype, reach, {}

    def rows():
        given = inputs(torch.bfloat16, everything=True)
        coefficients(_cuda(7, N), _slopes(given), given.positions, 1.0)

    def combined():
        combine_rows(_cuda(4, M), _cuda(2, M, 8), 0)

    def scores():
        labels, groups = _cuda(2, N, dtype=torch.int64), _cuda(N, dtype=torch.int64)
        _, _, counts = score_rows(labels, -100, V, groups)
        choose_rows(*labels, groups, counts)

    narrow = {"wide_loads": False}
    yield "score_rows, choose_rows", "score_rows", torch.int64, scores, narrow
    yield "coefficients", "coefficients", torch.float32, rows, narrow
    yield "combine_rows", "combine_rows", torch.float32, combined, narrow
