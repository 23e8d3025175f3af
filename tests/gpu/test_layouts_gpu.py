"""Rows of several sequences on a device: each attention there computes what a padded batch is."""

import importlib.util

import pytest
import torch

from orpo_kernels import ORPOLoss
from tests.gpu.waits import PACKAGE, waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers"),
]

# 64: FlexAttention takes heads of 16 and more. Windows of 8, shorter than the sequences.
SIZES = {"hidden_size": 64, "head_dim": 16, "sliding_window": 8}
BETA = 0.5  # large enough for the odds-ratio term to show in every gradient


def model_and_batch(gpu, name, dtype=torch.float32):
    """What it imports, it imports here: every worker collects, and few run these."""
    from tests.integrations.layouts import ragged_pairs
    from tests.tiny_models import build

    model = build(name, attn_implementation="sdpa", **SIZES).to(gpu.device, dtype)
    return model, {key: value.to(gpu.device) for key, value in ragged_pairs().items()}


def step_of(gpu, name, attention, layout, dtype=torch.float32):
    from orpo_kernels import fuse_head
    from tests.integrations.helpers import fused_step

    model, batch = model_and_batch(gpu, name, dtype)
    model.set_attn_implementation(attention)
    # What FlexAttention is compiled for are masks and shapes: of two masks, without the check's.
    check = (name, attention) != ("gemma3", "flex_attention")
    with fuse_head(model, loss=ORPOLoss(BETA), layout=layout, check=check):
        fused_step(model, batch)  # with its checks
        return fused_step(model, batch)


@pytest.mark.parametrize(
    ("name", "attention", "layout"),
    [  # each attention with a model that has windows and with one that has none
        pytest.param("gemma3", "flex_attention", "shared_prompt", marks=pytest.mark.slow),
        pytest.param("qwen3", "flex_attention", "packed", marks=pytest.mark.slow),
        ("gemma3", "sdpa", "packed"),
        ("qwen3", "sdpa", "shared_prompt"),
    ],
)
def test_equals_the_padded_batch(gpu, name, attention, layout):
    if attention == "flex_attention":
        gpu.needs_cuda()  # it has no backward elsewhere
    from tests.integrations.helpers import assert_same_step

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
    from orpo_kernels import fuse_head

    model, batch = model_and_batch(gpu, "qwen3")
    ours = {}
    for layout in ("padded", "shared_prompt"):
        with fuse_head(model, loss=ORPOLoss(BETA), layout=layout):

            def call():
                model(**batch, use_cache=False)

            call()
            ours[layout] = [path.name for path in waits(call) if PACKAGE in path.parents]
    assert ours == {"padded": ["scoring.py"], "shared_prompt": ["layout.py", "scoring.py"]}
