"""Rows that the chat template refuses: what the message says, and what skipping them leaves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from orpo_kernels import cli
from orpo_kernels.training import ORPOConfig
from orpo_kernels.training.data import prepare_dataset, tokenize_pair
from orpo_kernels.training.rows import RowError
from orpo_kernels.training.templates import render
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import make

# As Gemma's and Mistral's: no system role, user and assistant by turns; each says it its own way.
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content }}{% endfor %}"
)
PRINTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PARTS = [{"type": "text", "text": "q"}]
SYSTEM = {"role": "system", "content": "s"}

# template, the prompt's messages, and what the message says: why, the roles, what to do.
REFUSED: dict[str, tuple[str, list[dict[str, Any]], tuple[str, ...]]] = {
    "system role": (
        STRICT,
        [SYSTEM, USER],
        ("roles (system, user): TemplateError: no system role; put the system message's text in",),
    ),
    "order": (
        STRICT,
        [USER, USER],
        ("roles (user, user): TemplateError: roles must alternate; merge neighbouring messages",),
    ),
    "unknown role": (
        STRICT,
        [USER, {"role": "tool", "content": "3"}],
        ("roles (user, tool, assistant): TemplateError",),
    ),
    "parts, template fails": (
        STRICT,
        [{"role": "user", "content": PARTS}],
        ("roles (user): TypeError: can only concatenate str", "join the parts of a content to one"),
    ),
    "parts, template prints a list": (
        PRINTS,
        [{"role": "user", "content": PARTS}],
        ("writes the content of message 0, roles (user), as a Python list; join the parts",),
    ),
    "no content": (
        PRINTS,
        [USER, ANSWER, {"role": "user"}],
        ("message 2, roles (user, assistant, user, assistant), must have a content", "['role']"),
    ),
    "null": (
        PRINTS,
        [{"role": "user", "content": None}],
        ("message 0, roles (user, assistant), m",),
    ),
    "number": (PRINTS, [{"role": "user", "content": 3}], ("must be text, got int",)),
    "any error of Python": (
        "{{ messages[0].content / 2 }}",
        [USER],
        ("TypeError: unsupported operand", "set a chat_template that takes them"),
    ),
    "syntax": ("{% if %}", [USER], ("TemplateSyntaxError: Expected an expression",)),
}


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rows(*prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "chosen": [ANSWER], "rejected": [ANSWER]} for prompt in prompts]


@pytest.mark.parametrize("name", REFUSED)
def test_message(name: str) -> None:
    template, prompt, parts = REFUSED[name]
    data = Dataset.from_list(rows([USER])).to_list() + rows(prompt)
    stream = IterableDataset.from_generator(lambda: iter(data))  # keeps the rows as they are
    with pytest.raises(RowError) as refusal:
        list(prepare_dataset(stream, with_template(template), name="train"))
    message = str(refusal.value)
    # Where the template is at fault, the first row is refused already.
    assert message.startswith(("row 1 of train: ", "row 0 of train: "))
    assert message.startswith("row 1") or name in ("any error of Python", "syntax")
    assert message.endswith("; on_bad_row='skip' leaves such rows out")
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_answers_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"message 1, roles \(user, assistant\), must have a con"):
        render({"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant"}]},
               with_template(PRINTS))  # fmt: skip


def test_a_tool_call_needs_no_content() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}{% endfor %}"
    texts = render({"prompt": [USER], "chosen": [answer], "rejected": [ANSWER]},
                   with_template(template))  # fmt: skip
    assert texts == ("q", "f", "a")


def test_parts_where_the_template_takes_them() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    row = rows([{"role": "user", "content": PARTS}])[0]
    assert render(row, with_template(template))[0] == "[user]q"


def test_template_kwargs_must_be_a_dictionary() -> None:
    row = rows([USER])[0] | {"chat_template_kwargs": "tools"}
    with pytest.raises(ValueError, match="chat_template_kwargs must be a dictionary, got str"):
        render(row, with_template(PRINTS))


GOOD, BAD = [USER], [SYSTEM, USER]


def test_skipped_rows_are_counted(caplog: Any) -> None:
    data = Dataset.from_list(rows(BAD, GOOD, BAD, [USER, ANSWER, USER]))
    tokenizer = with_template(STRICT)
    with caplog.at_level(logging.WARNING):
        kept = prepare_dataset(data, tokenizer, name="train", on_bad_row="skip")
    (message,) = (record.getMessage() for record in caplog.records)
    assert "2 of 4 rows of train cannot be used and were skipped: 0, 2. The first: row 0" in message
    expected = [tokenize_pair(data[i], tokenizer, 1024) for i in (1, 3)]
    assert [{name: row[name] for name in expected[0]} for row in kept] == expected


def test_no_row_left() -> None:
    data = Dataset.from_list(rows(BAD, BAD))
    with pytest.raises(ValueError, match="none of the 2 rows of train can be used; row 0 of train"):
        prepare_dataset(data, with_template(STRICT), name="train", on_bad_row="skip")


def test_what_is_wrong_with_every_row_is_not_skipped() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    with pytest.raises(ValueError, match="need a chat template"):
        prepare_dataset(Dataset.from_list(rows(GOOD)), tokenizer, on_bad_row="skip")


def test_skipped_rows_of_a_stream(caplog: Any) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows(*[BAD, GOOD] * 11)))
    with caplog.at_level(logging.WARNING):
        kept = list(prepare_dataset(stream, with_template(STRICT), name="s", on_bad_row="skip"))
    assert len(kept) == 11
    counts = [record.getMessage().split(":")[1] for record in caplog.records]
    assert counts == [" 1. The last", " 10. The last"]


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match='on_bad_row must be "raise" or "skip", got \'drop\''):
        prepare_dataset(Dataset.from_list(rows(GOOD)), tiny_tokenizer(), on_bad_row="drop")
    with pytest.raises(ValueError, match="on_bad_row must be one of"):
        ORPOConfig("out", on_bad_row="drop")


def test_trainer_skips(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(BAD, GOOD, GOOD))
    options = {"train_dataset": data, "processing_class": with_template(STRICT)}
    with pytest.raises(ValueError, match="row 0 of train_dataset: the chat template refuses"):
        make(tmp_path, **options)
    assert len(make(tmp_path, **options, on_bad_row="skip").train_dataset) == 2


def test_command_line_says_it_in_one_line(tmp_path: Path, capsys: Any) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    with_template(STRICT).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(GOOD, BAD))))
    words = [f"--model_name_or_path={tmp_path}/model", f"--dataset_name={tmp_path}/rows.jsonl"]
    words += [f"--output_dir={tmp_path}/out", "--use_cpu", "--max_steps=1", "--report_to=none"]
    assert cli.main(["train", *words, "--save_strategy=no"]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(
        "orpo-kernels: row 1 of train_dataset: the chat"
    )
    assert "Traceback" not in captured.err
    assert cli.main(["train", *words, "--save_strategy=no", "--on_bad_row=skip"]) == 0
