"""A shift common to all logits of a row, through the loops of a GPU: float32 logits keep digits."""

import pytest
import torch

from tests.kernels.interpreted.engine import as_on_a_gpu, short_steps
from tests.kernels.interpreted.plugin import launches
from tests.ops import test_shift


@pytest.mark.parametrize("shift", [20, -100])
def test_bfloat16_operands(shift, monkeypatch):
    as_on_a_gpu(monkeypatch, widens=True)
    short_steps(monkeypatch)
    # Few rows and columns, for the interpreter's sake; 103 is no multiple of a vector.
    for name, size in {"N": 5, "H": 16, "V": 103}.items():
        monkeypatch.setattr(test_shift, name, size)
    before = len(launches)
    (logps, dhidden), eager = test_shift.errors("flat", shift, torch.bfloat16)
    assert "finish_rows" in launches[before:]
    assert logps < 1e-4
    # P is rounded to bfloat16 for its product, whatever the shift.
    assert dhidden < 4e-3
    assert dhidden < eager[1]
