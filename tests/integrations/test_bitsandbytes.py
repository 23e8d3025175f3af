"""Gradients of an nf4 model on the CPU, before and after an evaluation."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from orpo_kernels import ORPOConfig, ORPOTrainer
from orpo_kernels.integrations.bitsandbytes import keep_differentiable
from tests.tiny_models import tiny_tokenizer

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    # 64: bitsandbytes quantises in blocks of 64.
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}
    )


def evaluate(model):
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(24).view(2, 12))


def embedding_gradient(model):
    ids = torch.arange(24).view(2, 12)
    weight = model.train().get_input_embeddings().weight.requires_grad_(True)
    weight.grad = None
    model(input_ids=ids, labels=ids).loss.backward()
    return weight.grad.clone()


def test_gradient_survives_an_evaluation(folder):
    fresh, evaluated = load(folder), load(folder)
    assert keep_differentiable(evaluated) == 0
    evaluate(evaluated)
    torch.testing.assert_close(
        embedding_gradient(evaluated), embedding_gradient(fresh), rtol=0, atol=0
    )


def test_packed_layers_are_unpacked(folder):
    fresh, evaluated = load(folder), load(folder)
    evaluate(evaluated)
    keep_differentiable(evaluated)
    gradient, expected = embedding_gradient(evaluated), embedding_gradient(fresh)
    # Packing rounds the blocks' scales to bfloat16 for good: 0.046 measured; 0.73 while packed.
    assert (gradient - expected).norm() <= 0.1 * expected.norm()


def test_the_trainer_asks_for_it(folder, tmp_path):
    # An evaluation before the first step must not cost the gradient through the base weights.
    model = load(folder)
    arguments = ORPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    peft_config = LoraConfig(r=2, target_modules=["q_proj"])
    ORPOTrainer(
        model, arguments, train_dataset=tokenized(), processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def tokenized():
    # Ids below the model's 96 entries, so that no tokenizer is needed.
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    return Dataset.from_list(
        [{f"{side}_{name}": ids for side in ("chosen", "rejected") for name, ids in row.items()}]
        * 4
    )
