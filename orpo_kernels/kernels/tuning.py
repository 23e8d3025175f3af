"""The one table of block sizes: by kernel, architecture class and dtype, largest row first.

A row is elements per block and warps per program. Every thread should have four 16-byte loads in
flight, which is what hides the latency of DRAM with few registers; a block of a row kernel is then
`4 * 16 bytes * threads`. At 4 warps and up to 64 registers 8 programs share a processor. None of
the row kernels takes more shared memory than a reduction over its warps: every row fits every card.

The tile of a GEMM is rows, columns and depth of a step, warps, and steps in flight; its float32
accumulator has `rows * columns / threads` registers per thread, 128 of 255 at most, and
`stages * (rows + columns) * depth` operands share the memory of the card's class. A tile that spills
with any option on is not in the table (`tests/kernels/compile_report.py`).

A row whose kernel does not fit the device (`OutOfResources`) is replaced by the next smaller one,
with one warning, for the rest of the process. Nothing is searched or timed at run time.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

T = TypeVar("T")

VECTOR = 8  # elements: 16 bytes of a 16-bit dtype, two 16-byte accesses of float32
MAX_SPLITS = 64  # programs per row whose partial statistics one program combines
_PROGRAMS_PER_PROCESSOR = 8


class Row(NamedTuple):
    """Elements per block, warps per program; of a matrix product also what pipelines it.

    `block` is then columns of the output, `depth` the entries of the sum per step and `stages` the
    steps in flight. `registers` is the most per thread; with 0 the compiler chooses, and may spill
    a few so that one more program fits a processor.
    """

    block: int
    warps: int
    depth: int = 0
    stages: int = 1
    registers: int = 0


class Tile(NamedTuple):
    """Of a GEMM: rows, columns and depth of a step, warps per program, steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Device(NamedTuple):
    """Architecture class (a second key of the table) and number of processors.

    `capability`: NVIDIA's compute capability, 90 for 9.0; 0 elsewhere.
    """

    architecture: str
    processors: int
    capability: int = 0


_NARROW = (torch.bfloat16, torch.float16)
_ROW_KERNELS = ("softmax_stats", "softmax_grad")

TABLE: dict[tuple[str, str, torch.dtype], tuple[Row | Tile, ...]] = {}
for _kernel in _ROW_KERNELS:
    for _dtype, _wide in ((torch.float32, 1), *((dtype, 2) for dtype in _NARROW)):
        TABLE[_kernel, "datacenter", _dtype] = (Row(2048 * _wide, 4), Row(1024 * _wide, 4))
        TABLE[_kernel, "consumer", _dtype] = (Row(2048 * _wide, 4), Row(1024 * _wide, 4))
        # Twice the threads per warp: twice 16 bytes each. With four, gfx90a and gfx1100 spill.
        TABLE[_kernel, "amd", _dtype] = (Row(2048 * _wide, 4), Row(1024 * _wide, 2))
        TABLE[_kernel, "other", _dtype] = (Row(1024 * _wide, 4), Row(512 * _wide, 4))
for _class in ("datacenter", "consumer", "amd", "other"):
    for _dtype in (torch.float32, *_NARROW):
        TABLE["column_sums", _class, _dtype] = (Row(1024, 4), Row(512, 4))
    TABLE["keep_slots", _class, torch.bfloat16] = (Row(32, 4),)
    TABLE["sequence_mean", _class, torch.float32] = (Row(4096, 8), Row(1024, 4))
    TABLE["sequence_mean_backward", _class, torch.float32] = (Row(1024, 4),)
    TABLE["odds_ratio", _class, torch.float32] = (Row(128, 4),)
    TABLE["pair_loss", _class, torch.float32] = (Row(256, 4),)

