"""`--merge_adapter`: what is saved is adapter on base; transformers' own calls push it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import tiny_base
from examples.synthetic import preference_pairs, write_jsonl
from orpo_kernels import cli
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import pairs

# 64 wide: what nf4 needs; one layer: the shortest way through all of it.
SIZE = tiny_base.Size(vocab_size=400, hidden_size=64, layers=1, steps=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("work")
    rows = preference_pairs(24)
    tiny_base.build(rows, folder / "base", SIZE)
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def words(work: Path, out: Path, *flags: str) -> list[str]:
    """The published recipe on a tiny model: its file, and what a CPU and a test need otherwise."""
    recipe = Path(__file__).parents[2] / "examples/llama3-8b-qlora.yaml"
    return [
        "train", str(recipe), f"--model_name_or_path={work}/base", f"--output_dir={out}",
        f"--dataset_name={work}/train.jsonl", "--eval_fraction=0.25", "--max_length=64",
        "--dtype=float32", "--use_cpu=true", "--bf16=false", "--max_steps=2", "--eval_steps=1",
        "--save_steps=2", "--learning_rate=1e-2", "--warmup_steps=0", "--disable_tqdm=true",
        "--merge_adapter=true", *flags,
    ]  # fmt: skip


def test_the_published_recipe_to_its_end(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert cli.main(words(work, out)) == 0
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(out).chat_template
    ids = tokenizer("Say what you know of the sky.", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        found, expected = merged(ids).logits, adapter(ids).logits
        with adapter.disable_adapter():
            base = adapter(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().max() > 1e-2  # the adapter says something


@pytest.mark.parametrize("flag", ["target", "save"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "q_proj"])
def test_a_tied_head(module: str, flag: str, tmp_path: Path) -> None:
    # A name alone, as "q_proj": the layer of that name, not a pattern of whole paths.
    flags = [f"--lora_target_modules={module}"]
    if flag == "save":
        flags = ["--lora_target_modules=v_proj", f"--lora_modules_to_save={module}"]
    build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    pairs(6).to_json(tmp_path / "train.jsonl")
    out = tmp_path / "out"
    given = ["use_cpu=true", "use_peft=true", "merge_adapter=true", "max_steps=2", "report_to=none"]
    given += ["learning_rate=1e-1", "save_strategy=no", f"output_dir={out}"]
    given += [f"model_name_or_path={tmp_path}/base", f"dataset_name={tmp_path}/train.jsonl"]
    assert cli.main(["train", *(f"--{each}" for each in given), *flags]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)
    is_tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert is_tied == (module == "q_proj")  # where the adapter leaves both as they are


def test_it_is_pushed_by_transformers(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def created(name: str, *, token: str, private: bool, exist_ok: bool) -> Any:
        assert (token, private, exist_ok) == ("hf_x", True, True)
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def uploaded(*, repo_id: str, folder_path: str, **_: Any) -> Any:
        calls.append(("folder", repo_id))
        assert (Path(folder_path) / "adapter_model.safetensors").is_file()
        return SimpleNamespace(commit_url="", oid="")

    def pushed(self: Any, repo_id: str, **given: Any) -> None:
        calls.append((type(self).__name__, repo_id))
        assert given == {"private": True, "token": "hf_x"}

    hub = SimpleNamespace(create_repo=created, upload_folder=uploaded)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", pushed)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "push_to_hub", pushed)
    flags = ["--push_to_hub=true", "--hub_model_id=mine", "--hub_token=hf_x"]
    flags += ["--hub_private_repo=true", "--load_in_4bit=false", "--optim=adamw_torch"]
    flags += ["--use_bnb_nested_quant=false", "--hub_strategy=end"]
    assert cli.main(words(work, tmp_path / "out", *flags)) == 0
    assert ("folder", "somebody/mine") in calls
    assert [name for _, name in calls[-2:]] == ["somebody/mine-merged"] * 2
    assert calls[-2][0] == "LlamaForCausalLM"


def test_a_run_without_an_adapter_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--use_peft=false", "--load_in_4bit=false"]
    assert cli.main(words(work, tmp_path / "out", *flags)) == cli.BAD_INPUT
    assert "merge_adapter is for a run that trains an adapter" in capsys.readouterr().err
