"""The estimate against the tensors that a forward and backward make, and how long they live."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from orpo_kernels import cli, fuse_head
from orpo_kernels.estimate import (
    RESERVED_BYTES,
    Setup,
    Shape,
    estimate,
    estimate_memory,
    longest_that_fits,
)
from orpo_kernels.layout import LAYOUTS
from orpo_kernels.training.estimate_table import load_config

T = 256


class Allocations(TorchDispatchMode):
    """Bytes of the storages alive that were made under this mode, now and at most."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {p.untyped_storage()._cdata: None for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_):
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def config(kind=LlamaConfig, **changes):
    shape = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return kind(**{**shape, "use_cache": False, **changes})


def with_adapter(model, rank):
    """In 16 bits, with a LoRA on all linear layers."""
    adapter = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model.bfloat16(), adapter)
    for name, module in model.named_modules():
        if "norm" in name:  # as prepare_model_for_kbit_training leaves them
            module.float()
    return model


def measure(config, setup):
    """(kept after the forward, peak of forward and backward) in bytes, of the backbone."""
    model = AutoModelForCausalLM.from_config(config)
    if setup.lora_r:
        model = with_adapter(model, setup.lora_r)
    model.train()
    if setup.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    base = model.get_base_model() if setup.lora_r else model
    ids = torch.zeros(2, T, dtype=torch.int64)

    def hidden_states():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return base.model(input_ids=ids).last_hidden_state

    hidden_states().sum().backward()  # gradients are there from now on, and counted apart
    with Allocations(model) as allocations:
        hidden = hidden_states()
        kept, allocations.peak = allocations.now, allocations.now
        hidden.backward(torch.zeros_like(hidden))
    return kept, allocations.peak


