"""One look at a tile of logits: row sums, live columns, and the column sums of what is dropped.

    z = softcap(scale * (x + b)),   r = (dz / dx) / scale,   E_tv = e^z_tv, labels' columns left out
    estimate_t <= log of the sum of all exponentials of row t, its labels' among them
    s_t = sum_v E_tv e^-reference
    column v of 64 rows is live when some E_tv r_tv e^-estimate_t > eps / |scale|
    and has two slots, not one, when these of 64 rows, of those over, add to SPLIT
    tail_gv = sum over rows t of group g of E_tv r_tv e^-estimate_t, v not live

As no estimate is above the true logarithm, every entry of the softmax gradient over eps is in a live
column. The estimate is the labels' exponentials, what earlier blocks have shown, and, of a chunk's
first block, a look of its own at the first columns (`LOOK`), which gives sums alone.

R rows in B blocks of 64; a program reads a span of columns, S spans, L of a look. Exponents are to
base 2. Sums are kept by thread over the tiles of a span and reduced once; only where an estimate is
so far too low that they leave float32 is the span read again, against the maxima of its rows. (A
softcap of at most 34 bounds how low: the kernel is then compiled without.) Labels' logits become
-inf once per row, instead of a comparison per logit. Float32 arithmetic, no atomics. Bytes: the
tile once; per 64 rows and column 1 + 4 G.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS, SPLIT
from orpo_kernels.kernels.elementwise import tanh, whole_vectors
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.scan_state import ScanState
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, cdiv

LOOKED = 8192
"""Columns of the first block that a chunk's estimates come from."""

ADDED = tl.constexpr(4)
"""Neighbours of a row whose exponentials a thread adds at once: 16 bytes of float32 logits."""

WHOLE = tl.constexpr(2**16)
"""Of the slots and the columns of a span in one number, what a column counts: slots are fewer."""

NEVER = tl.constexpr(1e30)
"""Estimate of a row that keeps and drops nothing: every exponential is 0 against it."""

SPANS = 32
"""Spans whose sums a program adds at once."""

_LOWEST = tl.constexpr(-1e30)  # a reference where there is nothing
_LIVE = tl.constexpr(2.0**100)  # factor of entries over the threshold in the sum of a column
_FEW = tl.constexpr(2.0**10)  # thresholds, more than 64 entries that are not over it add to
_FAR_TOO_LOW = tl.constexpr(2.0**64)  # a row's sum from which on its estimate is
_NEAR = 100.0  # over every estimate, to base 2: no sum of a row leaves float32


