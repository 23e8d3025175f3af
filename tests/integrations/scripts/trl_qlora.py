"""The published QLoRA recipe on TRL, as users keep it: MODEL DATA OUTPUT on the command line.

Nothing in it knows of orpo_kernels. Hub names are folders and files here, W&B is off, and three
steps stand for an epoch.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

base_model, data, output = sys.argv[1:4]

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    bnb_4bit_use_double_quant=True,
)
peft_config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    target_modules=["up_proj", "down_proj", "gate_proj", "k_proj", "q_proj", "v_proj", "o_proj"],
)
tokenizer = AutoTokenizer.from_pretrained(base_model)
model = AutoModelForCausalLM.from_pretrained(
    base_model, quantization_config=bnb_config, device_map={"": "cpu"}, dtype=torch.float32
)
model = prepare_model_for_kbit_training(model)

dataset = load_dataset("json", data_files=data, split="train").shuffle(seed=42)


def format_chat_template(row):
    row["chosen"] = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
    row["rejected"] = tokenizer.apply_chat_template(row["rejected"], tokenize=False)
    return row


dataset = dataset.map(format_chat_template).train_test_split(test_size=0.25, seed=0)

trainer = ORPOTrainer(
    model=model,
    args=ORPOConfig(
        learning_rate=8e-6,
        beta=0.1,
        lr_scheduler_type="linear",
        max_length=96,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=4,
        optim="paged_adamw_8bit",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        output_dir=output,
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=peft_config,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(output)
