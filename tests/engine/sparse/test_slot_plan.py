"""Where kept entries are slots: which calls take them, and tiles and stores within the budget."""

from dataclasses import replace

import pytest
import torch

from orpo_kernels.engine.gpu import model
from orpo_kernels.engine.gpu.card import Card, card_of
from orpo_kernels.engine.gpu.model import Job, job_of
from orpo_kernels.engine.gpu.plan import plan_backward
from orpo_kernels.engine.sparse import plan
from orpo_kernels.kernels.slot_store import SLOT_BYTES, SlotStore
from tests.engine.test_budget import BUDGETS, CPU, CUDA, HEADS, sizes

H200 = Card(132, 7.3e14, 4.0e12, 90)
# A vocabulary that ends within a tile, beside the heads of the exact plans.
SLOT_HEADS = [*HEADS, (4097, 32_003)]


def test_who_takes_slots(monkeypatch):
    monkeypatch.setattr(plan, "has_slots", lambda device, dtype: True)
    assert plan.takes_slots(sizes((8, 4), CUDA))
    assert not plan.takes_slots(sizes((8, 4), CUDA, dtype=torch.float64))
    assert not plan.takes_slots(sizes((8, 4), CPU))
    monkeypatch.setattr(plan, "has_slots", lambda device, dtype: False)  # no tensor cores
    assert not plan.takes_slots(sizes((8, 4), CUDA))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("head", SLOT_HEADS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_everything_fits_the_budget(budget, head, trainable):
    for rows in (1, 300, 20_000):
        problem = sizes(head, CUDA, rows=rows)
        found = plan.plan_sparse(problem, 2, budget, trainable=trainable, slots=True)
        assert found.tile.workspace_bytes <= budget
        assert found.tile.rows % 64 == 0
        even = found.tile.even(rows).rows
        assert even % 64 == 0
        assert even <= found.tile.rows
        assert found.items == -(-rows // 64)
        if not trainable:
            assert found.store_bytes == 0
            continue
        # What the backward takes: rows that are recomputed, or all slots and their products.
        job = job_of(problem, problem.wide_bytes)
        left = budget - found.store_bytes
        assert plan_backward(job, left, card_of(CUDA)).workspace_bytes <= left
        slots = found.capacity
        if slots:
            assert plan.gradient_bytes(job, 2, 0) + 36 * slots <= left  # while they are sorted
            room = left - plan.gradient_bytes(job, 2, slots, slots * found.remakes)
            edges = plan.planned_edges(job, slots, room, card_of(CUDA))
            assert plan.range_panels(job, edges, plan.even_slots(edges, slots), room)


@pytest.mark.parametrize("mib", [136, 256, 512, 1431])
def test_products_lie_in_what_is_not_written_yet(mib):
    # 8,192 rows of Llama 3's head: as many slots as text keeps, and twice as many.
    job, card = Job(8192, 128_256, 4096, 2), H200
    for slots in (220_000, 440_000):
        room = mib * 2**20 // 2
        edges = plan.planned_edges(job, slots, room, card)
        ranges = plan.range_panels(job, edges, plan.even_slots(edges, slots), room)
        took = model.slot_gradient_seconds(job, ranges, card)
        assert sum(columns for columns, *_ in ranges) == 128_256
        for (_, count, panel), last in zip(ranges, edges[1:], strict=True):
            assert 4 * count * panel <= max(room, (128_256 - last) * 4096 * 2)
        assert sum(-(-4096 // panel) for *_, panel in ranges) <= (20 if slots < 300_000 else 40)
        # One range, in the budget's memory: as good where this is large, else much slower.
        whole = plan.range_panels(job, [0, 128_256], [slots], room)
        if whole:
            assert took <= model.slot_gradient_seconds(job, whole, card)
        if mib == 136:
            assert whole is None or took < 0.8 * model.slot_gradient_seconds(job, whole, card)


def test_a_range_that_keeps_too_much_has_no_room():
    job, room = Job(8192, 128_256, 4096, 2), 16 * 2**20
    edges = plan.planned_edges(job, 256_000, room, H200)
    assert len(edges) > 3
    counts = [0] * (len(edges) - 2)
    assert plan.range_panels(job, edges, [*counts, 65_536], room)
    assert plan.range_panels(job, edges, [*counts, 65_537], room) is None
    assert plan.range_panels(replace(job, in_result=False), edges, [65_537, *counts], room) is None


def test_a_store_holds_what_text_keeps(monkeypatch):
    # At 1.34 % of the columns of 64 rows, 8,192 rows of Llama 3's vocabulary keep 220,000 slots.
    monkeypatch.setattr(plan, "card_of", lambda device: H200)
    problem = sizes((4096, 128_256), CUDA, rows=8192)
    found = {
        mib: plan.plan_sparse(problem, 2, mib * 2**20, trainable=True, slots=True)
        for mib in (48, 64, 96, 256, 1024)
    }
    # Where they have no room in the backward either there is no store.
    assert found[48].store_bytes == 0
    for mib in (64, 96, 256, 1024):
        assert found[mib].store_bytes <= mib * 2**20 // 4 + 16
        assert found[mib].capacity > 250_000
    # Of little memory the forward has nearly all: columns of slots, which are made again.
    assert [each.remakes for each in found.values()] == [False, True, True, False, False]
    frozen = plan.plan_sparse(problem, 2, 64 * 2**20, trainable=False, slots=True)
    assert found[64].store_bytes < 2**21
    alike = (frozen.scan, found[64].scan)
    seconds = [model.scan_seconds(job_of(problem, 2), shape, H200) for shape in alike]
    assert seconds[1] < 1.1 * seconds[0]


def test_float32_products_are_not_made_again():
    problem = sizes((4096, 128_256), CUDA, rows=8192, dtype=torch.float32)
    assert plan.slot_stores(problem, 2, 64 * 2**20) == []
    assert [each.remade for each in plan.slot_stores(problem, 2, 256 * 2**20)] == [False]


def test_a_budget_below_one_tile_is_refused():
    with pytest.raises(ValueError, match="raise workspace_bytes to at least"):
        plan.plan_sparse(sizes((4096, 128_256), CUDA), 2, 2**22, trainable=False, slots=True)


def test_a_store_is_what_its_bytes_say():
    buffer, table = torch.zeros(10 * SLOT_BYTES + 9, dtype=torch.uint8), torch.zeros(3, 2)
    store = SlotStore.of(buffer, table)
    assert store.slots.shape == (10, 64)
    assert store.columns.shape == (10,)
    store.slots.fill_(1)
    store.columns.fill_(2)  # no two overlap
    assert (store.slots == 1).all()
    alone = SlotStore.of(buffer, table, remade=True)
    assert alone.slots is None
    assert alone.columns.shape == (10 * SLOT_BYTES // 4 + 2,)
    assert store.columns.data_ptr() % 16 == buffer.data_ptr() % 16
