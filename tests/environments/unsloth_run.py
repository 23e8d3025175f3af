"""One run of Unsloth's trainer, which is imported first: `MODEL ROWS LOGS [subclass | patch]`.

On a GPU, unless the environment says what `ON_A_CPU` does.
"""

import json
import os
import sys
from pathlib import Path

from tests.environments.page import after

ON_A_CPU = {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_ZOO_DISABLE_GPU_INIT": "1"}

if __name__ == "__main__":
    use_cpu = "UNSLOTH_ALLOW_CPU" in os.environ
    import unsloth  # noqa: F401 - the order that Unsloth documents
    from unsloth.models.rl import patch_trl_rl_trainers

    patch_trl_rl_trainers()  # what FastLanguageModel does on a GPU

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    base, rows, logs, *mode = sys.argv[1:]
    if mode == ["subclass"]:
        exec(after("Unsloth"))
    elif mode == ["patch"]:
        from orpo_kernels.integrations.trl import patch_trl

        patch_trl()
    pairs = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    texts = [
        {"prompt": row["chosen"][0]["content"]}
        | {side: " " + row[side][1]["content"] for side in ("chosen", "rejected")}
        for row in pairs
    ]
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train(),
        args=ORPOConfig(
            output_dir=logs + ".out", use_cpu=use_cpu, bf16=False, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=5, logging_steps=1, learning_rate=2e-3,
            max_length=64, beta=0.3, report_to="none", disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    mro = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(trainer).__mro__]
    found = {
        "logs": trainer.state.log_history,
        "fused": "_orpo_kernels_calls" in vars(trainer),
        "unsloth": any("Unsloth" in name for name in mro),
    }
    Path(logs).write_text(json.dumps(found))
