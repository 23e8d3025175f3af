"""The forms of a mask: FlexAttention's blocks and flash attention's limits say what sdpa's does."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.attention import attention_arguments
from orpo_kernels.integrations.transformers import fuse_head
from orpo_kernels.layout import BatchLayout, lay_out, visible
from tests.integrations.helpers import BETA, assert_same_step, fused_step
from tests.integrations.layouts import ragged_pairs
from tests.tiny_models import build


@pytest.fixture
def rows():
    batch = ragged_pairs()
    return lay_out(BatchLayout("shared_prompt", 90), [batch["input_ids"]], batch["attention_mask"])


def test_blocks_of_flex_attention(rows):
    decoder = build("gemma2", sliding_window=8).model
    decoder.config._attn_implementation = "flex_attention"
    masks = attention_arguments(decoder, rows, torch.float32)["attention_mask"]
    assert masks.keys() == {"full_attention", "sliding_attention"}
    count, length = rows.tokens.shape
    for name, window in (("full_attention", None), ("sliding_attention", 8)):
        expected = visible(rows, window)[:, None]
        rule = create_mask(masks[name].mask_mod, count, 1, length, length, device="cpu")
        assert torch.equal(rule, expected)
        q, k, v = torch.randn(3, count, 2, length, 16).unbind()
        ours = flex_attention(q, k, v, block_mask=masks[name])  # goes by the blocks as well
        truth = F.scaled_dot_product_attention(q, k, v, attn_mask=expected)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def varlen(module, query, key, value, attention_mask, **options):
    """What a flash attention computes of (1, heads, N, D) and limits, in plain torch."""
    assert attention_mask is None
    starts = options["cu_seq_lens_q"]
    assert starts.dtype == torch.int32
    assert torch.equal(starts, options["cu_seq_lens_k"])
    assert int(starts.diff().max()) == options["max_length_q"] == options["max_length_k"]
    assert query.shape[0] == 1
    assert int(starts[-1]) == query.shape[2]
    parts = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    attended = [
        F.scaled_dot_product_attention(
            *(each[:, :, start:stop] for each in (query, key, value)),
            is_causal=True, enable_gqa=True, scale=options["scaling"],
        )
        for start, stop in parts
    ]  # fmt: skip
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


def test_limits_of_flash_attention(monkeypatch):
    # flash-attn needs a GPU: the same function in plain torch stands under its name.
    model, batch = build("llama", attn_implementation="sdpa"), ragged_pairs()
    with fuse_head(model, loss=ORPOLoss(BETA)):
        expected = fused_step(model, batch)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    model.config._attn_implementation = "flash_attention_2"
    # Its padded form needs the library, and so does the check, which compares with it.
    tokens = int(batch["attention_mask"].sum())  # one row, whatever the limit
    for limit in (None, 10):
        layout = BatchLayout("packed", limit)
        with fuse_head(model, loss=ORPOLoss(BETA), layout=layout, check=False):
            assert_same_step(fused_step(model, batch), expected)
            assert int(model(**batch).layout_terms["computed_tokens"]) == tokens
