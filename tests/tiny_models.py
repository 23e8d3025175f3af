"""Tiny causal LMs from configs and a tiny tokenizer, built on the spot: nothing is downloaded.

``build("llama")`` is a float32 model of about 50k parameters whose vocabulary is the tokenizer's.
Weights are drawn wide, and biases and norms away from 0 and 1, so that a dropped bias, scale or
softcap changes the log-probs by far more than any tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 331  # prime: no block size divides it; 256 bytes + 5 special tokens + 70 merges

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Please write a short and polite answer to the question of the user.",
    "I am sorry, I do not know the answer, but I can help you to find it.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Two plus three is five; seven times eight is fifty six.",
)

_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",  # the one implementation every family has
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "experts_implementation": "eager",  # torch's grouped GEMM has no float64
}
_HEAD_DIM: dict[str, Any] = {"head_dim": 8}

# name -> (config class, what differs from _SMALL)
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", _HEAD_DIM),
    "gemma2": ("Gemma2Config", {**_HEAD_DIM, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**_HEAD_DIM, "final_logit_softcapping": 3.0}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False}),
    "stablelm": ("StableLmConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, **_HEAD_DIM}),
}


def _causal(name: str, **overrides: Any) -> PreTrainedModel:
    config_class, extra = CAUSAL[name]
    settings = {"vocab_size": VOCAB_SIZE, **_SPECIAL_IDS, **_SMALL, **extra, **overrides}
    config = getattr(transformers, config_class)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def _gemma3_vl(**overrides: Any) -> PreTrainedModel:
    text = {"vocab_size": VOCAB_SIZE, **_SPECIAL_IDS, **_SMALL, **_HEAD_DIM}
    text |= {"final_logit_softcapping": 3.0, **overrides}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 1,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )
    return transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )


def _qwen2_5_vl(**overrides: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": VOCAB_SIZE, **_SPECIAL_IDS, **_SMALL, "rope_parameters": rope}
    text |= overrides
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )


FACTORIES: dict[str, Callable[..., PreTrainedModel]] = {
    **{name: (lambda name=name, **kw: _causal(name, **kw)) for name in CAUSAL},
    "gemma3_vl": _gemma3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}


def build(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny float32 model of the family ``name`` in training mode, the same for the same seed.

    Args:
        name: a key of ``FACTORIES``.
        seed: seed of the weights; the global random state is left as it was.
        **overrides: config values, e.g. ``tie_word_embeddings=True``, ``vocab_size=97``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FACTORIES[name](**overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.2)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().train()


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens: encodes any text, no unknown token.

    Specials: ``<pad>`` 0, ``<s>`` 1 (bos), ``</s>`` 2 (eos), ``<|im_start|>`` 3, ``<|im_end|>`` 4.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE if chat_template else None,
        model_max_length=256,
    )
