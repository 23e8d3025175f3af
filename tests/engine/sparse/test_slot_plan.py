"""Where kept entries are slots: which calls take them, and tiles and stores within the budget."""

import pytest
import torch

from orpo_kernels.engine.budget import plan_backward
from orpo_kernels.engine.sparse import plan
from orpo_kernels.kernels import segment_store
from tests.engine.test_budget import BUDGETS, CPU, CUDA, HEADS, sizes

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
        assert found.items >= found.blocks * -(-rows // even)
        cells = found.tile.rows * plan.slot_pitch(found.tile.columns)
        assert cells % (64 * 128) == 0
        assert cells * problem.product_dtype.itemsize <= found.tile.workspace_bytes
        if trainable:
            backward = plan_backward(
                problem, budget, head[0], recompute=True, reserved=found.reserved_bytes
            )
            assert backward.workspace_bytes <= budget


def test_a_store_needs_the_whole_vocabulary_in_a_tile():
    # 16 MiB hold no row block of Llama 3's logits, 1.4 GB hold many: then there is a store.
    stores = []
    for budget in (BUDGETS[0], BUDGETS[2]):
        problem = sizes((4096, 128_256), CUDA)
        found = plan.plan_sparse(problem, 2, budget, trainable=True, slots=True)
        stores.append(found.store_bytes)
        assert found.blocks == 1 or found.store_bytes == 0
    assert stores[0] == 0
    assert stores[1] > 100 * 2**20  # at 13 KB a row, 5,000 rows


def test_a_budget_below_one_tile_is_refused():
    with pytest.raises(ValueError, match="raise workspace_bytes to at least"):
        plan.plan_sparse(sizes((4096, 128_256), CUDA), 2, 2**22, trainable=False, slots=True)


def test_a_store_is_what_its_bytes_say():
    rows, columns, chunks = 200, 1000, 3
    tables = segment_store.table_bytes(rows, columns, chunks)
    buffer = torch.zeros(tables + 10 * 128 + 5, dtype=torch.uint8)
    store = segment_store.segment_store(buffer, rows, columns, chunks)
    assert store.segments.shape == (10, 64)
    assert store.counts.shape == (4, 16)  # 4 row blocks; 8 tiles of 128 columns
    for index, each in enumerate(store):
        each.fill_(index + 1)  # no two overlap
    assert [int(each.view(-1)[0]) for each in store] == list(range(1, 8))
    assert all(each.data_ptr() % 16 == buffer.data_ptr() % 16 for each in store)
    part = store.rows(64, 200)
    assert part.counts.shape == (3, 16)
    assert part.first_rows.tolist() == [3 - 64] * 3
