"""YAML files and flags to options, and every mistake to a message that says where it is."""

from pathlib import Path

import pytest

from orpo_kernels.training import options

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    found = options.parse_options([str(recipe)])
    assert found.model.model_name_or_path
    assert found.data.dataset_name
    assert found.training.output_dir == f"runs/{recipe.stem}".replace("runs/demo", "runs/demo/orpo")


def test_published_recipe_is_as_published():
    found = options.parse_options([str(ROOT / "examples/llama3-8b-qlora.yaml")])
    model, training = found.model, found.training
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (
        True, "nf4", True,
    )  # fmt: skip
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (16, 32, 0.05)
    assert len(model.lora_target_modules) == 7
    assert found.data.chat_template == "chatml"
    assert (training.beta, training.learning_rate, training.max_length) == (0.1, 8e-6, 1024)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 4)
    assert training.optim == "paged_adamw_8bit"
    assert (training.lr_scheduler_type, training.warmup_steps) == ("linear", 10)
    assert (training.num_train_epochs, training.eval_steps) == (1, 0.2)


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("beta: 0.3\nlearning_rate: 8e-6\nmax_length: null\neval_strategy: no\n")
    found = options.parse_options([str(path), "--beta", "0.2", "--warmup-steps=7"])
    assert found.training.beta == 0.2
    assert found.training.warmup_steps == 7
    assert found.training.learning_rate == 8e-6  # YAML reads it as text
    assert found.training.max_length is None
    assert found.training.eval_strategy == "no"  # YAML reads it as false
    assert found.training.output_dir == "runs/mine"


def test_a_flag_repairs_what_is_wrong_in_the_file(tmp_path):
    path = tmp_path / "gpu.yaml"
    path.write_text("load_in_4bit: true\n")
    assert options.parse_options([str(path), "--use_peft"]).model.use_peft


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        ("orpo_alpha: 0.1", "did you mean 'beta'?"),
        ("qqqqq: 1", "--help` lists them all"),
        ("max_length: abc", "max_length: invalid int value: 'abc'"),
        ("max_length: 1.5", "max_length: invalid int value: '1.5'"),
        ("max_length: [1, 2]", "takes one value"),
        ("lora_target_modules: [{a: 1}]", "list of plain values"),
        ("dtype: int8", "invalid choice: 'int8'"),
        ("bf16: perhaps", "perhaps"),
        ("gradient_accumulation_steps: 0", "must be at least 1, got 0"),
        ("per_device_train_batch_size: 0", "must be at least 1, got 0"),
        ("beta: -1", "beta must be a finite number >= 0"),
        ("load_in_4bit: true", "set use_peft: true"),
        ("load_in_4bit: true\nload_in_8bit: true\nuse_peft: true", "choose one"),
        ("eval_fraction: 2", "between 0 and 1"),
        ("max_samples: 0", "at least 1"),
        ("a: [b", "not valid YAML"),
        ("- a\n- b", "`name: value` lines, got list"),
        ("", "`name: value` lines, got NoneType"),
        ("1: 2", "`name: value` lines"),
    ],
)
def test_a_wrong_file(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(options.OptionError) as found:
        options.parse_options([str(path)])
    assert message in str(found.value)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no such config file: nowhere.yaml"),
        (["--betta", "1"], "unknown option --betta; did you mean 'beta'?"),
        (["--beta", "much"], "beta: invalid float value: 'much'"),
        (["--beta", "1", "more"], "unexpected argument 'more'"),
        (["."], "cannot read the config file"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(options.OptionError) as found:
        options.parse_options(words)
    assert message in str(found.value)


def test_words_for_a_checkpoint():
    for word, resume in (("true", True), ("False", False)):
        found = options.parse_options([f"--resume_from_checkpoint={word}"])
        assert found.training.resume_from_checkpoint is None
        assert found.run.resume is resume
