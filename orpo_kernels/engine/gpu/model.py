"""Bytes and seconds of a shape: what must fit, and what it should take; no tensor.

    GEMM                        flop / rate, or operands / bandwidth; + results / bandwidth + ramp
    row kernel, gather, cast    bytes / bandwidth + gap
    a tile                      the sum of its launches, or what the host takes to start them

The rate is reached in whole waves of output tiles; a sum in the epilogue reads and writes its
float32 accumulator and hides nothing of it; what lies in the second-level cache is passed on no
faster. Fitted to races on an H200, `benchmarks/results/nvidia-h200/loops-2.json`: 4 % of error in
the mean over 46 shapes, 12 % at most.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.budget import Sizes
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.gpu.shapes import MOST_HELD, Shape, Sweep, pitch
from orpo_kernels.kernels.slot_store import MOST_SPAN, ScanShape, span_columns

_SLOWER_FLOAT32 = 12.0  # than 16-bit operands, without TensorFloat-32
# Rows and columns of the output tiles of GEMMs, and their share of the rate.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.88), (64, 128, 0.7))
_SPLIT_SHARE = 0.92  # of the rate: a product split over its sum, which fills any card
_RAMP = 0.1  # of the time of an output tile: what a GEMM takes to begin and to end
_WHOLE = 1.08  # of the parts' sum: a tile of the whole vocabulary, which no cache holds

# Of a sparse forward: columns that a chunk's first look has; the share of the bandwidth that a look
# reaches; small launches after it and for a chunk, and what one takes; what the host starts of a
# tile and of a chunk, in launches of the exact loop: most of five and of eight start without torch.
_LOOKED = 8192
_SCANNED = 0.75
_SMALL_OF_TILE, _SMALL_OF_CHUNK, _SMALL_S = 3, 6, 6e-6
_STARTS_OF_TILE, _STARTS_OF_CHUNK = 3, 5

# Of kept slots: bytes that one entry of a tile is read by, and the share of the bandwidth that
# packing, gathering rows of the head and the tail's product reach. Of three eps, as of
# `sparse-times-4.json`, the first two by what each further slot took.
_SECTOR, _PACKED, _GATHERED, _SUMMED = 32, 0.88, 1.0, 0.67
# Of dW from slots: the shares of the bandwidth that products are written and added at, and what the
# two launches of a panel take however narrow it is; columns of a program that adds, programs for a
# column of the vocabulary, how many a processor holds, and what one waits for lists and products,
# one after the other. Kernels' sums of an H200, `sparse-times-4.json`: 3.2 ms of 4 panels of 1,024
# columns, 4.4 of 22 of 192.
_STREAMED, _ADDED, _PANEL_S = 0.94, 0.6, 7e-5
_SUM_COLUMNS, _SUM_PROGRAMS, _SUM_RESIDENT, _SUM_S = 256, 1 / 32 + 1 / 16, 4, 3.5e-6

# Of the rate of cuBLAS, `linear_lse`: measured on sm_90; elsewhere what Triton's tutorials reach.
_FOLDED_SHARE = {90: 0.9}
_FOLDED_ELSEWHERE = 0.7
_FOLDED_TILE = (128, 256)
_MOST_SPLITS = 64  # programs that share a block of rows
_FOLDED_ROW_BYTES = 16 * _MOST_SPLITS
_FOLDED_FIXED_BYTES = 2**15  # descriptors of the programs


@dataclass(frozen=True)
class Job:
    """Sizes of a call.

    Attributes:
        rows: M, scored rows.
        vocabulary: V.
        columns: H, those of a low-rank part included.
        label_sets: 1 or 2.
        item: bytes of the GEMMs' operands.
        wide: bytes of a logit: 4, or 2 where a GEMM of 16-bit operands cannot write float32.
        gathers: whether rows of hidden are copied: chosen among others, cast or joined.
        head_item: bytes of an entry of the head where its blocks are copied, else 0.
        result_item: bytes of an entry of dW.
        scaled: whether dW is scaled in the end: float16.
        in_result: whether dW can lend its memory: it is one matrix, of the whole head.
    """

    rows: int
    vocabulary: int
    columns: int
    label_sets: int = 1
    item: int = 2
    wide: int = 4
    gathers: bool = True
    head_item: int = 0
    result_item: int = 2
    scaled: bool = False
    in_result: bool = True

    @property
    def row_bytes(self) -> int:
        """Of a gathered row."""
        return pitch(self.columns) * self.item

    @property
    def kept_row_bytes(self) -> int:
        """Of a row of E."""
        return pitch(self.vocabulary) * self.item


def job_of(
    sizes: Sizes, head_item: int, *, gathers: bool = True, result_item: int | None = None,
    in_result: bool = True,
) -> Job:  # fmt: skip
    """The job of a call of these sizes.

    `head_item` are the bytes of an entry of the head, which are read where it is copied; by default
    rows are chosen among others, and dW has the dtype of the GEMMs and lends its memory.
    """
    dtype = sizes.compute_dtype
    return Job(
        sizes.rows, sizes.vocabulary, sizes.hidden_columns, sizes.label_sets, dtype.itemsize,
        sizes.product_dtype.itemsize, gathers, head_item if sizes.weight_is_copied else 0,
        dtype.itemsize if result_item is None else result_item, dtype == torch.float16, in_result,
    )  # fmt: skip


def forward_bytes(job: Job, shape: Shape, *, with_g: bool, kept: bool = False) -> int:
    """What the forward allocates beside its results, E kept included in these."""
    group, rows, columns = shape
    cell = job.wide
    if columns > MOST_HELD and with_g and not kept and job.wide != job.item:
        cell += job.item  # P apart
    if kept and job.wide == job.item:
        cell = 0  # logits in the memory of E
    sums = group * job.columns * (4 + job.item * (job.wide < 4)) if with_g else 0
    gathered = group * job.row_bytes if job.gathers else 0
    tile = rows * pitch(columns) * cell
    return _state_bytes(job) + tile + sums + gathered + _head_bytes(job, columns)


def forward_seconds(
    job: Job, shape: Shape, card: Card, *, with_g: bool, kept: bool = False
) -> float:
    """What the forward should take."""
    group, rows, columns = shape
    total = 0.0
    for count, here in _pieces(job.rows, group):
        tiles = 0.0
        for blocks, wide in _pieces(job.vocabulary, columns):
            lanes = sum(
                lane_count * _forward_tile(job, card, lane, wide, with_g=with_g, kept=kept)
                for lane_count, lane in _pieces(here, rows)
            )
            tiles += blocks * (lanes + _cast_s(job, card, wide))
        gathered = 2.0 * here * job.row_bytes / card.bandwidth if job.gathers else 0.0
        total += count * (tiles + gathered + 2 * card.gap_s)
    return total


def _forward_tile(
    job: Job, card: Card, rows: int, columns: int, *, with_g: bool, kept: bool
) -> float:
    cells = float(rows * columns)
    logits_s = cells * job.wide / card.bandwidth
    stored_s = cells * job.item / card.bandwidth if with_g or kept else 0.0
    if job.wide == job.item and columns > MOST_HELD:
        stored_s += logits_s  # two looks
    seconds = _gemm_s(job, card, rows, columns) + 2 * logits_s + stored_s + card.gap_s
    if with_g:
        sums = rows * job.columns * (4.0 if columns == job.vocabulary else 8.0)
        seconds += _gemm_s(job, card, rows, job.columns, columns) + sums / card.bandwidth
    if columns > MOST_HELD:
        seconds *= _WHOLE
    return max(seconds, (3 if with_g else 2) * card.launch_s)


def scan_bytes(job: Job, shape: ScanShape, groups: int) -> int:
    """What a sparse forward allocates beside its results, the sums of the tail among it."""
    rows, columns, slots, listed, pieces = shape
    blocks = math.ceil(rows / COMPACT_ROWS)
    span, looked = span_columns(blocks, columns), min(_LOOKED, columns)
    spans, looks = math.ceil(columns / span), math.ceil(looked / span_columns(blocks, looked))
    # Logits; references and sums of spans and looks; masses.
    masses = math.ceil(spans / max(1, MOST_SPAN // span))
    tile = rows * (pitch(columns) * job.wide + 12 * (spans + looks) + 4 * masses)
    # Which columns are live, sums of what is dropped, counts and losses.
    marks = blocks * pitch(columns + span) * (1 + 4 * groups) + 8 * blocks * spans
    kept = 2 * COMPACT_ROWS * slots + 8 * blocks * listed
    sums = 4 * (blocks + pieces) * COMPACT_ROWS * job.columns
    gathered = rows * job.row_bytes if job.gathers else 0
    state = _state_bytes(job) + 24 * job.rows + 4 * groups * job.vocabulary
    return state + tile + marks + kept + sums + gathered + _head_bytes(job, columns)


def scan_seconds(job: Job, shape: ScanShape, card: Card) -> float:
    """What a sparse forward should take, where little is kept: of the device, or of the host.

    The host runs ahead of the device wherever it can, so it is their sums that count.
    """
    total, starts = 0.0, 0
    for count, here in _pieces(job.rows, shape.rows):
        tiles = 0.0
        for blocks, wide in _pieces(job.vocabulary, shape.columns):
            moved = here * wide * job.wide * (1.0 + 1.0 / _SCANNED) / card.bandwidth
            small = _SMALL_OF_TILE * (card.gap_s + _SMALL_S)
            tile = _gemm_s(job, card, here, wide) + moved + small
            tiles += blocks * (tile + _cast_s(job, card, wide))
            starts += count * blocks * (_STARTS_OF_TILE + (job.head_item > 0))
        gathered = 2.0 * here * job.row_bytes / card.bandwidth if job.gathers else 0.0
        total += count * (tiles + gathered + _SMALL_OF_CHUNK * (card.gap_s + _SMALL_S))
        starts += count * _STARTS_OF_CHUNK
    return max(total, starts * card.launch_s)


def whole_wave(rows: int, card: Card) -> int:
    """Fewest columns that with so many rows are whole waves of a GEMM's output tiles."""
    high, wide, _ = _TILES[1]
    return wide * card.processors // math.gcd(math.ceil(rows / high), card.processors)


