"""The launches of the sparse forward of a GPU, for the compile report: every kernel of it."""

import functools
from typing import Any

import torch

from orpo_kernels.kernels.certificate import certificate
from orpo_kernels.kernels.dense_rows import DenseRows
from orpo_kernels.kernels.gather_slots import GatherSlots
from orpo_kernels.kernels.given_back import given_back
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.keep_slots import KeepSlots
from orpo_kernels.kernels.live_columns import LiveColumns
from orpo_kernels.kernels.order_entries import label_lists, order_entries
from orpo_kernels.kernels.pack_slots import PackSlots
from orpo_kernels.kernels.remake_slots import remake_slots
from orpo_kernels.kernels.scan import LOOKED, Scan
from orpo_kernels.kernels.scan_state import ScanState, scan_state
from orpo_kernels.kernels.slot_products import SlotProducts
from orpo_kernels.kernels.slot_store import ScanShape, SlotStore
from orpo_kernels.kernels.sum_products import SumProducts
from orpo_kernels.kernels.tail_rows import DroppedRows, tail_product
from tests.kernels.loop_cases import M, N, V, Yielded, _cuda, _state, inputs

COLUMNS = 9000  # more than a look, and no whole number of tiles
SLOTS = 1000
ROWS, VOCABULARY = (0, M), (0, COLUMNS)


