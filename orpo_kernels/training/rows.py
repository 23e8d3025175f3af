"""A row of preference data: what of it is the prompt, and what the two answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_kernels.training.nulls import without_filled_entries

_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_PROMPT_WORDS = frozenset({
    "prompt", "question", "instruction", "input", "query", "problem", "request", "user", "context",
    "history", "conversation", "dialogue", "dialog", "post",
})  # fmt: skip
_OTHER_WORDS = frozenset({
    "id", "hash", "length", "len", "tokens", "count", "score", "source", "type", "lang", "language",
    "name", "label",
})  # fmt: skip


class RowError(ValueError):
    """A row that cannot be used; the others may be."""


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a dataset are read.

    Args:
        prompt_column: column that holds the prompt, instead of `prompt`; several, all of text, are
            joined by line breaks, empty ones left out ("instruction", "input").
        system_column: column of text that goes in front of the prompt: as a system message in
            front of messages, with an empty line between in front of text.
        allow_missing_prompt: train on the answers alone where a row has no prompt.
        keep_nulls: keep the null entries of dictionaries in messages and `chat_template_kwargs`;
            see `without_filled_entries`.
        on_bad_row: "raise" for a row that cannot be used, or "skip" it and count.

    Raises:
        ValueError: another `on_bad_row`.
    """

    prompt_column: str | Sequence[str] | None = None
    system_column: str | None = None
    allow_missing_prompt: bool = False
    keep_nulls: bool = False
    on_bad_row: str = "raise"

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f'on_bad_row must be "raise" or "skip", got {self.on_bad_row!r}')

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns of the prompt; empty where no other than `prompt` was named."""
        named = self.prompt_column
        return (named,) if isinstance(named, str) else tuple(named or ())

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that were named."""
        return (*self.prompt_columns, *([self.system_column] if self.system_column else []))


def read_row(
    row: Mapping[str, Any], features: Mapping[str, Any] | None, options: RowOptions
) -> dict[str, Any]:
    """What a dataset's row was before Arrow had it.

    Args:
        row: as the dataset returns it.
        features: `Dataset.features`; None where a stream does not know them.
        options: of the rows.

    Returns:
        The columns and their values.
    """
    if options.keep_nulls:
        return dict(row)
    types = features or {}
    return {name: without_filled_entries(value, types.get(name)) for name, value in row.items()}


def extract_prompt(
    example: Mapping[str, Any], options: RowOptions | None = None
) -> tuple[Any, Any, Any]:
    """Split a row into prompt, chosen answer and rejected answer, all text or all messages.

    A prompt of the same kind as the answers is taken as it is; messages of it that both answers
    repeat in front, as full conversations do, count once. A prompt of text in front of
    messages that begin with the assistant's is the user's message. Otherwise the prompt is the
    common beginning of the two answers, which must then be full conversations (or texts); a
    `prompt` column of text beside conversations, as in mlabonne/orpo-dpo-mix-40k, is ignored.

    Unlike TRL, which trains on the answers alone, rows without a prompt are refused: text answers
    whose common beginning is blank, or does not hold the text of a column that looks like the
    prompt; and messages as prompt of text answers.

    Args:
        example: row with `chosen`, `rejected` and perhaps a prompt.
        options: which columns hold the prompt and the system's text.

    Returns:
        (prompt, chosen, rejected).

    Raises:
        RowError: a value that is neither text nor messages, kinds that do not go together,
            conversations that do not begin alike, no prompt.
    """
    options = options or RowOptions()
    chosen, rejected = example["chosen"], example["rejected"]
    kind = _kind("chosen", chosen)
    if _kind("rejected", rejected) != kind:
        raise RowError(
            f"chosen and rejected must be of one kind, got {kind} and {_kind('rejected', rejected)}"
        )
    named = " + ".join(options.prompt_columns) or "prompt"
    prompt = _named_prompt(example, options)
    if kind == "text":
        parts = _split_texts(named, prompt, example, options)
    else:
        parts = _split_messages(named, prompt, example, options)
    return _with_system(parts, example, options)


def looks_like_system(column: str) -> bool:
    """Whether a column has the name that datasets give to a system message's text."""
    return column.lower() in _SYSTEM_NAMES


def common_length(*sequences: Sequence[Any]) -> int:
    """Length of the common beginning of all sequences.

    Args:
        *sequences: at least one; of text, ids or messages.

    Returns:
        How many items from the first on are equal in all of them.
    """
    shortest = min(len(sequence) for sequence in sequences)
    for i in range(shortest):
        if any(sequence[i] != sequences[0][i] for sequence in sequences):
            return i
    return shortest


def _named_prompt(example: Mapping[str, Any], options: RowOptions) -> Any:
    """The value of the prompt's column; None if there is none."""
    columns = options.prompt_columns or ("prompt",)
    if len(columns) == 1:
        return example.get(columns[0])
    values = [example[column] for column in columns if not _is_blank(example.get(column))]
    for value in values:
        if not isinstance(value, str):
            raise RowError(
                f"several prompt columns must all be text, got {type(value).__name__} in one of "
                f"{list(columns)}; name a single prompt_column"
            )
    return "\n".join(values)