def kept_seconds(job: Job, slots: int, card: Card) -> float:
    """What so many kept slots, and the product of the tail, add to a sparse forward."""
    packed = slots * COMPACT_ROWS * _SECTOR / (_PACKED * card.bandwidth)
    gathered = slots * job.columns * job.item / (_GATHERED * card.bandwidth)
    tail = job.vocabulary * job.columns * job.item / (_SUMMED * card.bandwidth)
    return packed + gathered + tail


def remade_seconds(job: Job, slots: int, card: Card) -> float:
    """What it should take to make so many slots again: gathered rows of the head, and hidden."""
    read = 1.5 * slots * job.columns * job.item / (_GATHERED * card.bandwidth)
    return read + 2.0 * COMPACT_ROWS * slots / card.bandwidth + card.gap_s


def slot_gradient_seconds(job: Job, ranges: Iterable[tuple[int, int, int]], card: Card) -> float:
    """What dW from kept slots should take, range by range of the vocabulary.

    Of each its columns, its slots, and the columns of H that a panel of products has.
    """
    total = 0.0
    for vocabulary, slots, panel in ranges:
        labels = job.rows * job.item * vocabulary / job.vocabulary
        for count, wide in _pieces(job.columns, panel):
            products = 4.0 * slots * wide
            summed = products + wide * (vocabulary * job.result_item + labels)
            programs = math.ceil(wide / _SUM_COLUMNS) * vocabulary * _SUM_PROGRAMS
            waited = programs / (_SUM_RESIDENT * card.processors) * _SUM_S
            adding = max(summed / (_ADDED * card.bandwidth), waited)
            both = products / (_STREAMED * card.bandwidth) + adding + _PANEL_S
            total += count * max(both, 2 * card.launch_s)
    return total


