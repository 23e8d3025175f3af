"""From messages to text: a row's prompt and answers through the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from orpo_kernels.training.rows import RowError, RowOptions, common_length, extract_prompt

_LONGEST_REASON = 240  # characters of an error; transformers' may hold a whole conversation


def render(
    example: Mapping[str, Any], processing_class: Any, options: RowOptions | None = None
) -> tuple[str, str, str]:
    """The three texts of a row: messages go through the chat template.

    The prompt's text ends with the template's generation prompt (or is left open, when its last
    message is the assistant's); what the two full conversations do not share is given to the
    answers.

    Args:
        example: row as in `extract_prompt`; `chat_template_kwargs`, a dictionary, is passed on.
        processing_class: tokenizer or processor whose chat template is used.
        options: which columns hold the prompt.

    Returns:
        (prompt, chosen, rejected) text.

    Raises:
        ValueError: messages without a chat template.
        RowError: as `extract_prompt`; a prompt that ends with neither user, tool nor assistant; a
            message without content; any failure of the template, with the roles it was given.
    """
    prompt, chosen, rejected = extract_prompt(example, options)
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    if getattr(processing_class, "chat_template", None) is None:
        raise ValueError(
            "the rows hold messages, which need a chat template, but "
            f"{type(processing_class).__name__} has none; set tokenizer.chat_template, take the "
            "tokenizer of a chat model, or give prompt, chosen and rejected as text"
        )
    role = prompt[-1].get("role")
    if role not in ("user", "tool", "assistant"):
        raise RowError(
            "the last message of the prompt must be from 'user', 'tool' or 'assistant', got "
            f"{role!r}; move it before the user's message"
        )
    conversations = [[*prompt, *answer] for answer in (chosen, rejected)]
    for conversation in conversations:
        _check_contents(conversation)
    keywords = example.get("chat_template_kwargs") or {}
    if not isinstance(keywords, Mapping):
        raise RowError(
            f"chat_template_kwargs must be a dictionary, got {type(keywords).__name__}; "
            "e.g. {'tools': [...]}"
        )
    is_open = role == "assistant"
    ending = {"add_generation_prompt": not is_open, "continue_final_message": is_open}
    opening = _apply(processing_class, list(prompt), {**keywords, **ending})
    full = [_apply(processing_class, each, keywords) for each in conversations]
    shared = common_length(opening, *full)
    return opening[:shared], full[0][shared:], full[1][shared:]


def _apply(
    processing_class: Any, messages: list[Mapping[str, Any]], keywords: Mapping[str, Any]
) -> str:
    try:
        template = processing_class.apply_chat_template
        text: str = template(messages, **{**keywords, "tokenize": False})
    except Exception as error:  # templates raise whatever Jinja, Python and their authors do
        raise RowError(
            f"the chat template refuses the messages, roles {_roles(messages)}: "
            f"{_one_line(error)}; {_remedy(messages)}"
        ) from error
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str | None) and str(content) in text:
            raise RowError(
                f"the chat template writes the content of message {i}, roles {_roles(messages)}, "
                f"as a Python {type(content).__name__}; {_remedy(messages)}"
            )
    return text


def _check_contents(messages: Sequence[Mapping[str, Any]]) -> None:
    """Most templates write "None", or nothing, for a content that is not there."""
    for i, message in enumerate(messages):
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise RowError(
                f"message {i}, roles {_roles(messages)}, must have a content, got the keys "
                f"{[key for key, value in message.items() if value is not None]}; give it a text, "
                "or leave it out"
            )
        if not isinstance(content, str | list | None):
            raise RowError(
                f"the content of message {i}, roles {_roles(messages)}, must be text, got "
                f"{type(content).__name__}"
            )


def _remedy(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [message.get("role") for message in messages]
    ways = []
    if any(isinstance(message.get("content"), list) for message in messages):
        ways.append("join the parts of a content to one text")
    if any(one == next_one for one, next_one in pairwise(roles)):
        ways.append("merge neighbouring messages of one role")
    if "system" in roles:
        ways.append("put the system message's text in front of the first user's")
    return ", or ".join([*ways, "set a chat_template that takes them"])


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    return f"({', '.join(str(message.get('role')) for message in messages)})"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_REASON:
        text = f"{text[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {text}"
