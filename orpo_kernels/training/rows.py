"""A row of preference data: what of it is the prompt, and what the two answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_kernels.training.nulls import without_filled_entries


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a dataset are read.

    Args:
        keep_nulls: keep the null entries of dictionaries in messages and `chat_template_kwargs`;
            see `without_filled_entries`.
    """

    keep_nulls: bool = False


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


def extract_prompt(example: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Split a row into prompt, chosen answer and rejected answer, all text or all messages.

    A prompt of the same kind as the answers is taken as it is. Otherwise the prompt is the common
    beginning of the two answers, which must then be full conversations (or texts); a `prompt`
    column of text beside conversations, as in mlabonne/orpo-dpo-mix-40k, is ignored. Unlike TRL,
    messages as prompt of text answers are refused: TRL drops that prompt.

    Args:
        example: row with `chosen`, `rejected` and perhaps `prompt`.

    Returns:
        (prompt, chosen, rejected).

    Raises:
        ValueError: a value that is neither text nor messages, kinds that do not go together, or
            conversations that do not begin alike.
    """
    chosen, rejected, prompt = example["chosen"], example["rejected"], example.get("prompt")
    kind = _kind("chosen", chosen)
    if _kind("rejected", rejected) != kind:
        raise ValueError(
            f"chosen and rejected must be of one kind, got {kind} and {_kind('rejected', rejected)}"
        )
    if prompt is not None:
        prompt_kind = _kind("prompt", prompt)
        if prompt_kind == kind:
            return prompt, chosen, rejected
        if prompt_kind == "messages":
            raise ValueError(
                "prompt holds messages but chosen and rejected are text; give the answers as "
                "messages too, [{'role': 'assistant', 'content': ...}]"
            )
    length = _implied_prompt_length(chosen, rejected)
    if kind == "messages" and length == 0:
        raise ValueError(
            "without a prompt, chosen and rejected must begin with the same message, got "
            f"{chosen[0]!r} and {rejected[0]!r}; add a prompt column, or the full conversations"
        )
    return chosen[:length], chosen[length:], rejected[length:]


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
    if isinstance(value, Sequence) and value and all(_is_message(item) for item in value):
        return "messages"
    received = type(value).__name__
    if isinstance(value, Sequence):
        received += f" of {type(value[0]).__name__}" if value else " that is empty"
    raise ValueError(
        f"{name} must be text or a list of messages {{'role': ..., 'content': ...}}, got {received}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value
