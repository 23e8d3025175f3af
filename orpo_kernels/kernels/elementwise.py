"""Device functions the row kernels share: the logit transform and where a row is aligned.

Only arithmetic, no loads. Accurate logarithms and exponentials near 0 are written out in `tl`
maths: `libdevice` has no interpreter and no counterpart on every backend.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """`tanh x` to 2 ulp and its slope `1 - tanh^2 x`, without cancellation at either end."""
    rest = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, far), rest * (2.0 - rest)


@triton.jit
def transform(raw, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """`z = softcap(scale * raw)` and `dz / draw`, of raw logits with their bias, in float32."""
    if HAS_SOFTCAP:
        bounded, slope = tanh(raw * (logit_scale / softcap))
        z = softcap * bounded
        slope = logit_scale * slope
    else:
        z = raw * logit_scale
        slope = logit_scale
    return z, slope


@triton.jit
def aligned_row(row, stride, C, HEAD: tl.constexpr, VECTOR: tl.constexpr):
    """Where the 16-byte vectors of a row begin: (first element, columns before, columns within).

    A row of any start is `head` single elements, a body of whole vectors, and a remnant shorter
    than a vector. Written as multiples of VECTOR so that the compiler knows. With HEAD false every
    stride is a multiple of VECTOR and there is no head.
    """
    if HEAD:
        start = row * stride
        first = (start + (VECTOR - 1)) // VECTOR * VECTOR
        head = tl.minimum((first - start).to(tl.int32), C)
    else:
        first = row * (stride // VECTOR * VECTOR)
        head = 0
    return first, head, (C - head) // VECTOR * VECTOR


@triton.jit
def edge_columns(head, body, C, split, VECTOR: tl.constexpr):
    """The columns in no whole vector, (2 VECTOR,), and which exist: for the first program of a row."""
    lane = tl.arange(0, 2 * VECTOR)
    column = tl.where(lane < VECTOR, lane, head + body + lane - VECTOR)
    # Not `& (split == 0)`: the interpreter makes an integer of a scalar mask.
    return column, ((lane >= VECTOR) | (lane < head)) & (column < tl.where(split == 0, C, 0))


@triton.jit
def whole_vectors(size, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """`size`; where it is a multiple of VECTOR written as one, which the compiler sees."""
    if ALIGNED:
        size = size // VECTOR * VECTOR
    return size


@triton.jit
def where_width(width, exists):
    """`width`, or 0 where a scalar says that there is nothing: a mask `column < width` in one piece.

    Not `& exists`: the interpreter makes an integer of a scalar mask.
    """
    return tl.where(exists, width, 0)


@triton.jit
def row_place(
    position, period, stride_slice, stride_row, ALIGNED: tl.constexpr, VECTOR: tl.constexpr
):
    """First element of row `position` (int64): row `position % period` of a slice."""
    outer = whole_vectors(stride_slice, ALIGNED, VECTOR)
    inner = whole_vectors(stride_row, ALIGNED, VECTOR)
    return position // period * outer + position % period * inner


@triton.jit
def log_add(a, b):
    """`log(e^a + e^b)`; either, not both, may be -inf."""
    return tl.maximum(a, b) + log1p(tl.exp(-tl.abs(a - b)))


@triton.jit
def log_sigmoid(x):
    """`log(1 / (1 + e^-x))`."""
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1(x):
    """`e^x - 1` for x <= 0."""
    return tl.where(
        x > -0.6931471805599453,
        expm1_near_zero(tl.maximum(x, -0.6931471805599453)),
        tl.exp(x) - 1.0,
    )


@triton.jit
def expm1_near_zero(x):
    """`e^x - 1` on [-log 2, 0]: eleven terms, whose remainder is under half an ulp."""
    series = 1.0 + x * 0.09090909090909091
    series = 1.0 + x * 0.1 * series
    series = 1.0 + x * 0.1111111111111111 * series
    series = 1.0 + x * 0.125 * series
    series = 1.0 + x * 0.14285714285714285 * series
    series = 1.0 + x * 0.16666666666666666 * series
    series = 1.0 + x * 0.2 * series
    series = 1.0 + x * 0.25 * series
    series = 1.0 + x * 0.3333333333333333 * series
    series = 1.0 + x * 0.5 * series
    return x * series


@triton.jit
def log1p(x):
    """`log(1 + x)`, x > -1: the rounding of 1 + x is divided out again."""
    rounded = 1.0 + x
    near = rounded == 1.0
    return tl.where(near, x, tl.log(rounded) * (x / tl.where(near, 1.0, rounded - 1.0)))
