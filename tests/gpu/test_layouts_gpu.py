"""Rows of several sequences on a device: each attention there computes what a padded batch is."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.gpu.waits import PACKAGE, waits
from tests.integrations.helpers import BETA, assert_same_step, fused_step
from tests.integrations.layouts import ragged_pairs
from tests.tiny_models import build

pytestmark = pytest.mark.gpu

# 64: FlexAttention takes heads of 16 and more. Windows of 8, shorter than the sequences.
SIZES = {"hidden_size": 64, "head_dim": 16, "sliding_window": 8}


def step_of(gpu, name, attention, layout, dtype=torch.float32):
    model = build(name, attn_implementation="sdpa", **SIZES).to(gpu.device, dtype)
    model.set_attn_implementation(attention)
    batch = {key: value.to(gpu.device) for key, value in ragged_pairs().items()}
    with fuse_head(model, loss=ORPOLoss(BETA), layout=layout):
        fused_step(model, batch)  # with its checks
        return fused_step(model, batch)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_equals_the_padded_batch(gpu, name, attention, layout):
    if attention == "flex_attention":
        gpu.needs_cuda()  # it has no backward elsewhere
    expected = step_of(gpu, name, "sdpa", "padded")
    assert_same_step(step_of(gpu, name, attention, layout), expected, 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="no flash-attn")
def test_flash_attention_packed(gpu):
    gpu.needs_cuda()
    expected, rows = (
        step_of(gpu, "qwen3", "flash_attention_2", layout, torch.bfloat16)
        for layout in ("padded", "packed")
    )
    torch.testing.assert_close(rows.loss, expected.loss, rtol=2e-2, atol=0)


def test_one_wait_in_a_call_but_the_heads(gpu):
    # Of ours: transformers asks the mask of a padded batch whether it masks anything.
    gpu.needs_cuda()
    model = build("qwen3", attn_implementation="sdpa", **SIZES).to(gpu.device)
    batch = {key: value.to(gpu.device) for key, value in ragged_pairs().items()}
    ours = {}
    for layout in ("padded", "shared_prompt"):
        with fuse_head(model, loss=ORPOLoss(BETA), layout=layout):

            def call():
                model(**batch, use_cache=False)

            call()
            ours[layout] = [path.name for path in waits(call) if PACKAGE in path.parents]
    assert ours == {"padded": ["scoring.py"], "shared_prompt": ["layout.py", "scoring.py"]}
