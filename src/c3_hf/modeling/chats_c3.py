# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""Chats as people write them: checked, and their contexts taken out for the model.

One of the remote-code files of every C3 repository on the Hub.
"""

import torch

from .prompt_c3 import STOP_TOKEN


def as_chats(conversation):
    """
    The chats of a call, and whether it was a single one.

    Args:
        conversation (`list[dict]` or `list[list[dict]]`).

    Raises:
        ValueError: if it is neither, or a message has no role.
    """
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(
            "`conversation` must be a list of messages such as {'role': 'user', 'content': 'Hello'}, or a list of "
            f"such lists, got {type(conversation).__name__}."
        )
    single = bool(conversation) and isinstance(conversation[0], dict)
    chats = [conversation] if single else list(conversation)
    for chat in chats:
        if not isinstance(chat, (list, tuple)) or not chat:
            raise ValueError(f"`conversation` holds {chat!r} in the place of a chat, expected a list of messages.")
        for message in chat:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message must be a dict with `content` and a string as `role`, got {message!r}.")
    return chats, single


def take_contexts(chat, documents, num_latents):
    """
    Take the contexts out of a chat.

    Args:
        chat (`list[dict]`): messages, see `C3Processor.apply_chat_template`.
        documents (`list[dict]`, *optional*): their contexts come first in the first user message.
        num_latents (`int`): the model's.

    Returns:
        The chat with each context part reduced to what the template needs, and the contexts in prompt order: for each
        its text, its latents `(num_latents, text_hidden_size)`, or `None` for a mere place.

    Raises:
        ValueError: if a message, part or document has no known form, or documents have no user message to stand in.
    """
    contexts, messages, pending = [], [], _texts_of(documents)
    for message in chat:
        if message["role"] == "user":
            contexts += pending
            pending = []
        content = message.get("content")
        if isinstance(content, str):
            messages.append(message)
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"`content` of a message must be a string or a list of parts, got {content!r}.")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "context"):
                raise ValueError(
                    f'a part of a message must be a dict whose `type` is "text" or "context", got {part!r}.'
                )
            if kind == "context":
                part, found = _take_context(part, num_latents)
                contexts += found
            else:
                _check_text("a text part", part.get("text"))
            parts.append(part)
        messages.append({**message, "content": parts})
    if pending:
        raise ValueError("`documents` stand in the first user message, and the chat has none. Add one.")
    return messages, contexts


def _texts_of(documents):
    for document in documents or []:
        if not isinstance(document, dict):
            raise ValueError(
                f"`documents` must be dicts with `text` and perhaps `title`, got a {type(document).__name__}."
            )
        _check_text("a document", document.get("text"))
    return [document["text"] for document in documents or []]


def _check_text(what, text):
    if not isinstance(text, str):
        raise ValueError(f"`text` of {what} must be a string, got {text!r}.")


def _take_context(part, num_latents):
    given = [name for name in ("text", "latents", "num_blocks") if part.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            "a context part must have exactly one of `text`, `latents` and `num_blocks`, got "
            f"{' and '.join(given) or 'none'}. Latents stand for a text that is compressed already."
        )
    if given == ["text"]:
        _check_text("a context part", part["text"])
        return {"type": "context", "text": part["text"]}, [part["text"]]
    if given == ["num_blocks"]:
        count = part["num_blocks"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"`num_blocks` of a context part must be an int from 0 up, got {count!r}.")
        if part.get("num_latents", num_latents) != num_latents:
            raise ValueError(
                f"`num_latents` of a context part must be {num_latents}, the model's, got {part['num_latents']}. Its "
                "latents belong to another model."
            )
        return {"type": "context", "num_blocks": count}, [None] * count
    latents = part["latents"]
    if not isinstance(latents, torch.Tensor) or latents.dim() != 3 or latents.shape[1] != num_latents:
        raise ValueError(
            f"`latents` of a context part must have shape (num_blocks, {num_latents}, text_hidden_size), got "
            f"{tuple(latents.shape) if isinstance(latents, torch.Tensor) else f'a {type(latents).__name__}'}."
        )
    return {"type": "context", "text": "", "num_blocks": len(latents)}, list(latents)


def kind_of(context) -> str:
    """Of a context that [`take_contexts`] gave: how it came."""
    return "text" if isinstance(context, str) else "num_blocks" if context is None else "latents"


def reopen_last_turn(markup, add_generation_prompt):
    """The markup without the end of its last turn."""
    if add_generation_prompt:
        raise ValueError("`continue_final_message` and `add_generation_prompt` exclude each other. Give one of them.")
    if not markup.endswith(STOP_TOKEN):
        raise ValueError(
            f"`continue_final_message` needs a chat template that ends the last turn with {STOP_TOKEN!r}. Render with "
            "`tokenize=False` and cut the end off."
        )
    return markup[: -len(STOP_TOKEN)]
