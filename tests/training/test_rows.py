"""Which columns are the prompt: rows that have none are refused, with the option that mends it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from orpo_kernels import cli
from orpo_kernels.training.data import check_dataset, prepare_dataset
from orpo_kernels.training.rows import RowOptions, extract_prompt
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import make, pairs

TEXTS = {"chosen": "It is blue.", "rejected": "It is green."}
SIDES = {"chosen": "blue", "rejected": "green"}
USER = {"role": "user", "content": "The sky?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = {
    "chosen": [{"role": "assistant", "content": "Blue."}],
    "rejected": [{"role": "assistant", "content": "Green."}],
}

# row, what the message must say, the options that mend it, and the prompt that these give.
WITHOUT_PROMPT: dict[str, tuple[dict[str, Any], str, dict[str, Any], Any]] = {
    "question": (
        {"question": "The sky?", **SIDES},
        "set prompt_column='question', or set allow_missing_prompt=True",
        {"prompt_column": "question"},
        "The sky?",
    ),
    "shared by chance": (
        {"question": "The sky?", **TEXTS},
        "what chosen and rejected share, 'It is', is not all of it; set prompt_column='question'",
        {"prompt_column": "question"},
        "The sky?",
    ),
    "instruction and input": (
        {"Instruction": "Name the colour.", "input": "sky", **TEXTS},
        "set prompt_column=['Instruction', 'input'], or",
        {"prompt_column": ["Instruction", "input"]},
        "Name the colour.\nsky",
    ),
    "empty input": (
        {"instruction": "Name the sky's colour.", "input": "", "output": "", **TEXTS},
        "set prompt_column='instruction', or",
        {"prompt_column": ["instruction", "input"]},
        "Name the sky's colour.",
    ),
    "prompt_text and system": (
        {"system": "Be brief.", "prompt_text": "The sky?", **SIDES},
        "set prompt_column='prompt_text' and system_column='system', or",
        {"prompt_column": "prompt_text", "system_column": "system"},
        "Be brief.\n\nThe sky?",
    ),
    "name nobody knows": (
        {"frage": "The sky?", "prompt_id": "a b", **SIDES},
        "set prompt_column to the column that holds it, of ['frage', 'prompt_id'], or",
        {"prompt_column": "frage"},
        "The sky?",
    ),
    "only a line break shared": (
        {"q": "The sky?", "chosen": "\nblue", "rejected": "\ngreen"},
        "chosen and rejected do not begin alike",
        {"prompt_column": "q"},
        "The sky?",
    ),
    "empty cell": (
        {"prompt": None, **TEXTS},
        "the row has no prompt: prompt is empty; give it one, or",
        {"allow_missing_prompt": True},
        "",
    ),
    "no column": (SIDES, "do not begin alike; give it one", {"allow_missing_prompt": True}, ""),
    "messages": (
        {"question": "The sky?", **TURNS},
        "must begin with the same message, got {'role': 'assistant', 'content': 'Blue.'} and",
        {"prompt_column": "question"},
        [USER],
    ),
    "messages in another column": (
        {"conversation": [USER], **TURNS},
        "set prompt_column='conversation', or",
        {"prompt_column": "conversation"},
        [USER],
    ),
    "messages and system": (
        {"question": "The sky?", "system_prompt": "Be brief.", **TURNS},
        "set prompt_column='question' and system_column='system_prompt', or",
        {"prompt_column": "question", "system_column": "system_prompt"},
        [SYSTEM, USER],
    ),
}


@pytest.mark.parametrize("name", WITHOUT_PROMPT)
def test_row_without_prompt(name: str) -> None:
    row, message, options, prompt = WITHOUT_PROMPT[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_prompt(row)
    assert extract_prompt(row, RowOptions(**options)) == (prompt, row["chosen"], row["rejected"])


@pytest.mark.parametrize(
    "more", [{}, {"question": "The sky?"}, {"source": "web text"}, {"prompt_id": "a b"}]
)
def test_full_texts_need_no_column(more: dict[str, Any]) -> None:
    row = {"chosen": "Q: The sky?\nA: blue", "rejected": "Q: The sky?\nA: green", **more}
    assert extract_prompt(row)[0] == "Q: The sky?\nA:"


def test_text_in_front_of_the_assistants_messages_is_the_users() -> None:
    assert extract_prompt({"prompt": "The sky?", **TURNS})[0] == [USER]
    # Beside full conversations it is ignored, as by TRL.
    row = {"prompt": "?", **{side: [USER, *answer] for side, answer in TURNS.items()}}
    assert extract_prompt(row)[0] == [USER]


def test_system_column() -> None:
    options = RowOptions(system_column="s")
    row = {"s": "Be brief.", "prompt": [USER], **TURNS}
    assert extract_prompt(row, options)[0] == [SYSTEM, USER]
    assert extract_prompt({**row, "s": None}, options)[0] == [USER]
    assert extract_prompt({**row, "prompt": [SYSTEM, USER]}, options)[0] == [SYSTEM, USER]
    other = [{"role": "system", "content": "Be long."}, USER]
    with pytest.raises(ValueError, match="begin with a system message already"):
        extract_prompt({**row, "prompt": other}, options)
    with pytest.raises(ValueError, match="system_column 's' must hold text, got int"):
        extract_prompt({**row, "s": 3}, options)


def test_system_column_that_is_not_named(caplog: Any) -> None:
    data = Dataset.from_list([{"system": "Be brief.", "prompt": "The sky?", **SIDES}])
    with caplog.at_level(logging.WARNING):
        prepare_dataset(data, tiny_tokenizer(), name="data")
        assert "column 'system' of data is ignored; set system_column='system'" in caplog.text
        caplog.clear()
        prepare_dataset(data, tiny_tokenizer(), system_column="system")
    assert not caplog.text


def test_several_columns_must_be_text() -> None:
    options = RowOptions(prompt_column=["question", "history"])
    with pytest.raises(ValueError, match="several prompt columns must all be text, got list"):
        extract_prompt({"question": "The sky?", "history": [USER], **TEXTS}, options)


def test_columns_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"columns of train; \['q', 's'\] missing, got \['prompt'"):
        check_dataset(pairs(2), "train", prompt_column="q", system_column="s")


def test_trainer_maps_the_columns(tmp_path: Path) -> None:
    data = pairs(4)
    options = {"train_dataset": data.rename_column("prompt", "question")}
    with pytest.raises(ValueError, match="row 0 of train_dataset: the row has no prompt"):
        make(tmp_path, **options)
    with pytest.raises(ValueError, match="must name columns of train_dataset"):
        make(tmp_path, **options, prompt_column="query")
    mapped = make(tmp_path, **options, prompt_column="question").train_dataset
    assert mapped[:] == prepare_dataset(data, tiny_tokenizer(), max_length=64)[:]


def test_command_line(tmp_path: Path, capsys: Any) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": "The", "input": "sky?", **SIDES}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"--model_name_or_path={tmp_path}/model", f"--dataset_name={tmp_path}/rows.jsonl"]
    words += [f"--output_dir={tmp_path}/out", "--use_cpu", "--max_steps=1", "--report_to=none"]
    assert cli.main(["train", *words]) == cli.BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("orpo-kernels: row 0 of train_dataset: the row has no prompt")
    assert "set prompt_column=['instruction', 'input']" in line
    config = tmp_path / "config.yaml"
    config.write_text("prompt_column: [instruction, input]\nsave_strategy: no\n")
    assert cli.main(["train", str(config), *words]) == 0
    config.write_text("save_strategy: no\noverwrite_output_dir: true\n")
    assert cli.main(["train", str(config), *words, "--prompt_column", "instruction", "input"]) == 0
