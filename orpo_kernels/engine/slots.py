"""Where kept entries are slots over the tile of logits (`kernels/softmax_compact.py`): its shapes.

A call takes slots or it does not: never both, whatever its tiles are like. It does on a GPU whose
tensor cores the product uses, in a dtype with kernels, for a head whose rows are contiguous. Every
tile then has the room for all of it: rows of a multiple of 128 elements, whole blocks of 64 rows.

A trainable head's segments lie in a store of at most a quarter of the budget. They are packed from
the whole vocabulary at once: where no such tile of 64 rows fits beside the store there is none, and
the backward recomputes every tile.
"""

from torch import Tensor

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS, PARTIAL_SHARE
from orpo_kernels.engine.chunks import Plan, Sizes, first_fit, forward_units, shaped, shapes
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.segment_store import list_bytes, table_bytes

_STORE_SHARE = 4  # of the budget; of 5 % of Llama 3's vocabulary a row keeps 13 KB
_PACKED_ROWS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)
_STORE_ROW_BYTES = 2**15  # no more than this for a row: short batches take less

KEPT_ROUNDING = 2.0**-8
"""Of a slot's entry, relative: bfloat16, to nearest."""


def takes_slots(sizes: Sizes, weights: tuple[Tensor | None, ...]) -> bool:
    """Whether the kept entries of a call are slots; `weights`: the parts of the head."""
    in_rows = all(weight is None or weight.stride(1) == 1 for weight in weights)
    return not sizes.on_cpu and in_rows and has_slots(sizes.device, sizes.compute_dtype)


def plan_slots(
    sizes: Sizes, budget: int, reserved: tuple[int, int], groups: int, *, packs: bool
) -> Plan:
    """Shape of the sparse forward.

    Beside the tile: mask, lists and sums of the tail by row block, and the partial products of the
    kept entries with the head, three rows of float32 per row or a share of the tile.

    Args:
        sizes: of the problem.
        budget: bytes.
        reserved: bytes of it that are taken, whatever the shape, and for each vocabulary block.
        groups: of the tail.
        packs: whether the kept entries are packed: of the whole vocabulary, then.

    Returns:
        The plan; its rows are a multiple of 64.

    Raises:
        ValueError: nothing of the kind fits.
    """
    per_row, per_column = forward_units(sizes, with_gradient=True)
    per_row += 128 + 12 * sizes.hidden_columns
    tile = sizes.product_dtype.itemsize
    per_cell = tile + tile / PARTIAL_SHARE + (10 + 4 * groups) / COMPACT_ROWS
    units = (per_row + int(COMPACT_COLUMNS * per_cell), per_column, per_cell)
    tiles = [(rows, sizes.vocabulary) for rows in _PACKED_ROWS] if packs else shapes(sizes)
    return first_fit(sizes, budget, units, tiles, reserved, COMPACT_ROWS)


def slot_cells(plan: Plan) -> int:
    """Elements of the buffer that every tile of a plan lies in."""
    return plan.rows * _pitch(plan.columns)


def slot_tile(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """`(R, C)` at the start of the buffer, with the room for its slots."""
    return shaped(buffer, rows, _pitch(columns))[:, :columns]


def tile_with_room(logits: Tensor) -> Tensor:
    """A copy of a tile that has the room for its slots."""
    rows, columns = logits.shape
    blocks = -(-rows // COMPACT_ROWS) * COMPACT_ROWS
    return slot_tile(logits.new_empty(blocks * _pitch(columns)), rows, columns).copy_(logits)


def _pitch(columns: int) -> int:
    return -(-columns // COMPACT_COLUMNS) * COMPACT_COLUMNS


def segment_bytes(sizes: Sizes, budget: int) -> tuple[int, int]:
    """Bytes of the store of a trainable head, and of the lists made from it; 0 for no room."""
    tables = table_bytes(sizes.rows, sizes.vocabulary, -(-sizes.rows // COMPACT_ROWS))
    store = min(budget // _STORE_SHARE, tables + sizes.rows * _STORE_ROW_BYTES) // 16 * 16
    if store < 2 * tables:
        return 0, 0
    return store, list_bytes(sizes.rows, sizes.vocabulary, store)
