"""From messages to text: a row's prompt and answers through the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo_kernels.training.rows import RowOptions, common_length, extract_prompt


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
        ValueError: as `extract_prompt`; messages without a chat template; a prompt that ends
            with neither user, tool nor assistant.
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
        raise ValueError(
            "the last message of the prompt must be from 'user', 'tool' or 'assistant', got "
            f"{role!r}; move it before the user's message"
        )
    keywords = {"tokenize": False, **(example.get("chat_template_kwargs") or {})}
    template = processing_class.apply_chat_template
    opening = template(
        list(prompt),
        add_generation_prompt=role != "assistant",
        continue_final_message=role == "assistant",
        **keywords,
    )
    full = [template([*prompt, *answer], **keywords) for answer in (chosen, rejected)]
    shared = common_length(opening, *full)
    return opening[:shared], full[0][shared:], full[1][shared:]