CASES = {
    # Another H, I, Q or K each: the formula has a coefficient for every one.
    "llama": config(),
    "wide MLP": config(intermediate_size=1536),
    "wide queries": config(head_dim=128),
    "all keys": config(num_key_value_heads=4),
    "biases": config(Qwen2Config),
    "many layers": config(num_hidden_layers=16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_of_lora(case, checkpointing):
    config = CASES[case]
    setup = Setup(load_in_4bit=False, optim="sgd", checkpointing=checkpointing)
    kept, peak = measure(config, setup)
    found = estimate_memory(config, max_length=T, setup=setup)
    # A third of what is around the head is the gradient that the loss hands back.
    assert found.activations_bytes + found.head_bytes * 2 / 3 == pytest.approx(kept, rel=0.05)
    predicted = found.activations_bytes + max(found.head_bytes, found.backward_bytes)
    assert predicted == pytest.approx(peak, rel=0.1)


# (layout, T, N): sharing N tokens is worth the mask of a pair's row, but for the last.
IN_ROWS = [
    ("packed", 256, 128),
    ("shared_prompt", 256, 128),
    ("shared_prompt", 512, 400),
    ("shared_prompt", 512, 16),
]


@pytest.mark.parametrize(("layout", "length", "prompt"), IN_ROWS)
def test_peak_in_rows(layout, length, prompt):
    model = config()
    model._attn_implementation = "sdpa"
    setup = Setup(load_in_4bit=False, optim="sgd", layout=layout)
    sizes = {"max_length": length, "setup": setup, "prompt_length": prompt}
    found = estimate_memory(model, **sizes, workspace_bytes=2**20)
    predicted = found.activations_bytes + found.rows_bytes
    predicted += max(found.head_bytes + found.loss_bytes, found.backward_bytes)
    assert predicted == pytest.approx(peak_in_rows(model, layout, length, prompt), rel=0.1)
    # What builds the logits is padded.
    padded = estimate_memory(model, max_length=length, setup=replace(setup, layout="padded"))
    assert found.materialised_total_bytes == padded.materialised_total_bytes


def peak_in_rows(config, layout, length, prompt):
    """Peak of forward and backward of a fused model with LoRA and checkpointing, one pair."""
    model = with_adapter(AutoModelForCausalLM.from_config(config), 16)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = torch.randint(5, config.vocab_size, (2, length))
    ids[1, :prompt] = ids[0, :prompt]
    ids[:, prompt] = torch.tensor([1, 2])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with fuse_head(model, layout=layout, check=False, workspace_bytes=2**20):

        def step():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logps = model(**batch, use_cache=False).token_logps
            logps.sum().backward()

        step()  # gradients are there from now on, and counted apart
        with Allocations(model) as allocations:
            step()
    return allocations.peak


def test_layouts_and_offload():
    shape = Shape.of(config(hidden_size=1024, head_dim=64))
    plain, kept = (estimate(shape, 1024, 2, Setup(layout=name), None) for name in LAYOUTS[:2])
    assert kept.activations_bytes == plain.activations_bytes  # all sequences are that long
    # Rows of one sequence: 4 of 1,024.
    assert kept.rows_bytes == 4 * 4096 * 1024 + 3 * 4 * 1024**2
    shared = estimate(shape, 1024, 2, Setup(layout="shared_prompt"), None, 600)
    assert shared.activations_bytes * 2048 == plain.activations_bytes * (2048 - 600)
    assert shared.rows_bytes == 4 * 4096 * 1024 + 3 * 2 * 1448**2
    flat = estimate(shape, 1024, 2, Setup(layout="packed", dense_mask=False), None)
    assert flat.rows_bytes == 4 * 4096 * 1024
    host = estimate(shape, 1024, 2, Setup(offload=True), None)
    assert (host.activations_bytes, host.host_bytes) == (0, plain.activations_bytes)
    assert host.total_bytes == plain.total_bytes - plain.activations_bytes


def test_activations_of_a_full_model():
    setup = Setup(weight_bytes=4, load_in_4bit=False, lora_r=0, checkpointing=False)
    kept, _ = measure(config(), setup)
    found = estimate_memory(config(), max_length=T, setup=setup)
    copies = 2 * sum(inner * outer for _, inner, outer in Shape.of(config()).linears)
    predicted = found.activations_bytes + found.head_bytes * 2 / 3 + copies
    assert predicted == pytest.approx(kept, rel=0.05)


def test_counts_of_a_published_model():
    shape = Shape.of(load_config("Llama-3-8B"))
    assert shape.parameters == 8_030_261_248  # its model card says 8.03 B
    # 41.9 M is what PEFT prints for r = 16 on all seven projections.
    assert shape.adapter_parameters(Setup()) == 41_943_040
    found = estimate(shape, 1024, 1, Setup(), None)
    assert found.adapter_bytes == found.gradients_bytes == 4 * 41_943_040
    assert found.materialised_loss_bytes == 7 * 2 * 1024 * 128_256
    # 7.0 B linear weights at half a byte and a bit, embedding and head in 16 bits.
    assert 5.2e9 < found.weights_bytes < 6.0e9


# What a step of one pair took over the weights on an H200: LoRA r = 16 with AdamW, checkpointing, a
# workspace of 64 MiB; ours, and TRL 1.16's ORPO trainer. Of Qwen: GiB, from a run of its own.
STEPS = Path(__file__).parents[1] / "benchmarks/results/nvidia-h200/model-step.json"
ON_AN_H200 = [("Qwen2.5-0.5B", 4096, False, False, 1.16), ("Qwen2.5-0.5B", 4096, True, False, 8.54)]
for row in json.loads(STEPS.read_text())["results"]:
    if "default" not in row["loss"]:
        case = (row["loss"].startswith("TRL"), "nf4" in row["model"])
        gib = round(row["over_weights_bytes"] / 2**30, 2)
        ON_AN_H200.append((row["model"].split(" ")[0], row["T"], *case, gib))


@pytest.mark.parametrize(("model", "length", "trl", "nf4", "measured"), ON_AN_H200)
def test_peaks_of_a_gpu(model, length, trl, nf4, measured):
    # The benchmark leaves a quantised model as PEFT prepares it.
    setup = Setup(load_in_4bit=nf4, optim="adamw_torch", float32_rest=nf4)
    found = estimate_memory(
        load_config(model), max_length=length, setup=setup, workspace_bytes=64 * 2**20
    )
    run = (found.unfused or found) if trl else found
    total = found.materialised_total_bytes if trl else found.total_bytes
    over = (total - run.weights_bytes - run.adapter_bytes) / 2**30
    # 0.08 GiB: two layers of nf4 weights as bf16, a small share of all but the shortest.
    assert over == pytest.approx(measured, rel=0.1, abs=0.08)


def test_a_float16_run_leaves_what_is_not_quantised_in_float32(capsys):
    recipe = "examples/qwen2.5-1.5b-qlora-8gb.yaml"
    words = ["estimate", recipe, "--model", "Llama-3-8B", "--dtype", "float16"]
    peaks = []
    for more in ([], ["--fp16"]):
        assert cli.main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert ("the others float32" in out) is bool(more)
        found = re.search(r"peak +([\d.]+) +([\d.]+)", out)
        peaks.append([float(each) for each in found.groups()])
    # The embedding as wide again, and the residual stream; with logits the head and a copy of it.
    shape = Shape.of(load_config("Llama-3-8B"))
    narrow = shape.V * shape.H * 2 / 2**30
    stream = 32 * 2 * 4096 * 2 * 4096 / 2**30
    assert peaks[1][0] - peaks[0][0] == pytest.approx(narrow + stream, rel=0.15)
    assert peaks[1][1] - peaks[0][1] == pytest.approx(3 * narrow + stream, rel=0.15)


def test_only_the_materialised_loss_grows_with_the_vocabulary():
    small, large = (estimate_memory(config(vocab_size=V), max_length=4096) for V in (1000, 128_000))
    assert large.loss_bytes == small.loss_bytes == 64 * 2**20
    assert large.materialised_loss_bytes == 128 * small.materialised_loss_bytes
    assert estimate_memory(config(), workspace_bytes=2**20).loss_bytes == 2**20


def test_trained_modules_beside_the_adapter():
    plain, saved = Setup(), Setup(modules_to_save=("lm_head",))
    shape = Shape.of(config())
    assert shape.adapter_parameters(saved) - shape.adapter_parameters(plain) == 512 * 256


def test_longest_is_the_longest():
    shape, card = Shape.of(load_config("Qwen2.5-1.5B")), 8 * 2**30
    fused, materialised = longest_that_fits(shape, card, 1, Setup())
    assert fused > 3 * materialised > 0
    for T_max, total in ((fused, "total_bytes"), (materialised, "materialised_total_bytes")):
        fits, too_long = (
            getattr(estimate(shape, length, 1, Setup(), card // 100), total)
            for length in (T_max, T_max + 128)
        )
        assert fits <= card - RESERVED_BYTES < too_long
    assert longest_that_fits(shape, 2**30, 1, Setup()) == (0, 0)


@pytest.mark.parametrize("sizes", [{"max_length": 0}, {"pairs": 0}, {"prompt_length": -1}])
def test_rejects(sizes):
    with pytest.raises(ValueError, match=r"must be (at least 1|0 to 1024)"):
        estimate_memory(config(), **sizes)


def test_command(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    words = [f"--model={tmp_path}/config.json", "--max-length", "512", "--pairs=2", "--use_peft"]
    assert cli.main(["estimate", *words]) == 0
    out = capsys.readouterr().out
    assert "P = 2 pairs of 2 sequences of T = 512 tokens" in out
    assert "LoRA r = 16" in out
    assert "rows:" not in out
    for card in (8, 12, 16, 24):
        assert f"{card} GiB" in out


def test_command_of_a_layout(capsys):
    words = ["--model=Llama-3.2-1B", "--batch_layout=shared_prompt", "--prompt_length=500"]
    assert cli.main(["estimate", *words, "--activation_offload=true"]) == 0
    out = capsys.readouterr().out
    assert "shared_prompt, 500 tokens of a pair's prompt shared" in out
    assert "on the host" in out
    dense = re.search(r"their mask +([\d.]+)", out)[1]
    words += ["--attn_implementation=flex_attention"]
    assert cli.main(["estimate", *words]) == 0
    flat = re.search(r"their mask +([\d.]+)", capsys.readouterr().out)[1]
    assert float(flat) < float(dense)


def test_command_takes_a_recipe_and_a_known_name(capsys):
    recipe = "examples/llama3-8b-qlora.yaml"
    assert cli.main(["estimate", recipe, "--model", "Llama-3-8B"]) == 0
    assert "8.03 B parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "1"], "which model"),
        (["--model", "no/such-model-here"], "one of SmolLM2-135M"),
        (["--model", "Llama-3-8B", "--max_lenght", "1"], "did you mean"),
        (["--model", "Llama-3-8B", "--prompt_length", "9"], "and this is padded"),
        (
            ["--model", "Llama-3-8B", "--batch_layout=shared_prompt", "--prompt_length", "1025"],
            "prompt_length must be 0 to",
        ),
    ],
)
def test_command_rejects(words, message, capsys):
    assert cli.main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "--bf16=true", "--tf32=true", "--bf16_full_eval=true", "--fp16_full_eval=1",
        "--deepspeed=zero3.json", "--ddp_backend=nccl", "--use_cpu=false",
    ],
)  # fmt: skip
def test_command_needs_nothing_of_the_machine_that_will_train(flag, capsys, tmp_path):
    recipe = Path(__file__).parents[1] / "examples/llama3-8b-qlora.yaml"
    mine = tmp_path / "mine.yaml"
    name, _, value = flag[2:].partition("=")
    mine.write_text(f"{recipe.read_text()}\n{name}: {value}\n")
    outputs = []
    for words in ([str(recipe)], [str(recipe), flag], [str(mine)]):
        assert cli.main(["estimate", *words, "--model", "SmolLM2-135M"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