# Kernels of the loops over tiles (`engine/gpu/forward.py`): one program per row. A row of a block is
# held in registers, 16 to 32 elements per thread: the table's rows are the blocks there are, and a
# tile takes the smallest that holds its columns. Of whole rows a thread reads 8 elements at once.
for _class in ("datacenter", "consumer", "amd", "other"):
    for _dtype in (torch.float32, *_NARROW):
        _lanes = 2 if _class == "amd" else 1  # twice the threads per warp
        for _kernel in ("take_rows", "label_terms", "finish_rows", "scale_rows", "reach"):
            TABLE[_kernel, _class, _dtype] = (Row(1024, 4 // _lanes),)
        TABLE["softmax_block", _class, _dtype] = (Row(8192, 8), Row(4096, 4), Row(2048, 4))
        TABLE["weight_probs", _class, _dtype] = (Row(8192, 16), Row(4096, 8), Row(2048, 4))
        TABLE["softmax_rows", _class, _dtype] = (Row(2048, 8 // _lanes),)
        TABLE["softmax_few_rows", _class, _dtype] = (Row(8192, 16),)
        TABLE["column_totals", _class, _dtype] = (Row(32, 4),)
        TABLE["given_back", _class, _dtype] = (Row(512, 8 // _lanes, 4 * _lanes),)
        # Columns of a panel; slots a step, and of sums the lanes of a program.
        TABLE["slot_products", _class, _dtype] = (Row(128 // _lanes, 4 * _lanes, 64 // _lanes),)
        _wide_sums = _dtype == torch.float32  # 16 lanes of these spill with Triton 3.6
        TABLE["sum_products", _class, _dtype] = (Row(256, 4 // _lanes, 8 if _wide_sums else 16),)
    TABLE["coefficients", _class, torch.float32] = (Row(128, 4),)
    TABLE["dropped_rows", _class, torch.float32] = (Row(32, 4),)
    TABLE["certificate", _class, torch.float32] = (Row(1024, 4),)
    TABLE["combine_rows", _class, torch.float32] = (Row(16, 4),)
    TABLE["score_rows", _class, torch.int64] = (Row(1024, 4),)

# linear_lse by where its operands come from: TMA for wgmma (sm_90), for tcgen05 (sm_100) and for
# mma.sync (sm_120); pointers with cp.async (sm_80, 86, 89) or what AMD and Intel have; pointers of
# single elements. "transformed": with a bias or a softcap, which take registers.
_NARROW_TILES = {
    ("wgmma", "datacenter"): (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4)),
    ("tcgen05", "datacenter"): (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    ("tma", "consumer"): (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    # By 128 x 256, or with a fourth stage and two label sets, Triton 3.6 spills 2 to 7 registers.
    ("pointers", "datacenter"): (Tile(256, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4)),
    ("pointers_transformed", "datacenter"): (Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4)),
    ("pointers", "consumer"): (Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("pointers", "amd"): (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    ("pointers_transformed", "amd"): (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    ("pointers", "other"): (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 4, 2)),
}
_WIDE_TILES = {
    ("wgmma", "datacenter"): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    ("tcgen05", "datacenter"): (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ("tma", "consumer"): (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    # By 64 x 128 Triton 3.6 spills up to 19 registers.
    ("pointers", "datacenter"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ("pointers", "consumer"): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
    ("pointers", "amd"): (Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    ("pointers", "other"): (Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 4, 2)),
}
for _tiles, _dtypes in ((_NARROW_TILES, _NARROW), (_WIDE_TILES, (torch.float32,))):
    for (_form, _class), _rows in _tiles.items():
        for _dtype in _dtypes:
            TABLE[f"linear_lse_{_form}", _class, _dtype] = _rows
            if not _form.endswith("_transformed"):
                TABLE.setdefault((f"linear_lse_{_form}_transformed", _class, _dtype), _rows)
for _class in ("datacenter", "consumer", "amd", "other"):
    for _dtype in (torch.float32, *_NARROW):
        _tile = Tile(64, 64, 32, 8 if _dtype == torch.float32 else 4, 1)
        TABLE["linear_lse_elements", _class, _dtype] = (_tile,)
        TABLE["linear_lse_elements_transformed", _class, _dtype] = (_tile,)
        TABLE["label_dots", _class, _dtype] = (Row(512, 4),)

_MMA_REGISTERS = 168  # per thread, where mma.sync has a product beside sums that are read
_ALL_REGISTERS = 255  # of a thread

# A product of 64 slots: 128 registers let two programs of eight warps share a processor (float32
# rows fill its shared memory with one). `odd`: rows that start on no 16 bytes, unpipelined. The
# epilogue of a weight gradient leaves consumer cards the registers of two stages.
for _class, _stages, _limit in (
    ("datacenter", 4, 128), ("consumer", 3, 128), ("amd", 2, 0), ("other", 2, 0),
):  # fmt: skip
    for _dtype in (torch.float32, *_NARROW):
        _registers = 0 if _dtype == torch.float32 else _limit
        # Float16 slots are widened. 128 by 64 of an H200: 0.55 ms for 0.71 of 256 by 32 (sm_120: spills).
        _most = _stages if _dtype == torch.bfloat16 else min(_stages, 3)
        _registers = 0 if _dtype == torch.float16 else _registers
        _many = _class == "other" or (_class == "consumer" and _dtype == torch.float32)
        _columns, _depth = (256 if _many else 128), (64 if _stages == 4 else 32)
        TABLE["gather_slots", _class, _dtype] = (Row(_columns, 8, _depth, _most, _registers),)
        if _class == "datacenter":  # by 64 sm_100 would spill
            TABLE["gather_slots", "blackwell", _dtype] = (Row(256, 8, 32, _most),)
        TABLE["gather_slots_odd", _class, _dtype] = (Row(64, 4, 32, 2),)
        _free = _ALL_REGISTERS if _class == "consumer" else 0
        _sums = Row(512, 2 if _class == "amd" else 4, 8, registers=_free)
        TABLE["tail_product", _class, _dtype] = (_sums,)
        # Columns of 64 rows; `depth` of H a step.
        TABLE["remake_slots", _class, _dtype] = (Row(128, 8, _depth, min(_stages, 3), _free),)
        TABLE["remake_slots_odd", _class, _dtype] = (Row(64, 8, 32, 2),)
        # Two blocks of 64 rows; `depth` columns of the tile a step.
        TABLE["dense_rows", _class, _dtype] = (Row(128, 8, 32, 3 if _stages == 4 else 2),)
        TABLE["dense_rows_odd", _class, _dtype] = (Row(64, 8, 32, 2),)
        # Tiles of 64 rows x `depth`, `block` to a program, five of which (200) are on a processor.
        TABLE["scan", _class, _dtype] = (Row(16, 2, 64, registers=200 if _limit else 0),)
        _few = _class == "amd" or _dtype == torch.float32
        TABLE["scan_softcap", _class, _dtype] = (Row(32, 4 if _few else 8, 32, 1, _limit),)
        TABLE["live_columns", _class, _dtype] = (Row(128, 4, registers=168 if _limit else 0),)
        TABLE["pack_slots", _class, _dtype] = (Row(256, 4, 32),)

# With Triton 3.6 sm_100 spills two registers of half the warps; with gfx942 of twice the columns.
TABLE["scan", "blackwell", torch.float32] = (Row(16, 4, 64),)
TABLE["sum_products", "blackwell", torch.float32] = (Row(128, 4, 8),)
TABLE["slot_products", "amd", torch.float32] = (Row(32, 8, 32),)
# sm_100 keeps accumulators outside the registers, and spills under a limit that suits the others.
TABLE["softmax_rows", "blackwell", torch.float16] = (Row(1024, 4),)
for _dtype in _NARROW:  # two warps spill on sm_75 and 80, and four of 128 with pairs of labels
    TABLE["scan", "datacenter", _dtype] = (Row(16, 4, 64, registers=168),)
    TABLE["scan", "consumer", _dtype] = TABLE["scan", "datacenter", _dtype]
# 16-bit logits with every option on: else, or with twice the warps, Triton 3.6 spills on sm_120.
for _dtype in _NARROW:
    TABLE["softmax_rows", "consumer", _dtype] = (Row(1024, 4),)
    TABLE["softmax_few_rows", "consumer", _dtype] = (Row(4096, 8),)
# Of slots sm_120 spills else, float32 on sm_86. Rows on no vector: more warps spill on sm_100.
for _dtype in (torch.float32, *_NARROW):
    TABLE["pack_slots", "consumer", _dtype] = (Row(256, 4, 32, registers=_ALL_REGISTERS),)
    TABLE["given_back", "blackwell", _dtype] = (Row(256, 4, 4),)
TABLE["linear_lse_elements_transformed", "blackwell", torch.float32] = (Tile(64, 64, 32, 4, 1),)
# Triton 3.7 spills 8 registers of the one, and 2 of the other.
_limited = (Row(8192, 8, registers=_ALL_REGISTERS), Row(4096, 4), Row(2048, 4))
TABLE["softmax_block", "datacenter", torch.float16] = _limited
_limited = (Row(8192, 8), Row(4096, 4, registers=_ALL_REGISTERS), Row(2048, 4))
TABLE["softmax_block", "consumer", torch.float32] = _limited
for (_kernel, _class, _dtype), _all in list(TABLE.items()):
    if _class == "datacenter" and (_kernel, "blackwell", _dtype) not in TABLE:
        TABLE[_kernel, "blackwell", _dtype] = tuple(
            row._replace(registers=0) if isinstance(row, Row) else row for row in _all
        )

_first_row: dict[tuple[str, str, torch.dtype], int] = {}


@functools.cache
def device_info(device: torch.device) -> Device:
    """Class and size of a device, asked once."""
    if device.type == "xpu":
        return Device("other", torch.xpu.get_device_properties(device).max_compute_units)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("amd", properties.multi_processor_count)
    return Device(
        architecture_class(properties.major, properties.minor),
        properties.multi_processor_count,
        10 * properties.major + properties.minor,
    )


def architecture_class(major: int, minor: int) -> str:
    """Class of an NVIDIA compute capability: "blackwell", "datacenter" or "consumer"."""
    if major == 10:
        return "blackwell"
    return "datacenter" if (major, minor) in ((7, 0), (8, 0), (9, 0)) else "consumer"


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` current: triton launches on the current device, wherever the tensors are."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def cdiv(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`; `triton.cdiv` takes twenty times as long."""
    return -(-count // size)


def launch(
    kernel: str, dtype: torch.dtype, device: torch.device, run: Callable[[Any, Device], T]
) -> T:
    """`run(row, device)` with the first row of the table that fits the device.

    Args:
        kernel: name in the table.
        dtype: of the tensor the kernel streams.
        device: the tensors are on.
        run: launches with a row; may raise `OutOfResources`.

    Returns:
        What `run` returned.

    Raises:
        OutOfResources: the smallest row does not fit either.

    Warns:
        RuntimeWarning: once per kernel, class and dtype, when a row does not fit.
    """
    info = device_info(device)
    key = (kernel, info.architecture, dtype)
    rows = TABLE[key]
    with guard(device):
        for index in range(_first_row.get(key, 0), len(rows) - 1):
            try:
                return run(rows[index], info)
            except OutOfResources as error:
                _first_row[key] = index + 1
                warnings.warn(
                    f"orpo_kernels: {kernel} in {dtype} does not fit this device with "
                    f"{rows[index]} ({error}); using {rows[index + 1]} from here on",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return run(rows[-1], info)


def row_of(kernel: str, dtype: torch.dtype, device: torch.device) -> Row:
    """The one row of a kernel that every card has room for."""
    (row,) = TABLE[kernel, device_info(device).architecture, dtype]
    return cast("Row", row)


def row_for_head(kernel: str, weight: Tensor) -> tuple[Row, dict[str, Any]]:
    """The first row of a kernel that multiplies with `weight`, and the options of compiling it.

    Every card of its class has room for it: the compile report asks them all.
    """
    device = device_info(weight.device)
    row = cast("Row", TABLE[kernel, device.architecture, weight.dtype][0])
    if row.registers and device.capability == 80:
        row = row._replace(registers=_MMA_REGISTERS)
    return row, compile_options(row, device)


def row_holding(kernel: str, dtype: torch.dtype, device: torch.device, columns: int) -> Row:
    """The row of the smallest block that holds `columns` elements.

    Raises:
        ValueError: none does.
    """
    rows = TABLE[kernel, device_info(device).architecture, dtype]
    fitting = [cast("Row", row) for row in rows if cast("Row", row).block >= columns]
    if not fitting:
        raise ValueError(f"{kernel} holds no row of {columns} columns; take narrower blocks")
    return fitting[-1]


def compile_options(row: Row, device: Device) -> dict[str, Any]:
    """Keyword arguments of a launch: warps, stages, and the register limit where there is one."""
    return {**start_options(row, device), "num_stages": row.stages}


def start_options(row: Row, device: Device) -> dict[str, Any]:
    """Those of a kernel whose loops say themselves how they are pipelined."""
    options = {"num_warps": row.warps, "enable_fp_fusion": True}
    if row.registers and device.architecture in ("consumer", "datacenter"):
        options["maxnreg"] = row.registers
    return options


class Split(NamedTuple):
    """Programs per row, and blocks of each."""

    splits: int
    blocks: int


def split_row(rows: int, columns: int, block: int, processors: int, most_blocks: int = 0) -> Split:
    """How many programs share a row: enough to fill the device, at least two blocks each.

    Args:
        rows: R.
        columns: C.
        block: elements per block.
        processors: of the device.
        most_blocks: upper bound of blocks per program; 0 for none.

    Returns:
        The split.
    """
    blocks = max(1, -(-columns // block))
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // max(1, rows))
    splits = max(1, min(wanted, blocks // 2, MAX_SPLITS))
    each = -(-blocks // splits)
    if most_blocks:
        each = min(each, most_blocks)
    return Split(-(-blocks // each), each)


class Share(NamedTuple):
    """Programs that share the columns of a block of rows, and blocks of rows that run together."""

    splits: int
    group: int


@functools.lru_cache(maxsize=1024)
def share_columns(row_blocks: int, column_blocks: int, tile: Tile, processors: int) -> Share:
    """Among the splits within 3 % of the shortest schedule, the one that reads least.

    A program multiplies `column_blocks / splits` tiles, and `row_blocks * splits` programs run in
    waves. What a wave reads is least when it is as many rows high as columns wide.

    Args:
        row_blocks: blocks of rows.
        column_blocks: blocks of vocabulary columns.
        tile: of a program.
        processors: of the device, one program at a time each.

    Returns:
        The share.
    """

    def tiles_in_sequence(splits: int) -> int:
        return -(-row_blocks * splits // processors) * -(-column_blocks // splits)

    choices = range(1, min(column_blocks, MAX_SPLITS) + 1)
    least = min(map(tiles_in_sequence, choices))
    square = math.sqrt(processors * tile.rows / tile.columns)
    good = (each for each in choices if tiles_in_sequence(each) <= 1.03 * least)
    splits = min(good, key=lambda each: abs(math.log(each / square)))
    return Share(splits, max(1, processors // splits))
