"""`orpo-kernels` from the words of a command line to files on disk, with a very small model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples import tiny_base
from examples.synthetic import preference_pairs, write_jsonl
from orpo_kernels import __version__, cli
from orpo_kernels.training import launch, options, report, sources

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(
    os.environ.get("ORPO_PREFERENCE_DATA", ROOT.parent / "shared/data/preference_en.jsonl")
)
# 64 wide: what nf4 needs; one layer: the shortest way through all of it.
SIZE = tiny_base.Size(vocab_size=400, hidden_size=64, layers=1, steps=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base model and pairs, small enough to train in a second."""
    folder = tmp_path_factory.mktemp("work")
    train, test = preference_pairs(24), preference_pairs(6, split="heldout")
    tiny_base.build(train, folder / "base", SIZE)
    write_jsonl(folder / "data" / "train.jsonl", train)
    write_jsonl(folder / "data" / "test.jsonl", test)
    return folder


@pytest.fixture
def words(work, tmp_path):
    """The words of a command that trains two steps into `tmp_path / "out"`."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {work}/base\n"
        f"dataset_name: {work}/data\n"
        f"output_dir: {tmp_path}/out\n"
        "use_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\n"
        "max_steps: 2\nper_device_train_batch_size: 2\nlearning_rate: 1e-3\nlogging_steps: 1\n"
        "gradient_checkpointing: false\ndisable_tqdm: true\nuse_cpu: true\n"
    )
    return ["train", str(config)]


def refused(words, capsys):
    """The message of a command that must be refused, with status 2 and without a traceback."""
    assert cli.main(words) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    before, found, message = captured.err.rpartition("orpo-kernels: ")
    assert found
    assert not before or before.endswith("\n")  # progress bars
    return message


# The commands themselves


def test_help_and_version_load_nothing(capsys):
    assert cli.main(["--help"]) == 0
    assert "estimate" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"orpo-kernels {__version__}\n"
    code = (
        "import sys, orpo_kernels.cli as c; c.main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'matplotlib')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_python_dash_m():
    run = subprocess.run(
        [sys.executable, "-m", "orpo_kernels", "--version"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == f"orpo-kernels {__version__}\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["--what"]])
def test_unknown_command(words, capsys):
    assert cli.main(words) == cli.BAD_INPUT
    assert "usage: orpo-kernels" in capsys.readouterr().err


def test_train_help_lists_our_options(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("--model_name_or_path", "--dataset_name", "--beta", "--resume", "--lora_r"):
        assert name in out


def test_wrong_options(capsys):
    assert "no such config file: nowhere.yaml" in refused(["train", "nowhere.yaml"], capsys)
    assert "did you mean 'beta'?" in refused(["train", "--betta", "1"], capsys)


# Model, data, output folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path=./absent"], "no such model folder: ./absent"),
        (["--dataset_name=absent.jsonl"], "no such file or folder: absent.jsonl"),
        (["--dataset_name={work}/base/tokenizer.jsonx"], "no such file or folder"),
        (["--dataset_train_split=dev"], "no split 'dev', it has t"),
        (["--eval_strategy=steps", "--dataset_test_split=dev"], "set eval_fraction"),
        (["--eval_fraction=0.001"], "both need at least 1"),
        (["--chat_template=absent.jinja"], '"chatml" or a file with a Jinja template'),
        (["--resume"], "--resume needs a complete checkpoint-<step> folder"),
        (["--output_dir={work}/data/train.jsonl"], "is a file"),
        (["--output_dir={work}/data"], "is not empty; continue the run in it with --resume"),
        (["--resume_from_checkpoint=true"], "--resume needs a complete checkpoint-<step> folder"),
        (["--lora_target_modules", "nothing"], "nothing"),
        (["--lora_modules_to_save", "embed_token"], "['embed_token'] are not there, and PEFT"),
        (["--report_to=dvclive"], "requires dvclive"),
        (["--learning_rate=-1"], "Invalid learning rate"),
        (["--workspace_bytes=1"], "raise workspace_bytes"),
        # 24 pairs
        (["--per_device_train_batch_size=25", "--dataloader_drop_last"], "no step was taken"),
    ],
)
def test_unusable_input(flags, message, words, work, capsys):
    flags = [flag.format(work=work) for flag in flags]
    assert message in refused([*words, *flags], capsys)


def test_wrong_files(words, tmp_path, capsys):
    text = tmp_path / "pairs.txt"
    text.write_text("{}")
    assert "a file of pairs must end in" in refused([*words, f"--dataset_name={text}"], capsys)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": ')
    assert "cannot load" in refused([*words, f"--dataset_name={broken}"], capsys)
    columns = tmp_path / "columns.jsonl"
    columns.write_text('{"question": "a", "answer": "b"}\n')
    assert "chosen" in refused([*words, f"--dataset_name={columns}"], capsys)


def test_a_pickled_model_is_not_loaded(words, work, tmp_path, capsys):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in (work / "base").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert "safetensors" in refused([*words, f"--model_name_or_path={folder}"], capsys)


def load(work, *flags):
    found = options.parse_options(
        [f"--model_name_or_path={work}/base", f"--dataset_name={work}/data", *flags]
    )
    return found, sources.load_pairs(found)


def test_samples_and_held_out_rows(work):
    flags = ["--eval_fraction=0.25", "--max_samples=12", "--seed=3"]
    _, (train, evaluation) = load(work, *flags)
    assert (len(train), len(evaluation)) == (9, 3)
    questions = {row["prompt"][0]["content"] for row in train}
    assert not questions & {row["prompt"][0]["content"] for row in evaluation}
    _, (again, _) = load(work, *flags)
    assert again.to_list() == train.to_list()


def test_chatml_for_a_tokenizer_without_it(work, tmp_path):
    # As Llama-3's: another BOS and EOS, neither of the two tokens, no template, no pad token.
    folder = tmp_path / "base"
    tiny_base.LlamaForCausalLM.from_pretrained(work / "base").save_pretrained(folder)
    bare = json.loads((work / "base" / "tokenizer.json").read_text().replace("<|im_", "<|other_"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_base.Tokenizer.from_str(json.dumps(bare)),
        bos_token="<|other_start|>", eos_token="<|other_end|>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    flags = [f"--model_name_or_path={folder}", "--chat_template=chatml"]
    found, _ = load(work, *flags)
    tokenizer = sources.load_tokenizer(found)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    )
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(tokenizer("<|im_start|>")["input_ids"]) == 1
    model = sources.load_base_model(found, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_a_template_file(work, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}")
    found, _ = load(work, f"--chat_template={path}")
    tokenizer = sources.load_tokenizer(found)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


# Training


def test_train_saves_everything_and_never_overwrites(words, work, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*words, "--eval_strategy=steps", "--eval_steps=1", "--eval_on_start"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "eval, step 0" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["train_tokens_per_second"] > 0
    assert metrics["peak_rss_bytes"] > 2**20
    assert metrics["eval_first"]["step"] == 0
    assert metrics["eval_last"]["step"] == 2
    for key in report.TABLE_METRICS:
        assert key in metrics["train"]
        assert key in metrics["eval_last"]
    assert (out / "adapter_model.safetensors").is_file()
    assert (out / report.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert len(report.curves(report.read_history(out))[1]) == 3

    before = (out / "metrics.json").read_bytes()
    assert "is not empty" in refused(words, capsys)
    assert (out / "metrics.json").read_bytes() == before
    assert cli.main([*words, "--overwrite_output_dir", "--max_steps=1"]) == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == 1


def test_a_final_evaluation_without_eval_strategy(words, tmp_path):
    assert cli.main(words) == 0  # the folder has a test split
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_last"]["step"] == 2
    assert metrics["eval_first"] is None


def test_resume_continues_from_the_last_complete_checkpoint(words, tmp_path, capsys):
    out = tmp_path / "out"
    saving = ["--save_strategy=steps", "--save_steps=1"]
    assert cli.main([*words, *saving]) == 0
    (out / "checkpoint-2" / "trainer_state.json").unlink()  # killed while it was written
    assert cli.main([*words, *saving, "--max_steps=3", "--resume"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 3
    steps = [entry["step"] for entry in report.curves(report.read_history(out))[0]]
    assert steps == [1, 2, 3]
    # Another adapter than the checkpoint's.
    message = refused([*words, *saving, "--max_steps=4", "--resume", "--lora_r=4"], capsys)
    assert "must be of the model that is trained" in message


@pytest.mark.parametrize("step", [2, 3])  # in the middle of the training, and at its end
def test_a_full_disk(step, words, tmp_path, capsys, monkeypatch):
    # What torch says of one; safetensors and the system say others.
    def save(self, *args, **kwargs):
        if self.state.global_step == step:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 0")
        written(self, *args, **kwargs)

    written = launch.ORPOTrainer._save
    monkeypatch.setattr(launch.ORPOTrainer, "_save", save)
    message = refused([*words, "--save_steps=1", "--max_steps=3", "--save_total_limit=5"], capsys)
    assert f"cannot save to '{tmp_path}/out'" in message
    assert "GiB are free: [enforce" in message
    assert "--resume" in message


def test_full_fine_tuning_and_qlora(words, tmp_path, caplog):
    assert cli.main([*words, "--use_peft=false", f"--output_dir={tmp_path}/full"]) == 0
    assert "lora_r, lora_target_modules: not used, as use_peft is false" in caplog.text
    assert (tmp_path / "full" / "model.safetensors").is_file()
    pytest.importorskip("bitsandbytes")
    nf4 = ["--load_in_4bit", "--use_bnb_nested_quant", "--optim=paged_adamw_8bit"]
    assert cli.main([*words, *nf4, f"--output_dir={tmp_path}/nf4"]) == 0
    assert (tmp_path / "nf4" / "adapter_model.safetensors").is_file()


def test_an_interrupted_run_says_how_to_go_on(words, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupt)
    assert cli.main(words) == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err


def test_report_command(words, tmp_path, capsys):
    for name in ("a", "b"):
        assert cli.main([*words, f"--output_dir={tmp_path}/{name}"]) == 0
    capsys.readouterr()
    (tmp_path / "a" / report.PLOT_FILE).unlink()
    assert cli.main(["report", f"{tmp_path}/a"]) == 0
    assert "rewards/accuracies" in capsys.readouterr().out
    assert (tmp_path / "a" / report.PLOT_FILE).is_file()
    both = tmp_path / "both.png"
    assert cli.main(["report", f"{tmp_path}/a", f"{tmp_path}/b", f"--output={both}"]) == 0
    assert both.is_file()
    assert "output folder of a run" in refused(["report", str(tmp_path)], capsys)


def test_selftest_is_passed_its_words(monkeypatch):
    from orpo_kernels import selftest

    monkeypatch.setattr(selftest, "main", lambda words: len(words))
    assert cli.main(["selftest", "--device", "cpu"]) == 2


@pytest.mark.skipif(not REAL_DATA.is_file(), reason=f"{REAL_DATA.name} is not there")
def test_real_pairs(words, tmp_path):
    # Multi-turn, with system messages and answers far longer than max_length.
    flags = [f"--dataset_name={REAL_DATA}", "--eval_fraction=0.1", "--max_samples=40"]
    assert cli.main([*words, *flags, "--max_length=2048"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # log(400) = 6.0 is what a model knows that knows nothing of its 400 tokens.
    assert 4 < metrics["eval_last"]["nll_loss"] < 7