def backward_bytes(job: Job, sweep: Sweep, kept_rows: int) -> int:
    """What a sweep of the backward allocates beside its results and E kept."""
    rows = min(sweep.rows, job.rows)
    tile = rows * pitch(sweep.columns) * job.wide
    gathered = rows * job.row_bytes if job.gathers and not sweep.in_result else 0
    block = 0
    apart = job.wide < 4
    if job.scaled or apart or (rows < job.rows and job.result_item < 4):
        block = sweep.columns * job.columns * (4 + job.item * apart)
    copied = _head_bytes(job, sweep.columns) if kept_rows < job.rows else 0
    return 20 * job.rows + 4 * job.vocabulary + tile + gathered + block + copied


def backward_seconds(job: Job, sweep: Sweep, kept_rows: int, card: Card) -> float:
    """What a sweep of the backward should take."""
    rows = min(sweep.rows, job.rows)
    total = 0.0
    kept = min(kept_rows, job.rows)
    for blocks, wide in _pieces(sweep.last - sweep.first, sweep.columns):
        written = float(wide * job.columns)
        seconds = _cast_s(job, card, wide) if kept < job.rows else 0.0
        at_hand = rows >= job.rows
        if (not at_hand and job.result_item < 4) or job.scaled:
            seconds += written * (4 + job.result_item) / card.bandwidth + card.gap_s
        for count, here in _pieces(job.rows, rows):
            again = round(here * (1.0 - kept / job.rows))
            moved = float(wide) * (job.item * (2 * here - again) + 2 * job.wide * again)
            tile = moved / card.bandwidth + card.gap_s
            if again:
                tile += _gemm_s(job, card, again, wide)
            tile += _gemm_s(job, card, wide, job.columns, here)
            tile += written * (job.result_item if at_hand else 8) / card.bandwidth
            if job.gathers and not at_hand:
                tile += 2.0 * here * job.row_bytes / card.bandwidth + card.gap_s
            seconds += count * max(tile, 3 * card.launch_s)
        total += blocks * seconds
    return total


