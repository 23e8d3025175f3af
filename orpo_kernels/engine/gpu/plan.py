"""Which shapes a call takes: of those whose bytes fit the budget, the fastest by `model.py`.

Of shapes as fast as the fastest, but for 2 %, the leanest is taken. More budget never makes a plan
slower than that: it only adds shapes to choose from. E is kept, for as many rows as fit, where that
saves more than the model errs. Plans are remembered, and made for a number of rows rounded up, so
that most steps of a training find theirs.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from orpo_kernels.engine.budget import TooSmallError
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.gpu.model import (
    Job,
    backward_bytes,
    backward_seconds,
    folded_bytes,
    folded_seconds,
    forward_bytes,
    forward_seconds,
    scan_bytes,
    scan_seconds,
    whole_wave,
)
from orpo_kernels.engine.gpu.shapes import MOST_HELD, Shape, Sweep
from orpo_kernels.kernels.slot_store import ScanShape

T = TypeVar("T")

_COLUMNS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 256, 128, 64)
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
_ROW_STEP = 256  # rows of a tile, where there are so many: whole output tiles
_KEPT_TILES = (512, 1024, 256)
_KEPT_SHARES = (1.0, 0.85)  # of the room beside the tile that keeps E: the backward needs some
_AS_FAST = 1.02  # of the fastest time: the leanest of such shapes is taken
_SCAN_AS_FAST = 1.005  # likewise: 22 tiles of an H200 took 4 % more than 15
_FOLDED_AS_FAST = 1.003  # likewise: few groups measured 4 % faster than many
_SAVES = 0.97  # E is kept where a step takes at most this of the time without
_SLOT_SHARES = (4, 8, 16, 32, 64)  # one in so many entries of a chunk has room among the slots
_ROOMY = 1.015  # of the time with least room: what more of it may cost
_LEAST_SCANNED = 256  # columns of a vocabulary block of the sparse forward
_COLUMN_STEP = 256  # of wide ones: whole output tiles
_BUDGET_STEP = 2**20  # what is left of a budget, rounded down, where there is so much
_SWEEP_STEP = 1024  # entries of the head


class ForwardPlan(NamedTuple):
    """Shape of the tiles, of those of rows that keep E, bytes beside E and results, seconds.

    `folded`: the rows that keep nothing are done by `linear_lse`, without a logit.
    """

    shape: Shape
    kept_shape: Shape | None
    folded: bool
    workspace_bytes: int
    seconds: float


class BackwardPlan(NamedTuple):
    """Sweeps over the vocabulary, bytes beside E and results, seconds."""

    sweeps: tuple[Sweep, ...]
    workspace_bytes: int
    seconds: float


def plan_forward(
    job: Job, budget: int, card: Card, *, with_g: bool, kept: int = 0, folds: bool = False
) -> ForwardPlan:
    """The fastest forward that fits.

    Args:
        job: sizes of the call.
        budget: bytes, E kept among them.
        card: of the device.
        with_g: whether hidden needs a gradient.
        kept: rows whose E is kept.
        folds: whether `linear_lse` runs on the device.

    Returns:
        The plan.

    Raises:
        ValueError: nothing fits; says what the smallest shape takes.
    """
    many, first, left = _rounded(job), *_keeping(job, budget, kept)
    return _plan_forward(many, left, card, with_g, min(first, many.rows), folds)


def plan_backward(job: Job, budget: int, card: Card, kept: int = 0) -> BackwardPlan:
    """The fastest sweeps of the weight gradient that fit.

    Args:
        job: sizes of the call.
        budget: bytes, E kept among them.
        card: of the device.
        kept: rows whose E is kept.

    Returns:
        The plan.

    Raises:
        ValueError: nothing fits; says what the smallest shape takes.
    """
    many, first, left = _rounded(job), *_keeping(job, budget, kept)
    return _plan_backward(many, left, card, min(first, many.rows))


def plan_scan(job: Job, groups: int, budget: int, card: Card) -> tuple[ScanShape, int]:
    """The fastest sparse forward that fits, with what room for kept entries costs next to nothing.

    Args:
        job: sizes of the call.
        groups: of the tail.
        budget: bytes.
        card: of the device.

    Returns:
        The shape, and the bytes it takes.

    Raises:
        ValueError: nothing fits; says what the smallest shape takes.
    """
    return _plan_scan(_rounded(job), groups, budget, card)


def kept_rows(job: Job, budget: int, card: Card, *, with_g: bool) -> int:
    """For how many of the first rows a trainable head keeps E: 0 where it saves too little."""
    return min(job.rows, _kept_rows(_rounded(job), budget, card, with_g))


def _keeping(job: Job, budget: int, kept: int) -> tuple[int, int]:
    """Rows that keep E, any number where all do, and what they leave of the budget."""
    left = budget - kept * job.kept_row_bytes
    if kept and left > 8 * _BUDGET_STEP:
        left = left // _BUDGET_STEP * _BUDGET_STEP
    return (1 << 62 if kept >= job.rows else kept), left


@functools.lru_cache(maxsize=1024)
def _plan_forward(
    job: Job, left: int, card: Card, with_g: bool, kept: int, folds: bool
) -> ForwardPlan:
    first = replace(job, rows=min(job.rows, kept))
    others = replace(job, rows=job.rows - first.rows)
    kept_shape, most, seconds = None, 0, 0.0
    if first.rows:
        found = _fastest(
            (
                Shape(min(rows, first.rows), min(rows, first.rows), job.vocabulary)
                for rows in _KEPT_TILES
            ),
            lambda shape: forward_bytes(job, shape, with_g=with_g, kept=True), left,
            lambda shape: forward_seconds(first, shape, card, with_g=with_g, kept=True),
        )  # fmt: skip
        kept_shape, most, seconds = _fitting(found, job, left)
    if others.rows == 0:
        return ForwardPlan(Shape(1, 1, 8), kept_shape, False, most, seconds)
    choice = _fastest(
        _forward_shapes(others, lambda shape: forward_bytes(job, shape, with_g=with_g), left),
        lambda shape: forward_bytes(job, shape, with_g=with_g), left,
        lambda shape: forward_seconds(others, shape, card, with_g=with_g),
    )  # fmt: skip
    is_folded = False
    if folds and not with_g:
        folded = _fastest(
            _folded_shapes(others), lambda shape: folded_bytes(job, shape), left,
            lambda shape: folded_seconds(others, shape, card), _FOLDED_AS_FAST,
        )  # fmt: skip
        tiles, whole = choice[0], folded[0]
        is_folded = tiles is None or (whole is not None and whole[2] < tiles[2])
        choice = folded if is_folded else choice
    shape, need, took = _fitting(choice, job, left)
    return ForwardPlan(shape, kept_shape, is_folded, max(most, need), seconds + took)


@functools.lru_cache(maxsize=1024)
def _plan_scan(job: Job, groups: int, budget: int, card: Card) -> tuple[ScanShape, int]:
    def planned(share: int) -> tuple[ScanShape, int, float]:
        found = _fastest(
            _scan_shapes(job, share, card), lambda shape: scan_bytes(job, shape, groups), budget,
            lambda shape: scan_seconds(job, shape, card), _SCAN_AS_FAST,
        )  # fmt: skip
        return _fitting(found, job, budget)

    shares = _roomy_shares(job)
    try:
        leanest = planned(shares[-1])
    except ValueError:  # room for less, then, and what has none is done the exact way
        shares = _SLOT_SHARES[1:]
        leanest = planned(shares[-1])
    for share in shares[:-1]:
        with contextlib.suppress(ValueError):
            shape, need, seconds = planned(share)
            if seconds <= _ROOMY * leanest[2]:
                return shape, need
    return leanest[:2]


def text_columns(vocabulary: int) -> int:
    """More than 64 rows of text keep, at the default of eps: 1,200 of 8,000, 4,000 of 128,256."""
    return min(vocabulary, 1500 + vocabulary // 40)


def _roomy_shares(job: Job) -> tuple[int, ...]:
    """Those with room for what text keeps, most room first; the most where no other has any."""
    needed = text_columns(job.vocabulary)
    found = tuple(each for each in _SLOT_SHARES[1:] if job.vocabulary // each >= needed)
    return found or _SLOT_SHARES[:1]


def _scan_shapes(job: Job, share: int, card: Card) -> Iterator[ScanShape]:
    for rows in dict.fromkeys(math.ceil(each / 64) * 64 for each in _row_counts(job.rows)):
        blocks = rows // 64
        slots = max(1024, blocks * job.vocabulary // share)
        listed = min(job.vocabulary, max(1024, 4 * job.vocabulary // share))
        widths = (
            *_equal_blocks(job.vocabulary, _COLUMN_STEP),
            *_equal_blocks(job.vocabulary, whole_wave(rows, card)),
            *_columns(job.vocabulary),
        )
        for columns in dict.fromkeys(widths):
            if columns == job.vocabulary or columns >= _LEAST_SCANNED:
                yield ScanShape(rows, columns, slots, listed, max(4, blocks // 2))


@functools.lru_cache(maxsize=1024)
def _plan_backward(job: Job, left: int, card: Card, kept: int) -> BackwardPlan:
    found = _fastest(
        _sweeps(job, left, card, kept),
        lambda sweeps: max(backward_bytes(job, sweep, kept) for sweep in sweeps), left,
        lambda sweeps: sum(backward_seconds(job, sweep, kept, card) for sweep in sweeps),
    )  # fmt: skip
    return BackwardPlan(*_fitting(found, job, left))


@functools.lru_cache(maxsize=1024)
def _kept_rows(job: Job, budget: int, card: Card, with_g: bool) -> int:
    def seconds(kept: int) -> float:
        try:
            first, left = _keeping(job, budget, kept)
            first = min(first, job.rows) if kept else 0
            forward = _plan_forward(job, left, card, with_g, first, False)
            return forward.seconds + _plan_backward(job, left, card, first).seconds
        except TooSmallError:
            return math.inf  # no room is left

    counts = set()
    for rows in _KEPT_TILES:
        shape = Shape(min(rows, job.rows), min(rows, job.rows), job.vocabulary)
        room = budget - forward_bytes(job, shape, with_g=with_g, kept=True)
        for share in _KEPT_SHARES:
            count = max(0, int(share * room) // job.kept_row_bytes)
            counts.add(job.rows if count >= job.rows else count // 64 * 64)
    best = min((count for count in counts if count), key=seconds, default=0)
    return best if best and seconds(best) < _SAVES * seconds(0) else 0


def _rounded(job: Job) -> Job:
    """The job of up to 6 % more rows."""
    step = max(64, 1 << max(0, job.rows.bit_length() - 5))
    return replace(job, rows=max(1, math.ceil(job.rows / step) * step))


def _fastest(
    candidates: Iterable[T],
    bytes_of: Callable[[T], int],
    budget: int,
    seconds_of: Callable[[T], float],
    as_fast: float = _AS_FAST,
) -> tuple[tuple[T, int, float] | None, int]:
    """Of the fastest candidates that fit the leanest, its bytes, seconds; and the least of any."""
    fitting: list[tuple[T, int, float]] = []
    least = 0
    for candidate in candidates:
        need = bytes_of(candidate)
        least = min(least or need, need)
        if need <= budget:
            fitting.append((candidate, need, seconds_of(candidate)))
    fastest = min((seconds for *_, seconds in fitting), default=math.inf)
    alike = (each for each in fitting if each[2] <= as_fast * fastest)
    return min(alike, key=lambda each: each[1], default=None), least


def _fitting(
    found: tuple[tuple[T, int, float] | None, int], job: Job, budget: int
) -> tuple[T, int, float]:
    best, least = found
    if best is None:
        raise TooSmallError(budget, least, (job.vocabulary, job.columns))
    return best


def _row_counts(rows: int) -> Iterator[int]:
    """Rows of a tile: all, a half, a third ... of them in whole steps, down to one."""
    last = 0
    parts = (*_PARTS, *(2**k for k in range(6, 31)))
    for each in (math.ceil(rows / part) for part in parts):
        step = next((s for s in (_ROW_STEP, 64, 8) if each > s), 1)
        count = min(rows, math.ceil(each / step) * step)
        if count != last:
            yield count
        last = count


def _equal_blocks(vocabulary: int, step: int) -> Iterator[int]:
    """Columns of a look, which no register has to hold: all, a half, a third ... in whole steps."""
    yield vocabulary
    for blocks in range(2, vocabulary // MOST_HELD + 1):
        yield min(vocabulary, math.ceil(vocabulary / (blocks * step)) * step)


def _columns(vocabulary: int) -> Iterator[int]:
    """Columns of a block, the widest first."""
    if vocabulary <= MOST_HELD:
        yield vocabulary
    yield from (columns for columns in _COLUMNS if columns < vocabulary)


def _forward_shapes(job: Job, bytes_of: Callable[[Shape], int], budget: int) -> Iterator[Shape]:
    for rows in _row_counts(job.rows):
        if job.vocabulary > MOST_HELD:
            yield Shape(rows, rows, job.vocabulary)
        fitting = 0
        for columns in _columns(job.vocabulary):
            shape = Shape(rows, rows, columns)
            yield shape
            fitting += bytes_of(shape) <= budget
            if job.head_item:  # a block that was cast serves several tiles
                groups = {min(job.rows, k * rows) for k in (2, 4)} | {job.rows}
                yield from (Shape(group, rows, columns) for group in groups)
            if fitting == 3:
                break  # narrower blocks are slower


def _folded_shapes(job: Job) -> Iterator[Shape]:
    for rows in _row_counts(job.rows):
        widths = _columns(job.vocabulary) if job.head_item else ()
        yield from (Shape(rows, rows, columns) for columns in (job.vocabulary, *widths))


def _sweeps(job: Job, budget: int, card: Card, kept: int) -> Iterator[tuple[Sweep, ...]]:
    V = job.vocabulary
    wide = Sweep(0, V, job.rows, min(V, 2048))
    yield from ((sweep,) for sweep in _whole_sweeps(job, budget, kept, 0))
    if not (job.gathers and job.in_result) or backward_bytes(job, wide, kept) <= budget:
        return
    # All rows at hand in the end of dW, whose own blocks are done in chunks.
    cut = (V - math.ceil(job.rows * job.row_bytes / (job.columns * job.result_item))) // _SWEEP_STEP
    cut *= _SWEEP_STEP
    if cut <= V // 2:
        return

    def bytes_of(sweep: Sweep) -> int:
        return backward_bytes(job, sweep, kept)

    def seconds_of(sweep: Sweep) -> float:
        return backward_seconds(job, sweep, kept, card)

    tail, _ = _fastest(_whole_sweeps(job, budget, kept, cut), bytes_of, budget, seconds_of)
    if tail is not None:
        for columns in _columns(V):
            yield Sweep(0, cut, job.rows, columns, in_result=True), tail[0]


def _whole_sweeps(job: Job, budget: int, kept: int, first: int) -> Iterator[Sweep]:
    for rows in _row_counts(job.rows):
        fitting = 0
        for columns in _columns(job.vocabulary):
            sweep = Sweep(first, job.vocabulary, rows, columns)
            yield sweep
            fitting += backward_bytes(job, sweep, kept) <= budget
            if fitting == 3:
                break
