"""A profile on a device: events between the parts, and torch's own count of the memory."""

import importlib.util
import json

import pytest

NEEDS = ("transformers", "peft", "accelerate", "datasets")
pytestmark = [
    pytest.mark.gpu,
    *(
        pytest.mark.skipif(importlib.util.find_spec(each) is None, reason=f"no {each}")
        for each in NEEDS
    ),
]

V, T = 32_000, 512  # logits of a pair: 125 MiB in float32, where the layers of H 64 take 10
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V,
}  # fmt: skip
MIB = 2**20


@pytest.mark.slow
def test_parts_and_their_memory(gpu, tmp_path):
    # Here, not above: every worker collects.
    from orpo_kernels.training.options import parse_options
    from orpo_kernels.training.profile_table import FUSED, LOGITS, Lengths, run
    from orpo_kernels.training.profiling import DATA, HEAD, LAYERS, OPTIMIZER, Plan

    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    plan = Plan(2, tmp_path / "trace.json")
    words = [
        f"--model_name_or_path={path}", "--use_peft", "--per_device_train_batch_size=1",
        f"--output_dir={tmp_path}/out", f"--max_steps={plan.total}", "--save_strategy=no",
        f"--workspace_bytes={16 * MIB}", f"--use_cpu={not gpu.real}", "--logging_strategy=no",
    ]  # fmt: skip
    found = run(parse_options(words), [Lengths(T // 2, T // 2, T // 2)], plan)
    for profile in found.values():
        assert all(profile.seconds[part] > 0 for part in (DATA, LAYERS, HEAD, OPTIMIZER))
    assert json.loads(plan.trace.read_text())["traceEvents"]
    gpu.needs_cuda()  # what a process holds tells less
    logits = 2 * T * V * 4
    assert found[LOGITS].peak_bytes[HEAD] > logits
    # 78 MiB on an H200: 16 of workspace, and the 32 that cuBLAS takes once on Hopper.
    assert found[FUSED].peak_bytes[HEAD] < 0.75 * logits
    assert found[LOGITS].peak_bytes[OPTIMIZER] < logits / 2
