"""What cannot be computed in rows is refused by name, and a wrong mask does not pass the check."""

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.mistral import modeling_mistral

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA
from tests.integrations.layouts import ragged_pairs
from tests.tiny_models import VOCAB_SIZE, build

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# config class, what differs, what the refusal names
REFUSED = {
    "bloom": ("BloomConfig", {}, "ALiBi"),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    "falcon": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
    "gpt_neo": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
        "window_size=256: its layers limit by themselves",
    ),
    "mamba": ("MambaConfig", {}, "layers of the types .*linear_attention.* carry a state"),
    "jamba": ("JambaConfig", {}, "carry a state"),
    "rwkv": ("RwkvConfig", {}, "recurrent layers, which carry a state"),
    "qwen3_next": ("Qwen3NextConfig", {}, "layers of the types .*linear_attention"),
    "openai-gpt": ("OpenAIGPTConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "RuntimeError"),
    "xlm": ("XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "AssertionError"),
    # get_decoder() returns its head
    "modernbert": (
        "ModernBertDecoderConfig",
        {"cls_token_id": 1, "sep_token_id": 2},
        "local_atten",
    ),
}


def step(model: PreTrainedModel, layout: str, **options):
    extra = options.pop("extra", {})
    with fuse_head(model, loss=ORPOLoss(BETA), layout=layout, **options):
        return model(**ragged_pairs(), use_cache=False, **extra)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, layout):
    config, changes, reason = REFUSED[name]
    config = getattr(transformers, config)(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with pytest.raises(NotImplementedError, match=reason) as error:
        step(model, layout)
    assert type(model).__name__ in str(error.value)
    assert "set batch_layout='padded'" in str(error.value)
    step(model, "padded")


def test_a_decoder_that_does_not_look_at_its_mask(monkeypatch):
    model = build("llama", attn_implementation="sdpa")
    own = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda attention_mask=None, **rest: own(**rest), raising=False
    )
    with pytest.raises(NotImplementedError, match=r"other hidden states .* off by 0\.\d+ of"):
        step(model, "shared_prompt")


def test_hidden_states_that_are_not_finite_are_no_matter_of_the_layout():
    model = build("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite for two small padded pairs"):
        step(model, "packed")


def test_a_window_that_is_not_the_configs(monkeypatch):
    # One token more than the config says, which shows only past the window.
    def wider(config, **arguments):
        config = type(config)(**{**config.to_dict(), "sliding_window": config.sliding_window + 1})
        config._attn_implementation = "sdpa"
        return masks(config=config, **arguments)

    masks = modeling_mistral.create_sliding_window_causal_mask
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", wider)
    model = build("mistral", attn_implementation="sdpa", sliding_window=4096)
    for layout in ("packed", "shared_prompt"):
        with pytest.raises(NotImplementedError, match="a mask that its config does not tell"):
            step(model, layout)
        assert model.config.sliding_window == 4096
    # The pairs themselves are shorter than the window: without the check, nothing shows.
    step(model, "packed", check=False)


def test_the_check_is_made_once_for_each_attention():
    model = build("llama", attn_implementation="sdpa")
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with fuse_head(model, loss=ORPOLoss(BETA), layout="packed"):
        counts = []
        for attention in ("sdpa", "sdpa", "eager", "eager"):
            model.set_attn_implementation(attention)
            model(**ragged_pairs())
            counts.append(len(calls))
            calls.clear()
    assert counts == [4, 1, 4, 1]  # padded, in rows, in rows that leak; and the call itself


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, r"pixel_values \(1, 3, 4, 4\) .* images"),
        ({"output_attentions": True}, "output_attentions is of one sequence in a row"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values is of one sequence"),
    ],
    ids=["images", "attentions", "an empty cache"],
)
def test_arguments_that_are_not_of_tokens(extra, message):
    model = build("llama")
    with pytest.raises(NotImplementedError, match=message):
        step(model, "packed", extra=extra)


def test_embeddings_instead_of_ids():
    model, batch = build("llama"), ragged_pairs()
    embeddings = model.model.embed_tokens(batch.pop("input_ids"))
    with (
        fuse_head(model, loss=ORPOLoss(BETA), layout="shared_prompt"),
        pytest.raises(NotImplementedError, match="need input_ids"),
    ):
        model(inputs_embeds=embeddings, **batch)


@pytest.mark.parametrize("name", ["labels", "nll_labels"])
def test_labels_that_are_scored_from_padding(name):
    batch = ragged_pairs()
    row = int(batch["attention_mask"].sum(-1).argmin() if name == "labels" else 0)
    length = int(batch["attention_mask"][row].sum())
    batch[name][row, length] = 7  # scored from the last token
    model = build("llama")
    with fuse_head(model, loss=ORPOLoss(BETA), layout="packed"):
        model(**batch)
        batch[name][row, length + 1] = 7
        with pytest.raises(ValueError, match="score tokens that follow padding"):
            model(**batch)


def test_padding_on_the_left():
    model, batch = build("llama"), ragged_pairs()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with (
        fuse_head(model, loss=ORPOLoss(BETA), layout="packed"),
        pytest.raises(ValueError, match="padded on the right"),
    ):
        model(**batch)


def test_an_attention_nobody_knows():
    model = build("llama")
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(NotImplementedError, match=r"attends by 'paged\|eager'.*'sdpa' or 'flex"):
        step(model, "packed")


def test_flash_attention_cannot_share_a_prompt():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"takes no mask.* set batch_layout='packed'"):
        step(model, "shared_prompt")


def test_a_model_that_does_not_call_its_decoder(monkeypatch):
    model = build("llama")
    other = build("llama").model
    monkeypatch.setattr(model, "get_decoder", lambda: other)
    with pytest.raises(RuntimeError, match="without calling the decoder that get_decoder"):
        step(model, "packed")


@pytest.mark.parametrize("name", ["pack", None, 3])
def test_an_unknown_layout(name):
    with pytest.raises(ValueError, match="batch_layout must be one of"):
        fuse_head(build("llama"), layout=name)
