# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""The prompt format of C3 models: marker tokens, chat template, and the escape that keeps user text plain.

One of the remote-code files of every C3 repository on the Hub.
"""

import json
import re
from bisect import bisect_left

from tokenizers import normalizers


CONTEXT_START_TOKEN = "<img>"
CONTEXT_END_TOKEN = "</img>"
CONTEXT_TOKEN = "<imgpad>"
INLINE_CONTEXT_START_TOKEN = "<|extra_203|>"
INLINE_CONTEXT_END_TOKEN = "<|extra_204|>"
TURN_TOKEN = "<|im_start|>"
STOP_TOKEN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

# The special strings of the released vocabulary in the order of their ids, behind all words: 151643 to 151859 there.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_TOKEN,
    STOP_TOKEN,
    *(f"<|extra_{index}|>" for index in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    CONTEXT_START_TOKEN,
    CONTEXT_END_TOKEN,
    CONTEXT_TOKEN,
)
# Its pre-tokenisation (tokenization_qwen.py of Qwen/Qwen-7B): digits one by one, words with one leading character.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A noncharacter of Unicode. Behind the first character of a special token's string it keeps the string from being
# read as that token; the tokenizer's normalizer takes it out again. Special tokens are matched before normalisation.
ESCAPE = "\ufdd0"

# The original's prompt, to the letter (run_c3.py of the release): a system line, no newline between turns.
DEFAULT_SYSTEM_PROMPT = "You should follow the instructions carefully and explain your answers in detail."
RESTORE_PROMPT = "Repeat the text: "

# With `context_block` (the processor gives it) a context becomes a block of placeholders. Without it, as in the stock
# text-generation pipeline, a part that says how many blocks of how many latents it takes becomes those; any other's
# text stands in line between two markers and generate() cuts it out.
_CHAT_TEMPLATE = """

{%- macro plain(text) -%}
{%- set ns = namespace(text=text) -%}
{%- for first in ESCAPED -%}{%- set ns.text = ns.text | replace(first, first ~ 'ESCAPE') -%}{%- endfor -%}
{{- ns.text -}}
{%- endmacro -%}
{%- macro context(part) -%}
{%- if context_block is defined -%}{{- context_block * (part.num_blocks | default(1)) -}}
{%- elif part.num_blocks is defined -%}
{{- ('BLOCK_START' ~ 'BLOCK_PAD' * part.num_latents ~ 'BLOCK_END') * part.num_blocks -}}
{%- else -%}{{- 'INLINE_START' -}}{{- plain(part.text) -}}{{- 'INLINE_END' -}}{%- endif -%}
{{- '\\n' -}}
{%- endmacro -%}
{%- set state = namespace(documents=documents or []) -%}
{%- if messages[0].role != 'system' -%}
{{- 'TURNsystem\\nSYSTEM_PROMPTSTOP' -}}
{%- endif -%}
{%- for message in messages -%}
{{- 'TURN' ~ plain(message.role) ~ '\\n' -}}
{%- if message.role == 'user' -%}
{%- for document in state.documents -%}
{%- if document.title -%}{{- plain(document.title) ~ '\\n' -}}{%- endif -%}
{{- context(document) -}}
{%- endfor -%}
{%- set state.documents = [] -%}
{%- endif -%}
{%- if message.content is string -%}{{- plain(message.content) -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'context' -%}{{- context(part) -}}
{%- else -%}{{- plain(part.text) -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- 'STOP' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'TURNassistant\\n' -}}{%- endif -%}
"""


def build_chat_template(escaped: list[str]) -> str:
    """
    The chat template: the original's prompt, with the escape put behind every character of `escaped` in user text.

    Args:
        escaped (`list[str]`): what [`escape_characters`] returned for the tokenizer.
    """
    values = {
        "TURN": TURN_TOKEN,
        "STOP": STOP_TOKEN,
        "SYSTEM_PROMPT": DEFAULT_SYSTEM_PROMPT,
        "BLOCK_START": CONTEXT_START_TOKEN,
        "BLOCK_PAD": CONTEXT_TOKEN,
        "BLOCK_END": CONTEXT_END_TOKEN,
        "INLINE_START": INLINE_CONTEXT_START_TOKEN,
        "INLINE_END": INLINE_CONTEXT_END_TOKEN,
        "ESCAPED": json.dumps(escaped),
        "ESCAPE": json.dumps(ESCAPE)[1:-1],
    }
    template = _CHAT_TEMPLATE
    for name, value in values.items():
        template = template.replace(name, value)
    return template


def escape_characters(tokenizer) -> list[str]:
    """First characters of the strings of all added tokens of a tokenizer, sorted: where an escape can be needed."""
    return sorted({token.content[0] for token in tokenizer.added_tokens_decoder.values()})


def reads_escapes(tokenizer) -> bool:
    """Whether the tokenizer takes the escape out again, behind every character where it can be needed."""
    return all(
        tokenizer(first + ESCAPE, add_special_tokens=False)["input_ids"]
        == tokenizer(first, add_special_tokens=False)["input_ids"]
        for first in escape_characters(tokenizer)
    )


def encode_plain(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """
    Ids of plain text, in which special strings and escapes are ordinary characters.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of either half of a model.
        text (`str`): without lone surrogates, which have no UTF-8 form.

    Returns:
        The ids, and for each the first character of `text` that it stands for and the one behind the last; a slow
        tokenizer does not know those, its list is empty.
    """
    inserted = []
    if ESCAPE in text and reads_escapes(tokenizer):
        # The normalizer takes one escape out, so it gets one more.
        firsts = "".join(map(re.escape, escape_characters(tokenizer)))
        found = re.finditer(f"[{firsts}]{ESCAPE}", text) if firsts else ()
        inserted = [match.start() + 1 + count for count, match in enumerate(found)]
        text = re.sub(f"([{firsts}]){ESCAPE}", rf"\1{ESCAPE}{ESCAPE}", text) if inserted else text
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = encoding.get("offset_mapping", [])
    if inserted:
        offsets = [tuple(place - bisect_left(inserted, place) for place in span) for span in offsets]
    return encoding["input_ids"], offsets


def install_escapes(tokenizer) -> None:
    """
    Teach a fast tokenizer to take the escape out, and give it a chat template that puts it in.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): changed in place. Its special tokens are complete; the tokens of the
            chat template are among them.

    Raises:
        TypeError: if the tokenizer is not backed by the `tokenizers` library.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}. Convert it to a tokenizer.json."
        )
    characters = escape_characters(tokenizer)
    if not reads_escapes(tokenizer):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Replace(first + ESCAPE, first) for first in characters]
        backend.normalizer = normalizers.Sequence(steps + ([backend.normalizer] if backend.normalizer else []))
    tokenizer.chat_template = build_chat_template(characters)
    # generate() takes no token types; a bare fast tokenizer returns them under transformers 4.57.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]


DEFAULT_CHAT_TEMPLATE = build_chat_template(["<"])