def folded_bytes(job: Job, shape: Shape) -> int:
    """What `linear_lse` allocates beside its results: no logit."""
    rows = shape.group * (_FOLDED_ROW_BYTES + (job.row_bytes if job.gathers else 0))
    return _state_bytes(job) + 16 * job.rows + rows + _FOLDED_FIXED_BYTES + _head_bytes(
        job, shape.columns
    ) * bool(job.head_item)  # fmt: skip


def folded_seconds(job: Job, shape: Shape, card: Card) -> float:
    """What `linear_lse` should take."""
    share = _FOLDED_SHARE.get(card.capability, _FOLDED_ELSEWHERE)
    high = _FOLDED_TILE[0]
    total = 0.0
    for count, here in _pieces(job.rows, shape.group):
        blocks_of_rows = math.ceil(here / high)
        filled = min(1.0, blocks_of_rows * _MOST_SPLITS / card.processors)
        flop_s = 2.0 * blocks_of_rows * high * job.vocabulary * job.columns / card.flops
        read_s = job.vocabulary * job.columns * job.item / card.bandwidth
        work = max(flop_s / share / filled, read_s)
        blocks = math.ceil(job.vocabulary / shape.columns)
        ragged = blocks * _FOLDED_TILE[1] / 2 / job.vocabulary  # a tile half empty per block
        cast = blocks * _cast_s(job, card, shape.columns)
        total += count * (work * (1.0 + ragged) + cast + 4 * blocks * card.gap_s)
    return total


def _gemm_s(job: Job, card: Card, rows: int, columns: int, depth: int = 0) -> float:
    """Seconds of a GEMM of 2 rows columns depth flop, results not counted; depth: H."""
    depth = depth or job.columns
    read = float(rows + columns) * depth * job.item / card.bandwidth
    work = _flop_s(job, card, rows, columns, depth)
    ramp = _RAMP * _flop_s(job, card, 128, 256, depth)
    # A GEMM of few rows reads all its operands for little work.
    return float((work**3 + read**3) ** (1 / 3)) + card.gap_s + ramp


def _flop_s(job: Job, card: Card, rows: int, columns: int, depth: int) -> float:
    """Seconds of 2 rows columns depth flop, in whole waves of the tile that suits best."""
    slower = _SLOWER_FLOAT32 if job.item == 4 else 1.0
    cell = 2.0 * depth * slower * card.processors / card.flops  # on one processor
    waves = (
        math.ceil(math.ceil(rows / high) * math.ceil(columns / wide) / card.processors)
        * (high * wide * cell / share)
        for high, wide, share in _TILES
    )
    return min(*waves, max(rows, 64) * columns * cell / card.processors / _SPLIT_SHARE)


def _cast_s(job: Job, card: Card, columns: int) -> float:
    if not job.head_item:
        return 0.0
    return columns * job.columns * (job.head_item + job.item) / card.bandwidth + card.gap_s


def _state_bytes(job: Job) -> int:
    return 4 * job.rows * (2 + 2 * job.label_sets)


def _head_bytes(job: Job, columns: int) -> int:
    entries = pitch(columns) if job.head_item else 8 * (job.vocabulary % 8 > 0)
    return entries * job.row_bytes


def _pieces(count: int, step: int) -> Iterator[tuple[int, int]]:
    """How many pieces of which size: whole ones, and the rest."""
    whole, rest = divmod(count, step)
    if whole:
        yield whole, step
    if rest:
        yield 1, rest
