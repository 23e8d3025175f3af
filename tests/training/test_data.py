"""Formats, tokenisation, truncation and labels, against TRL's own `tokenize_row`."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.training.data import COLUMNS, prepare_dataset, tokenize_pair
from orpo_kernels.training.rows import RowOptions, extract_prompt
from orpo_kernels.training.templates import render
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WORDS = (
    "sky",
    "blue",
    " the",
    "the",
    "  ",
    "\n",
    "é",
    "42",
    "Paris.",
    " answer",
    "<|im_end|>",
    "a",
)
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    # The generation prompt is not how an assistant's turn begins (as DeepSeek-R1's): the prompt
    # must shrink to what both share.
    "detour": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}",
}


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """BPE without a pre-tokenizer: tokens merge across spaces, and across prompt and answer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    text = [" ".join(WORDS) * 3, "the sky the sky blue the answer", "".join(WORDS)]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    without_bos = tiny_tokenizer()
    without_bos.bos_token = None  # as Qwen's
    return {"bos": tiny_tokenizer(), "no bos": without_bos, "merging": merging_tokenizer()}


def trl_row(example: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    trainer = TRLTrainer.__new__(TRLTrainer)
    trainer.is_encoder_decoder, trainer.max_length = False, max_length
    trainer.processing_class = tokenizer
    texts = maybe_apply_chat_template(maybe_extract_prompt(dict(example)), tokenizer)
    return trainer.tokenize_row(texts)


def random_text(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def text_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " ?"} for i in range(count)]


def random_turns(rng: random.Random) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": "be kind"}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(0, 2)):
        turns.append({"role": "user", "content": random_text(rng, 0, 4)})
        turns.append({"role": "assistant", "content": random_text(rng, 1, 4)})
    if not turns or turns[-1]["role"] == "system" or rng.random() < 0.8:
        turns.append({"role": "user", "content": random_text(rng, 1, 5)})
    return turns


def random_rows(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = [random_text(rng, 0, 6) for _ in range(2)]
        if kind == "text":
            row = {"prompt": random_text(rng, 0, 5), "chosen": answers[0], "rejected": answers[1]}
        elif kind == "implicit text":
            prompt = random_text(rng, 1, 5)
            row = {"chosen": f"{prompt} b{answers[0]}", "rejected": f"{prompt} c{answers[1]}"}
        else:
            prompt = random_turns(rng)
            chosen, rejected = ([{"role": "assistant", "content": f"{a}."}] for a in answers)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if kind != "messages":
                row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
            if kind == "text prompt beside messages":
                row["prompt"] = prompt[-1]["content"]
        rows.append(row)
    return rows


KINDS = ("text", "implicit text", "messages", "implicit messages", "text prompt beside messages")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["bos", "no bos", "merging"])
def test_rows_equal_trl(kind: str, which: str) -> None:
    tokenizer = tokenizers()[which]
    refused = cut = 0
    for i, row in enumerate(random_rows(kind, 120, seed=len(kind))):
        tokenizer.chat_template = TEMPLATES["detour" if i % 3 == 0 else "chatml"]
        # 16 cuts most answers and is below many prompts, 40 cuts some, 400 none.
        max_length = (16, 40, 400)[i % 3]
        # Some texts have no prompt, which only TRL takes without being told.
        ours = tokenize_pair(row, tokenizer, max_length, RowOptions(allow_missing_prompt=True))
        assert set(ours) == set(COLUMNS)
        try:
            theirs = trl_row(row, tokenizer, max_length)
        except ValueError:  # TRL refuses the row: ours must still be the tokens of its text
            refused += 1
            text = "".join(render(row, tokenizer)[:2])
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            begin = int(tokens[0] != ours["chosen_input_ids"][0])  # after BOS
            assert ours["chosen_input_ids"][begin:][: len(tokens)] == tokens[: max_length - begin]
            continue
        cut += any(len(theirs[f"{s}_input_ids"]) > max_length for s in ("chosen", "rejected"))
        for column in COLUMNS:
            assert ours[column] == theirs[column][:max_length], (column, row)
    assert refused < 30  # of 120: the comparison is not an empty one
    assert cut > 0 or max_length == 400 or kind == "text"


