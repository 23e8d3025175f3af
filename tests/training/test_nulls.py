"""Rows whose dictionaries have different keys, through everything that `datasets` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, load_dataset

from orpo_kernels.training.data import COLUMNS, prepare_dataset, tokenize_pair
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import make

# All that a row's dictionaries hold becomes text: tools, calls, and which keys a message has.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "{{ m.role }}{{ m.keys() | list }}: {{ m.tool_calls | tojson if m.tool_calls else m.content }}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def row(question: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    kinds = {key: {"type": type(value).__name__} for key, value in arguments.items()}
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "no", "name": question}],
        "chat_template_kwargs": {"tools": [{"name": name, "parameters": kinds}], name: True},
    }


ROWS = [
    row("weather in Rome?", "weather", {"city": "Rome"}),
    row("2 + 3?", "add", {"x": 2, "y": {"value": 3}}),
    row("now?", "clock", {}),
]


def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def parquet(folder: Path) -> str:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def jsonl(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: Dataset.from_list(ROWS),
    "generator": lambda _: Dataset.from_generator(lambda: iter(ROWS)),
    "parquet": lambda folder: load_dataset("parquet", data_files=parquet(folder), split="train"),
    "json": lambda folder: load_dataset("json", data_files=jsonl(folder), split="train"),
    "stream of parquet": lambda folder: load_dataset(
        "parquet", data_files=parquet(folder), split="train", streaming=True
    ),
    "stream, mapped": lambda _: Dataset.from_list(ROWS).to_iterable_dataset().map(lambda r: r),
    "stream of rows": lambda _: IterableDataset.from_generator(lambda: iter(ROWS)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_what_their_source_had(source: str, tmp_path: Path) -> None:
    prepared = prepare_dataset(SOURCES[source](tmp_path), tokenizer(), max_length=1024)
    expected = [tokenize_pair(each, tokenizer(), 1024) for each in ROWS]
    assert list(prepared.select_columns(list(COLUMNS))) == expected


def test_implied_prompt_of_messages_with_different_keys() -> None:
    # Only the chosen column has tool calls, so that its user message has one too, a null.
    rows = [
        {"chosen": each["prompt"] + each["chosen"], "rejected": each["prompt"] + each["rejected"]}
        for each in ROWS
    ]
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer(), max_length=1024)
    expected = [tokenize_pair(each, tokenizer(), 1024) for each in rows]
    assert list(prepared.select_columns(list(COLUMNS))) == expected


def test_real_nulls() -> None:
    rows = [row("now?", "clock", {"zone": None}), row("then?", "clock", {"zone": "CET"})]
    data = Dataset.from_list(rows)
    kept = prepare_dataset(data, tokenizer(), max_length=1024, keep_nulls=True)
    assert '"zone": null' in tokenizer().decode(kept[0]["chosen_input_ids"])
    dropped = prepare_dataset(data, tokenizer(), max_length=1024)
    assert '"arguments": {}' in tokenizer().decode(dropped[0]["chosen_input_ids"])


def test_nulls_of_a_json_column_are_real() -> None:
    json_type = pytest.importorskip("datasets", "5.0").Json
    rows = [row("now?", "clock", {"zone": None})]
    features = Dataset.from_list(rows).features
    data = Dataset.from_list(rows, features=Features({**features, "chosen": json_type()}))
    prepared = prepare_dataset(data, tokenizer(), max_length=1024)
    assert '"zone": null' in tokenizer().decode(prepared[0]["chosen_input_ids"])


def test_trainer_takes_the_option(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    lengths = [
        make(
            tmp_path, train_dataset=data, processing_class=tokenizer(), keep_nulls=keep,
            max_length=1024,
        ).train_dataset["length"][:]
        for keep in (False, True)
    ]  # fmt: skip
    assert all(without < with_nulls for without, with_nulls in zip(*lengths, strict=True))
