"""What a trainable head keeps of its slots between forward and backward: columns, some, or nothing.

In whole calls, by the cases of `check_sparse_loss.py`.
"""

import pytest
import torch

from orpo_kernels.engine.sparse import plan, slot_gradient
from orpo_kernels.kernels.scan import LOOKED
from orpo_kernels.kernels.slot_store import COLUMN_BYTES, SLOT_BYTES
from tests.kernels.interpreted.check_sparse_loss import (
    BLOCKS,
    Case,
    V,
    problem,
    relative,
    run,
    shapes,
    truth,
)
from tests.kernels.interpreted.plugin import launches

REMADE = [
    pytest.param(Case(trains=True), id="bf16"),
    pytest.param(Case(torch.float16, trains=True, softcap=20.0, bias=True), id="fp16, softcap"),
    pytest.param(Case(trains=True, workspace=BLOCKS, bias=True, sets=2), id="blocks, two sets"),
    pytest.param(Case(widens=False, trains=True, scale=0.7), id="16-bit logits"),
]  # fmt: skip


@pytest.mark.parametrize("case", REMADE)
def test_slots_of_which_the_store_has_the_columns(case, monkeypatch):
    given = problem(case, monkeypatch)
    stored = run(case, given)
    shape, room = shapes[-1], plan.aligned(COLUMN_BYTES * V * 4)
    monkeypatch.setattr(plan, "plan_scan", lambda *_: (shape, 0))
    monkeypatch.setattr(plan, "slot_stores", lambda *_: [plan.Store(room, True)])
    before = len(launches)
    logps, _, found = run(case, given)
    assert {"remake_slots", "keep_slots", "sum_products"} <= set(launches[before:])
    assert "weight_probs" not in launches[before:]
    # The forward does not ask what the store has of a slot.
    assert torch.equal(logps, stored[0])
    assert torch.equal(found["hidden"], stored[2]["hidden"])
    true = truth(case, given, shape.columns, looked=LOOKED)
    rounding = 0.0 if case.widens else 2e-2
    for name in found:
        assert relative(found[name], true.gradients[name]) < 3.5e-3 + rounding, name
        # Few slots are rounded otherwise.
        assert relative(found[name], stored[2][name].double()) < 1e-3 + rounding / 4, name


@pytest.mark.parametrize("workspace", [None, BLOCKS], ids=["one chunk", "two chunks"])
def test_rows_that_find_no_room_in_the_store(workspace, monkeypatch):
    # Room for the first 64 rows, or for none: dW is exact then, and dhidden does not ask.
    case = Case(torch.float32, trains=True, bias=True, workspace=workspace)
    given = problem(case, monkeypatch)
    everything = run(case, given)
    shape = shapes[-1]
    monkeypatch.setattr(plan, "plan_scan", lambda *_: (shape._replace(rows=64), 0))
    counts, kept_blocks = [], slot_gradient.kept_blocks

    def noted(table):
        counts.append(kept_blocks(table))
        return counts[-1]

    monkeypatch.setattr(slot_gradient, "kept_blocks", noted)
    whole = run(case, given)
    assert min(counts[-1]) > 0
    for room, rows in ((counts[-1][0] + 1, 64), (counts[-1][0] - 1, 0)):
        monkeypatch.setattr(
            plan, "slot_stores",
            lambda *_, room=room: [plan.Store(plan.aligned(room * SLOT_BYTES), False)],
        )  # fmt: skip
        logps, _, found = run(case, given)
        assert [each >= 0 for each in counts[-1]] == [rows > 0, False]
        assert torch.equal(logps, whole[0])
        assert torch.equal(found["hidden"], whole[2]["hidden"])
        true = truth(case, given, shape.columns, slice(None), LOOKED)
        for name, each in found.items():
            assert relative(each, true.gradients[name]) < 3.5e-3, name
    assert relative(everything[2]["weight"], true.gradients["weight"]) > 0.015