@triton.jit
def exponentials(x, bias, level, ratio, log2_scale, SIGN: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """`2^(z log2 e - level)` of raw logits x, and that times r; 0 where x marks a label.

    Without a softcap `log2_scale` is the scale times log2 e; with one, that of the softcap, and
    `ratio` the scale over the softcap.
    """
    if HAS_SOFTCAP:
        is_label = x == SIGN * float("-inf")
        bounded, slope = tanh((tl.where(is_label, 0.0, x) + bias) * ratio)
        e = tl.where(is_label, 0.0, tl.exp2(bounded * log2_scale - level))
        return e, e * slope
    e = tl.exp2((x + bias) * log2_scale - level)
    return e, e


@triton.jit
def _tile(
    logits_ptr, offs, bias_ptr, first_column, column, C, level, ratio, log2_scale,
    SIGN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEAR: tl.constexpr,
    RAGGED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """E and E r of a tile of columns, 0 past C."""
    if RAGGED:  # what is read past C is the row's own padding, whole vectors of it
        inside = (column < tl.cdiv(C, VECTOR) * VECTOR)[None, :]
        x = tl.load(logits_ptr + offs + column[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(logits_ptr + offs + column[None, :]).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + column, mask=column < C, other=0.0)
        bias = bias.to(tl.float32)[None, :]
    e, u = exponentials(x, bias, level[:, None], ratio, log2_scale, SIGN, HAS_SOFTCAP)
    if HAS_SOFTCAP and not NEAR:  # infinity times a slope of 0
        u = tl.where((e == float("inf")) & (u != u), 0.0, u)
    if RAGGED:
        e = tl.where((column < C)[None, :], e, 0.0)
        u = tl.where((column < C)[None, :], u, 0.0)
    return e, u


@triton.jit
def _spans(partial_ptr, row, exists, R, spans, start, SLOPED: tl.constexpr, SPANS: tl.constexpr):
    """Reference and sums of rows in some spans, 0 past the last."""
    span = start + tl.arange(0, SPANS)
    inside = exists[:, None] & (span < spans)[None, :]
    at = partial_ptr + span[None, :] * R + row[:, None]
    reference = tl.load(at, mask=inside, other=0.0)
    s = tl.load(at + spans * R, mask=inside, other=0.0)
    if SLOPED:
        return reference, s, tl.load(at + 2 * spans * R, mask=inside, other=0.0)
    return reference, s, s


@triton.jit
def add_spans(partial_ptr, row, exists, R, spans, top, total, sloped, SLOPED: tl.constexpr,
    SPANS: tl.constexpr,
):  # fmt: skip
    """To sums of rows relative to `top` those of spans: the new reference, both sums."""
    of_rows = (partial_ptr, row, exists, R, spans)
    reference, s, u = _spans(*of_rows, 0, SLOPED, SPANS)
    for start in range(0, spans, SPANS):
        following = _spans(*of_rows, start + SPANS, SLOPED, SPANS)  # on its way meanwhile
        reference = tl.where(s > 0, reference, _LOWEST)
        higher = tl.maximum(top, tl.max(reference, 1))
        before, share = tl.exp2(top - higher), tl.exp2(reference - higher[:, None])
        total = total * before + tl.sum(s * share, 1)
        if SLOPED:
            sloped = sloped * before + tl.sum(u * share, 1)
        top = higher
        reference, s, u = following
    return top, total, sloped


@triton.jit
def _looked(looks_ptr, row, exists, R, looks, estimate, SPANS: tl.constexpr):
    """Estimates of rows, with what a look has shown of them."""
    if looks > 0:
        estimate, looked, _u = add_spans(
            looks_ptr, row, exists, R, looks, estimate, estimate * 0.0 + 1.0, 0.0, False, SPANS
        )
        estimate += tl.log2(looked)
    return estimate


@triton.jit
def _mark(
    logits_ptr, labels_ptr, lane, row, exists, stride, first_column, begin, end, SIGN: tl.constexpr
):
    """-inf at the labels of rows, where they are columns `begin` to `end`."""
    marked = (exists * 0.0 + SIGN * float("-inf")).to(logits_ptr.dtype.element_ty)
    label = tl.load(labels_ptr + row, mask=exists, other=-1) - first_column
    mine = exists & (label >= begin) & (label < end)
    tl.store(logits_ptr + lane * stride + label, marked, mask=mine)


@triton.jit
def _of_threads(x, ADDED: tl.constexpr):
    """Sums of the neighbours that a thread holds: a fourth of the registers."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // ADDED, ADDED)), 2)


@triton.jit
def _exponents(x, bias, ratio, log2_scale, SIGN: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """`z log2 e` of raw logits, -inf where x marks a label."""
    if HAS_SOFTCAP:
        is_label = x == SIGN * float("-inf")
        bounded, _slope = tanh((tl.where(is_label, 0.0, x) + bias) * ratio)
        return tl.where(is_label, float("-inf"), bounded * log2_scale)
    return (x + bias) * log2_scale


@triton.jit
def _against_maxima(
    logits_ptr, offs, bias_ptr, first_column, begin, end, C, estimate, ratio, log2_scale,
    SIGN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Reference and both sums of the rows of a span, where an estimate is far too low."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for tile in range(begin, end):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < C)[None, :]
        x = tl.load(logits_ptr + offs + column[None, :], mask=inside, other=0.0).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first_column + column, mask=column < C, other=0.0)
            bias = bias.to(tl.float32)[None, :]
        z = _exponents(x, bias, ratio, log2_scale, SIGN, HAS_SOFTCAP)
        top = tl.maximum(top, tl.max(tl.where(inside, z, float("-inf")), 1))
    level = tl.maximum(estimate, top)
    sums = tl.zeros((ROWS, COLUMNS // ADDED), tl.float32)
    sloped = sums
    for tile in range(begin, end):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        e, u = _tile(
            logits_ptr, offs, bias_ptr, first_column, column, C, level, ratio, log2_scale,
            SIGN, HAS_BIAS, HAS_SOFTCAP, True, True, VECTOR,
        )  # fmt: skip
        sums += _of_threads(e, ADDED)
        if HAS_SOFTCAP:
            sloped += _of_threads(u, ADDED)
    return level, tl.sum(sums, 1), tl.sum(sloped, 1)


@triton.jit
def _in_second(groups_ptr, row, exists, GROUPS: tl.constexpr):
    """1 for rows of the second group, 0 for others."""
    if GROUPS == 2:
        return (tl.load(groups_ptr + row, mask=exists, other=0) == 1).to(tl.float32)
    return row * 0.0


@triton.jit
def _groups_of(in_second, exists, GROUPS: tl.constexpr):
    """1 where all rows are of the second group, else 0; whether there are rows of both."""
    if GROUPS == 2:
        counts = tl.sum(exists.to(tl.int32) + WHOLE * in_second.to(tl.int32), 0)
        rows, seconds = counts % WHOLE, counts // WHOLE
        return (seconds == rows).to(tl.float32), (seconds > 0) & (seconds < rows)
    return 0.0, False


@triton.jit
def _drop(
    live_ptr, tails_ptr, u, in_second, all_second, mixed, block, column, pitch, threshold, heavy,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Stores slots of the columns of a tile, and sums of those without; both, (COLUMNS,)."""
    # One reduction says all: 64 entries up to the threshold are far less than one over it, times
    # the factor.
    total = tl.sum(tl.where(u > threshold, u * _LIVE, u), 0)
    live = total > threshold * _FEW
    slots = live.to(tl.int32) + (total > heavy * _LIVE).to(tl.int32)
    total = tl.where(live, 0.0, total)
    tl.store(live_ptr + block.to(tl.int64) * pitch + column, slots.to(tl.int8))
    out = tails_ptr + block.to(tl.int64) * (GROUPS * pitch) + column
    if GROUPS == 2:
        second = total * all_second
        first = total - second
        if mixed:  # both summed: what a difference leaves of a group that drops nothing is noise
            first = tl.where(live, 0.0, tl.sum(u * (1.0 - in_second)[:, None], 0))
            second = tl.where(live, 0.0, tl.sum(u * in_second[:, None], 0))
        tl.store(out, first)
        tl.store(out + pitch, second)
    else:
        tl.store(out, total)
    return slots, total


@triton.jit(
    do_not_specialize=[
        "first_row", "R", "C", "first_column", "tiles", "spans", "looks", "stride_logits", "M",
        "threshold", "heavy", "ratio", "log2_scale",
    ],
    do_not_specialize_on_alignment=[
        "partial_ptr", "looks_ptr", "counts_ptr", "losses_ptr", "rows_ptr", "labels_ptr",
        "second_ptr", "groups_ptr", "bias_ptr",
    ],
)  # fmt: skip
def _scan_kernel(
    logits_ptr,  # (R, C); a label's own becomes -inf
    partial_ptr,  # (2 or 3, S, R) float32: reference, sum, sum of E r
    looks_ptr,  # (2, L, R) float32: likewise, of a look
    live_ptr,  # (B, S SPAN) int8: slots of a column
    counts_ptr,  # (B, S) int32: slots, and columns that have some
    tails_ptr,  # (B, G, S SPAN) float32
    losses_ptr,  # (B, S) float32: what is dropped
    rows_ptr,  # (4, M) float32, of which the first is the estimate
    bias_ptr,  # (V,)
    labels_ptr, second_ptr, groups_ptr,  # (M,) int64
    first_row, R, C, first_column, tiles, spans, looks, stride_logits, M, threshold, heavy, ratio,
    log2_scale,
    LOOK: tl.constexpr, GROUPS: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SIGN: tl.constexpr, NEAR: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, SPANS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0) % spans
    block = tl.program_id(0) // spans
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    exists = row < R
    stride = whole_vectors(stride_logits, True, VECTOR)
    logits_ptr += (block * ROWS).to(tl.int64) * stride
    begin = span * tiles
    end = tl.minimum(begin + tiles, tl.cdiv(C, COLUMNS))

    # On their way before the labels are: nothing of it waits for these.
    estimate = tl.load(rows_ptr + first_row + row, mask=exists, other=NEVER)
    in_second = _in_second(groups_ptr, first_row + row, exists, GROUPS)
    own = (begin * COLUMNS, tl.minimum(end * COLUMNS, C))
    here = (lane, row + first_row, exists, stride, first_column)
    _mark(logits_ptr, labels_ptr, *here, *own, SIGN)
    if HAS_SECOND:
        _mark(logits_ptr, second_ptr, *here, *own, SIGN)
    tl.debug_barrier()

    if not LOOK:
        estimate = _looked(looks_ptr, row, exists, R, looks, estimate, SPANS)
    all_second, mixed = _groups_of(in_second, exists, GROUPS)
    # A row that is not there reads the last one, against an estimate of 1e30.
    offs = tl.minimum(lane, R - 1 - block * ROWS)[:, None] * stride
    sums = tl.zeros((ROWS, COLUMNS // ADDED), tl.float32)
    sloped = sums
    lost = tl.zeros((COLUMNS,), tl.float32)
    count = tl.zeros((COLUMNS,), tl.int32)
    pitch = spans * tiles * COLUMNS
    for tile in tl.range(begin, end, num_stages=STAGES):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        e, u = _tile(
            logits_ptr, offs, bias_ptr, first_column, column, C, estimate, ratio, log2_scale,
            SIGN, HAS_BIAS, HAS_SOFTCAP, NEAR, RAGGED, VECTOR,
        )  # fmt: skip
        sums += _of_threads(e, ADDED)
        if HAS_SOFTCAP:
            sloped += _of_threads(u, ADDED)
        if not LOOK:
            slots, total = _drop(
                live_ptr, tails_ptr, u, in_second, all_second, mixed, block, column, pitch,
                threshold, heavy, GROUPS,
            )  # fmt: skip
            lost += total
            count += slots + (slots > 0).to(tl.int32) * WHOLE

    row_sum, row_sloped = tl.sum(sums, 1), tl.sum(sloped, 1)
    level = estimate
    if not NEAR:  # noqa: SIM102 - known when compiled
        if tl.max(row_sum, 0) > _FAR_TOO_LOW:
            level, row_sum, row_sloped = _against_maxima(
                logits_ptr, offs, bias_ptr, first_column, begin, end, C, estimate, ratio,
                log2_scale, SIGN, HAS_BIAS, HAS_SOFTCAP, ROWS, COLUMNS, VECTOR,
            )  # fmt: skip
    partial_ptr += span * R + row
    tl.store(partial_ptr, level, mask=exists)
    tl.store(partial_ptr + spans * R, row_sum, mask=exists)
    if HAS_SOFTCAP:
        tl.store(partial_ptr + 2 * spans * R, row_sloped, mask=exists)
    if not LOOK:
        tl.store(counts_ptr + block * spans + span, tl.sum(count, 0))
        tl.store(losses_ptr + block * spans + span, tl.sum(lost, 0))


class Scan:
    """The looks at the tiles of one call: tensors stay, rows and columns change."""

    def __init__(self, inputs: Inputs, state: ScanState, eps: float) -> None:
        """Takes what stays the same from tile to tile."""
        self.state, self.row = state, state.row
        numbers = state.numbers(inputs)
        threshold = eps / abs(inputs.logit_scale)
        self.last = (state.logits.stride(0), state.rows.shape[1], threshold, SPLIT, *numbers)
        # Of logits between -softcap and softcap, that of a label among them.
        near = inputs.softcap is not None and 2.0 * numbers[1] <= _NEAR

        def start(partial: Tensor, *, look: bool, ragged: bool) -> Start:
            return Start(
                _scan_kernel,
                (
                    state.logits, partial, state.looks, state.live, state.counts, state.tails,
                    state.losses, state.rows, inputs.bias, inputs.labels, inputs.second,
                    state.groups,
                ),
                self.row,
                {
                    "LOOK": look, "GROUPS": state.group_count, **inputs.options,
                    "SIGN": -1.0 if inputs.logit_scale < 0 else 1.0, "NEAR": near, "RAGGED": ragged,
                    "ROWS": COMPACT_ROWS, "COLUMNS": self.row.depth, "STAGES": self.row.stages,
                    "SPANS": SPANS, "VECTOR": VECTOR,
                },
            )  # fmt: skip

        self.whole, self.ragged = (
            start(state.partial, look=False, ragged=ragged) for ragged in (False, True)
        )
        self.look = start(state.looks, look=True, ragged=True)

    def __call__(self, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        """Launches rows `start` to `stop`, at the start of the tile; a chunk's first columns twice."""
        (start, stop), (v0, v1) = rows, columns
        blocks, looks = cdiv(stop - start, COMPACT_ROWS), 0
        if v0 == 0:
            looked = min(v1, LOOKED)
            looks, tiles = self.state.look_spans(looked), self.state.look_tiles
            self.look(
                looks * blocks, start, stop - start, looked, v0, tiles, looks, 0, *self.last
            )  # fmt: skip
        spans = self.state.spans(v1 - v0)
        scan = self.ragged if (v1 - v0) % self.row.depth else self.whole
        scan(
            spans * blocks, start, stop - start, v1 - v0, v0, self.state.tiles, spans, looks,
            *self.last,
        )  # fmt: skip