def state_of(given: Inputs) -> ScanState:
    """Memory of a call of two groups where everything is on, else of one."""
    groups = None if given.second is None else _cuda(M, dtype=torch.int64)
    tail = _cuda(1 if groups is None else 2, V)
    shape = ScanShape(-(-M // 64) * 64, COLUMNS, 1000, 1000, 4)
    logits = _cuda(shape.rows, -(-COLUMNS // 8) * 8, dtype=given.wide)
    return scan_state(given, logits, shape, groups, tail, LOOKED)


def _given(dtype: torch.dtype, wide: torch.dtype, everything: bool, odd: bool = False) -> Inputs:
    given = inputs(dtype, everything)._replace(wide=wide)
    if not odd:
        return given
    weight = tuple(_cuda(V, each.shape[1] + 1, dtype=dtype) for each in given.weight)
    return given._replace(weight=weight)


def scan_launches() -> Yielded:
    """Label, key, dtype of the key, the launch, and what is asked of it."""
    narrow = {"wide_loads": False}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        # Pairs: two label sets, two groups, what the loss of a Llama launches.
        for what in ("plain", "pairs", "all options"):

            def given_of(dtype=dtype, what=what):
                given = _given(dtype, dtype, what == "all options")
                second = _cuda(M, dtype=torch.int64) if what == "pairs" else given.second
                return given._replace(second=second)

            def look(given_of=given_of):
                given = given_of()
                Scan(given, state_of(given), 2.0**-12)(ROWS, VOCABULARY)

            def live(given_of=given_of):
                given = given_of()
                LiveColumns(given, state_of(given), _state(given))(ROWS, VOCABULARY, 1)

            def pack(given_of=given_of):
                given = given_of()
                PackSlots(given, state_of(given))(ROWS, VOCABULARY, 1)

            key = "scan_softcap" if what == "all options" else "scan"
            yield f"scan {name}, {what}", key, dtype, look, {"meant": "_scan_kernel"}
            yield f"live_columns {name}, {what}", "live_columns", dtype, live, narrow
            yield (
                f"pack_slots {name}, {what}", "pack_slots", dtype, pack,
                {**narrow, "wide_stores": True},
            )  # fmt: skip
        for odd in (False, True):
            yield from _products(dtype, name, odd)

    def dropped():
        given = _given(torch.bfloat16, torch.float32, True)
        DroppedRows(given, state_of(given), _state(given), _cuda(N))(0, M)

    yield "dropped_rows", "dropped_rows", torch.float32, dropped, narrow

    def certify():
        labels, entries = (_cuda(size, dtype=torch.int64) for size in (N, M))
        certificate(labels, _cuda(8, N), entries, V, (1.0, 2.0**-12, 2.0**-8))

    yield "certificate", "certificate", torch.float32, certify, narrow


def _products(dtype: torch.dtype, name: str, odd: bool) -> Yielded:
    suffix, what = ("_odd", ", odd H") if odd else ("", "")

    def dense(part=0):
        given = _given(dtype, torch.float32, True, odd)
        DenseRows(given, state_of(given), part)(ROWS, VOCABULARY)

    def gather():
        given = _given(dtype, torch.float32, False, odd)
        GatherSlots(given, state_of(given), 2)(M)

    def product():
        tail_product(_given(dtype, torch.float32, False, odd).weight, _cuda(2, V), dtype)

    asked = {"wide_loads": False, "since": 80}
    meant = {**asked, "meant": "_dense_rows_kernel", "operands": "elements"}
    yield f"dense_rows {name}{what}", f"dense_rows{suffix}", dtype, dense, meant
    meant = {**asked, "meant": "_gather_slots_kernel"}
    meant["operands"] = "elements" if odd else "gathered"
    yield f"gather_slots {name}{what}", f"gather_slots{suffix}", dtype, gather, meant
    yield f"tail_product {name}{what}", "tail_product", dtype, product, {"wide_loads": not odd}


def gradient_launches() -> Yielded:
    """Likewise, of what a trainable head adds."""

    def keep(with_slots=True):
        store = _store() if with_slots else _store()._replace(slots=None)
        KeepSlots(state_of(_given(torch.bfloat16, torch.float32, False)), store, 2)(0, M, 1)

    asked = {"wide_loads": False}
    yield "keep_slots", "keep_slots", torch.bfloat16, keep, asked
    columns = functools.partial(keep, with_slots=False)
    yield "keep_slots, columns alone", "keep_slots", torch.bfloat16, columns, asked
    yield from _remade(asked)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for odd in (False, True):
            what = ", odd H" if odd else ""

            def multiply(dtype=dtype, odd=odd):
                given, hidden = _rows(dtype, odd)
                unit = _cuda(1) if dtype == torch.float16 else None
                store, places = _store(), _cuda(SLOTS, dtype=torch.int32)
                rows = (store, places, given, hidden, _cuda(5, M), unit)
                SlotProducts(_cuda(SLOTS, 256), *rows)((0, SLOTS), 256, 512)

            def add(dtype=dtype, odd=odd):
                given, hidden = _rows(dtype, odd)
                count, labels = _cuda(1, dtype=torch.int64)[0], label_lists(given.labels[None], V)
                order = order_entries(_store().columns, count, labels, [0, V])
                tail = (_cuda(2, V), _cuda(2, hidden.shape[1]))
                out, products = _cuda(V, hidden.shape[1], dtype=dtype), _cuda(SLOTS, 256)
                rows = (given, hidden, _cuda(5, M), tail, _cuda(1))
                SumProducts(out, products, order, *rows)((0, V // 16, V), 0, 256, 512)

            def rest(dtype=dtype, odd=odd):
                given, hidden = _rows(dtype, odd)
                rows = (_cuda(8, N), _cuda(5, M), given.labels, 2)
                given_back(hidden, given, *rows)

            meant = {
                **asked, "meant": "_slot_products_kernel", "operands": "elements", "since": 80,
            }  # fmt: skip
            yield f"slot_products {name}{what}", "slot_products", dtype, multiply, meant
            wide = {"wide_loads": not odd}
            yield f"sum_products {name}{what}", "sum_products", dtype, add, wide
            yield f"given_back {name}{what}", "given_back", dtype, rest, wide


def _remade(asked: dict[str, Any]) -> Yielded:
    # In 16 bits alone, of a head of either width.
    for dtype in (torch.bfloat16, torch.float16):
        for everything, odd, head in (
            (False, False, dtype), (True, False, dtype), (True, True, dtype),
            (False, False, torch.float32), (False, True, torch.float32),
        ):  # fmt: skip

            def remake(dtype=dtype, everything=everything, odd=odd, head=head):
                given = _given(head, torch.float32, everything, odd)._replace(dtype=dtype)
                if odd:
                    hidden = tuple(_cuda(N, w.shape[1], dtype=head) for w in given.weight)
                    given = given._replace(hidden=hidden)
                remake_slots(_store()._replace(slots=None), given, _cuda(5, M), [SLOTS])

            what = f"{'all options' if everything else 'plain'}{', odd H' * odd}"
            what += f", {head} head".replace("torch.", "") * (head != dtype)
            name = str(dtype).removeprefix("torch.")
            meant = {**asked, "meant": "_remake_slots_kernel", "operands": "elements", "since": 80}
            yield f"remake_slots {name}, {what}", f"remake_slots{'_odd' * odd}", head, remake, meant


def _store() -> SlotStore:
    return SlotStore(
        _cuda(SLOTS, 64, dtype=torch.bfloat16), _cuda(SLOTS, dtype=torch.int32),
        _cuda(-(-M // 64), 2, dtype=torch.int64),
    )  # fmt: skip


def _rows(dtype: torch.dtype, odd: bool) -> tuple[Inputs, torch.Tensor]:
    given = inputs(dtype, False)
    return given, _cuda(N, given.columns + odd, dtype=dtype)