def test_dataset_equals_trl_pipeline() -> None:
    # mlabonne/orpo-dpo-mix-40k's layout: a text prompt beside full conversations, more columns.
    tokenizer = tiny_tokenizer()
    rows = random_rows("text prompt beside messages", 12, seed=3)
    rows = [{**row, "source": "x", "question": i} for i, row in enumerate(rows)]
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=64)
    assert prepared.column_names == [*COLUMNS, "length"]
    for ours, row in zip(prepared.select_columns(list(COLUMNS)), rows, strict=True):
        theirs = trl_row(row, tokenizer, 64)
        assert ours == {column: theirs[column][:64] for column in COLUMNS}


def test_template_kwargs_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ mood }}" + CHAT_TEMPLATE
    row = random_rows("messages", 1, seed=0)[0] | {"chat_template_kwargs": {"mood": "calm"}}
    assert render(row, tokenizer)[0].startswith("calm")
    theirs = trl_row(row, tokenizer, 200)
    ours = tokenize_pair(row, tokenizer, 200)
    assert ours == {column: theirs[column] for column in COLUMNS}


def test_columns_of_other_tasks_are_ignored() -> None:
    # TRL refuses these names beside chosen and rejected.
    row = random_rows("messages", 1, seed=0)[0]
    more = {"label": True, "completion": "x", "messages": [USER]}
    assert tokenize_pair(row | more, tiny_tokenizer(), 90) == tokenize_pair(
        row, tiny_tokenizer(), 90
    )
    with pytest.raises(KeyError, match="Invalid keys"):
        trl_row(row | {"label": True}, tiny_tokenizer(), 90)


