"""Unsloth's own trainer on a GPU, where it computes log-probs in chunks, and TRL's adapter in it.

Where Unsloth is installed beside the tests; `tests/environments/test_unsloth.py` is the same on a
CPU, where Unsloth builds the logits.
"""

import importlib.util

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs Unsloth"),
]


@pytest.mark.parametrize("chunked", ["1", "0"], ids=["its chunks", "its logits"])
def test_same_losses(gpu, monkeypatch, tmp_path, chunked):
    gpu.needs_cuda()
    from tests.environments.runs import difference, save_conversations, save_model
    from tests.environments.test_unsloth import run

    monkeypatch.setenv("UNSLOTH_PREFERENCE_CHUNKED", chunked)
    save_model(tmp_path / "base", "llama")
    save_conversations(tmp_path / "rows.json")
    theirs = run(tmp_path, on_a_gpu=True)
    assert theirs["unsloth"]
    for mode in ("subclass", "patch"):
        ours = run(tmp_path, mode, on_a_gpu=True)
        assert ours["fused"]
        # float32, but with the rounding of TensorFloat-32 where a side asks for it: 10 bits.
        assert difference(ours["logs"], theirs["logs"]) < 2e-3