def _split_texts(
    named: str, prompt: Any, example: Mapping[str, Any], options: RowOptions
) -> tuple[Any, Any, Any]:
    chosen, rejected = example["chosen"], example["rejected"]
    if not _is_blank(prompt):
        if _kind(named, prompt) == "messages":
            raise RowError(
                f"{named} holds messages but chosen and rejected are text; give the answers as "
                "messages too, [{'role': 'assistant', 'content': ...}]"
            )
        return prompt, chosen, rejected
    length = 0
    if options.prompt_columns or "prompt" in example:
        problem = f"{named} is empty"
    else:
        length = _implied_prompt_length(chosen, rejected)
        prompt, problem = chosen[:length], "chosen and rejected do not begin alike"
        if not _is_blank(prompt):
            problem = f"what chosen and rejected share, {_short(prompt)}, is not all of it"
    unused = _prompt_like(example, options, known=prompt or "")
    if not options.allow_missing_prompt and (unused or _is_blank(prompt)):
        raise RowError(f"the row has no prompt: {problem}; {_prompt_remedy(unused, example)}")
    return prompt or "", chosen[length:], rejected[length:]


def _split_messages(
    named: str, prompt: Any, example: Mapping[str, Any], options: RowOptions
) -> tuple[Any, Any, Any]:
    chosen, rejected = example["chosen"], example["rejected"]
    if not _is_blank(prompt) and _kind(named, prompt) == "messages":
        length = common_length(prompt, chosen, rejected)
        is_repeated = length == len(prompt) < min(len(chosen), len(rejected))
        start = length if is_repeated else 0
        return prompt, chosen[start:], rejected[start:]
    if not _is_blank(prompt) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    length = _implied_prompt_length(chosen, rejected)
    if length == 0:
        unused = _prompt_like(example, options)
        raise RowError(
            "without a prompt, chosen and rejected must begin with the same message, got "
            f"{_short(chosen[0])} and {_short(rejected[0])}; {_prompt_remedy(unused, example)}"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _with_system(
    parts: tuple[Any, Any, Any], example: Mapping[str, Any], options: RowOptions
) -> tuple[Any, Any, Any]:
    column = options.system_column
    system = None if column is None else example.get(column)
    if _is_blank(system):
        return parts
    if not isinstance(system, str):
        raise RowError(f"system_column {column!r} must hold text, got {type(system).__name__}")
    prompt, *answers = parts
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}", answers[0], answers[1]
    if prompt[0]["role"] == "system":
        if prompt[0].get("content") == system:
            return parts
        raise RowError(
            f"the messages begin with a system message already, {_short(prompt[0])}, and "
            f"{column!r} holds another text; leave system_column out"
        )
    return [{"role": "system", "content": system}, *prompt], answers[0], answers[1]


def _prompt_like(example: Mapping[str, Any], options: RowOptions, known: str = "") -> list[str]:
    """Columns that nothing uses, named as prompts are, whose text or messages `known` has not."""
    used = ("prompt", "chosen", "rejected", *options.columns)
    found = []
    for column, value in example.items():
        words = set(re.split(r"[^a-z]+", column.lower()))
        words |= {word.removesuffix("s") for word in words}
        named = looks_like_system(column) or (words & _PROMPT_WORDS and not words & _OTHER_WORDS)
        if isinstance(value, str):
            unknown = value.strip() not in known
        else:
            unknown = _are_messages(value)
        if named and unknown and column not in used:
            found.append(column)
    return found


def _prompt_remedy(columns: Sequence[str], example: Iterable[str]) -> str:
    prompts = [column for column in columns if not looks_like_system(column)]
    systems = [column for column in columns if looks_like_system(column)]
    wanted = [f"system_column={column!r}" for column in systems[:1]]
    if prompts:
        wanted.insert(0, f"prompt_column={(prompts[0] if len(prompts) == 1 else prompts)!r}")
    elif not systems:
        others = [each for each in example if each not in ("prompt", "chosen", "rejected")]
        wanted = [f"prompt_column to the column that holds it, of {others}"] if others else []
    remedy = f"set {' and '.join(wanted)}" if wanted else "give it one"
    return f"{remedy}, or set allow_missing_prompt=True to train without it"


def _implied_prompt_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    length = common_length(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        # One continues the other, or they are equal: what they share last is left to the answers.
        return max(length - 1, 0)
    # The space before an answer belongs to it: " blue" is one token.
    return length - 1 if length > 0 and chosen[length - 1] == " " else length


def _kind(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if _are_messages(value):
        return "messages"
    received = type(value).__name__
    if isinstance(value, Sequence):
        received += f" of {type(value[0]).__name__}" if value else " that is empty"
        if value and isinstance(value[0], Mapping):
            received += f" with the keys {list(value[0])}"
    raise RowError(
        f"{name} must be text or a list of messages {{'role': ..., 'content': ...}}, got {received}"
    )


def _are_messages(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