def abcd_tokenizer() -> PreTrainedTokenizerFast:
    """ "e", "a", "b" alone; "e", "abcd" where "cd" follows: fewer tokens than the prompt."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab={"?": 0, "a": 1, "b": 2, "c": 3, "d": 4, "bc": 5, "abc": 6, "abcd": 7, "e": 8},
            merges=[("b", "c"), ("a", "bc"), ("abc", "d")],
            unk_token="?",
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?")


def test_merge_deeper_than_one_token_is_split_at_the_first_change() -> None:
    # TRL refuses this one.
    row = {"prompt": "eab", "chosen": "cd", "rejected": "e"}
    with pytest.raises(ValueError, match="same length"):
        trl_row(row, abcd_tokenizer(), 10)
    ours = tokenize_pair(row, abcd_tokenizer(), 10)
    assert ours["chosen_input_ids"] == [8, 7, 0]
    assert ours["chosen_labels"] == [-100, 7, 0]
    assert ours["rejected_labels"] == [-100, -100, -100, 8, 0]


@pytest.mark.parametrize("rejected", ["cde", "ee"])
def test_a_merge_that_trl_takes_for_the_prompt(rejected: str) -> None:
    # TRL finds no difference, or one, between the two prompts, and does not score "abcd".
    row = {"prompt": "eab", "chosen": "cdee", "rejected": rejected}
    assert trl_row(row, abcd_tokenizer(), 10)["chosen_labels"] == [-100, -100, 8, 8, 0]
    assert tokenize_pair(row, abcd_tokenizer(), 10)["chosen_labels"] == [-100, 7, 8, 8, 0]


def test_difference_at_the_first_character() -> None:
    # TRL looks at chosen[-1] here and takes nearly all of the chosen text as prompt.
    allowed = RowOptions(allow_missing_prompt=True)
    assert extract_prompt({"chosen": "blue ", "rejected": "red"}, allowed) == ("", "blue ", "red")


def test_equal_answers_keep_their_last_message() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert extract_prompt({"chosen": turns, "rejected": turns}) == (turns[:1], turns[1:], turns[1:])


def test_a_prompt_that_the_answers_repeat_counts_once() -> None:
    other = {"role": "assistant", "content": "b"}
    row = {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, other]}
    assert extract_prompt(row) == ([USER], [ANSWER], [other])
    # Not where one of them does not, or has nothing else.
    row["rejected"] = [other]
    assert extract_prompt(row) == ([USER], [USER, ANSWER], [other])
    row["rejected"] = [USER]
    assert extract_prompt(row) == ([USER], [USER, ANSWER], [USER])


def test_tokenizer_without_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    row = tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, 10)
    assert None not in row["chosen_input_ids"]


def test_rows_without_an_answer_are_kept_and_counted_once(caplog: Any) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "word " * n, "chosen": "yes", "rejected": "no"} for n in (1, 2, 90, 95)]
    with caplog.at_level(logging.WARNING):
        data = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=32, name="my data")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "2 of 4 rows of my data have no answer token" in messages[0]
    assert len(data) == 4
    assert len(data[3]["chosen_input_ids"]) == 32
    assert set(data[3]["chosen_labels"]) == {-100}


def test_tools_column_is_named_as_ignored(caplog: Any) -> None:
    rows = [{**row, "tools": ["t"]} for row in text_rows(2)]
    with caplog.at_level(logging.WARNING):
        prepare_dataset(Dataset.from_list(rows), tiny_tokenizer())
    assert "column 'tools'" in caplog.text


def test_prepared_dataset_is_returned_as_it_is() -> None:
    rows = Dataset.from_list(text_rows(3))
    prepared = prepare_dataset(rows, tiny_tokenizer(), num_proc=2)
    assert prepare_dataset(prepared, tiny_tokenizer()) is prepared
    for row in prepared:
        assert row["length"] == max(len(row["chosen_labels"]), len(row["rejected_labels"]))


def test_stream() -> None:
    rows = random_rows("messages", 5, seed=0)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    prepared = prepare_dataset(stream, tiny_tokenizer(), max_length=50)
    assert list(prepared.select_columns(list(COLUMNS))) == [
        tokenize_pair(row, tiny_tokenizer(), 50) for row in rows
    ]


BAD_ROWS = {
    "rejected is of another kind": ({"chosen": [ANSWER], "rejected": "a"}, "one kind"),
    "number": ({"prompt": "q", "chosen": 3, "rejected": "a"}, "chosen must be text or a list"),
    "no messages": ({"chosen": [], "rejected": [ANSWER]}, "list that is empty"),
    "not messages": ({"chosen": ["a"], "rejected": ["b"]}, "got list of str"),
    "messages then text": (
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        "prompt holds messages but chosen and rejected are text",
    ),
    "nothing shared": (
        {"chosen": [USER, ANSWER], "rejected": [ANSWER]},
        "must begin with the same message",
    ),
    "system last": (
        {"prompt": [{"role": "system", "content": ""}], "chosen": [ANSWER], "rejected": [ANSWER]},
        "last message of the prompt must be from",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(name: str) -> None:
    row, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        tokenize_pair(row, tiny_tokenizer(), 10)


def test_bad_row_is_named_by_its_number() -> None:
    rows = [*text_rows(2), {"prompt": "p", "chosen": None, "rejected": "b"}]
    with pytest.raises(ValueError, match="row 2 of train_dataset: chosen must be text"):
        prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), name="train_dataset")


def test_no_chat_template() -> None:
    with pytest.raises(ValueError, match=r"need a chat template, but .* has none; set tokenizer"):
        render({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, merging_tokenizer())


def test_bad_dataset() -> None:
    tokenizer = tiny_tokenizer()
    rows = text_rows(2)
    with pytest.raises(TypeError, match=r"got list; Dataset.from_list"):
        prepare_dataset(rows, tokenizer)
    with pytest.raises(TypeError, match=r"got dict with the splits \['train'\]"):
        prepare_dataset({"train": Dataset.from_list(rows)}, tokenizer)
    with pytest.raises(ValueError, match="eval has no rows"):
        prepare_dataset(Dataset.from_list([]), tokenizer, name="eval")
    renamed = Dataset.from_list(rows).rename_column("rejected", "bad")
    with pytest.raises(ValueError, match=r"\['rejected'\] missing, got .*rename_column"):
        prepare_dataset(renamed, tokenizer)


def test_token_outside_the_vocabulary() -> None:
    rows = Dataset.from_list(text_rows(2))
    with pytest.raises(ValueError, match=r"vocabulary of 20, got .* tokenizer of \d+ tokens"):
        prepare_dataset(rows, tiny_tokenizer(), vocab_size=20)


def test_real_preference_file() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "preference_en.jsonl"
    if not path.exists():
        pytest.skip(f"real preference pairs not here: {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    # 512: the byte-level tokenizer makes long sequences, so that some rows have no answer left.
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=512)
    assert len(prepared) == len(rows) == 300
    prepared = prepared.select_columns(list(COLUMNS))
    for i in range(0, 300, 25):
        theirs = trl_row(rows[i], tokenizer, 512)
        assert prepared[i] == {column: theirs[column][:512] for column in COLUMNS}
