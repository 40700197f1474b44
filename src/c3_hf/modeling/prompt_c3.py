# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""The prompt format of C3 models: marker tokens, chat template, the escape that keeps user text plain, and reading.

One of the remote-code files of every C3 repository on the Hub.
"""

import copy
import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Optional

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
# transformers writes a huge number where a tokenizer has no longest input.
_NO_MAX_LENGTH = 10**20
_SURROGATE = re.compile("[\ud800-\udfff]")

# The original's prompt, to the letter (run_c3.py of the release): a system line, no newline between turns.
DEFAULT_SYSTEM_PROMPT = "You should follow the instructions carefully and explain your answers in detail."
RESTORE_PROMPT = "Repeat the text: "

# How the chat template gives out user text with its escapes; conversion puts a filter behind it.
PLAIN_OUTPUT = "{{- ns.text -}}"
# With `context_block` (the processor gives it) a context becomes a block of placeholders. Without it, as in the stock
# text-generation pipeline, a part that says how many blocks of how many latents it takes becomes those; any other's
# text stands in line between two markers and generate() cuts it out.
_CHAT_TEMPLATE = """

{%- macro plain(text) -%}
{%- set ns = namespace(text=text) -%}
{%- for first in ESCAPED -%}{%- set ns.text = ns.text | replace(first, first ~ 'ESCAPE') -%}{%- endfor -%}
PLAIN_OUTPUT
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
        "PLAIN_OUTPUT": PLAIN_OUTPUT,
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
    """Whether the tokenizer takes the escape out again, behind every character where it can be needed, and too late
    for what is left to be read as a special token."""
    # By the backend, because a call of the tokenizer sets things in it.
    read = tokenizer.backend_tokenizer.encode
    return not any(token.normalized for token in tokenizer.added_tokens_decoder.values() if token.special) and all(
        read(first + ESCAPE, add_special_tokens=False).ids == read(first, add_special_tokens=False).ids
        for first in escape_characters(tokenizer)
    )


def _check_fast(tokenizer):
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}. Convert it to a tokenizer.json."
        )


def escape(text: str, first_characters: list[str]) -> str:
    """The markup read as exactly `text`: the escape behind each of the characters that [`escape_characters`] gave."""
    for first in first_characters:
        text = text.replace(first, first + ESCAPE)
    return text


class TokenReader:
    """
    Reads text with a fast tokenizer, from any number of threads at once, and leaves the tokenizer as it is.

    A fast tokenizer of transformers keeps padding, truncation and whether special strings count in its backend and
    sets them at each call: two threads set them under each other's hands, and get wrong ids or "Already borrowed".
    This reads with copies of the backend that nothing sets again. Tokens added to the tokenizer later are seen.

    Args:
        tokenizer (`PreTrainedTokenizerFast`).

    Raises:
        TypeError: if the tokenizer is not backed by the `tokenizers` library.
    """

    def __init__(self, tokenizer):
        _check_fast(tokenizer)
        self.tokenizer = tokenizer
        self._copies = {}

    def __reduce__(self):
        return TokenReader, (self.tokenizer,)

    def read_markup(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, in which special strings count; nothing is added, padded or cut."""
        return [encoding.ids for encoding in self._read(texts, plain=False)]

    def read_plain(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """
        Token ids of each text, in which nothing is special, and where in the text each token stands.

        Returns:
            For each text `(ids, offsets)`; an offset is the first character of a token and the one behind its last.
        """
        firsts = self._copy(plain=True)[1]
        escaped = [escape(text, firsts) for text in texts]
        return [
            (
                encoding.ids,
                encoding.offsets if text == markup else _offsets_without_escapes(encoding.offsets, text, firsts),
            )
            for text, markup, encoding in zip(texts, escaped, self._read(escaped, plain=True))
        ]

    def _read(self, texts, plain):
        for row, text in enumerate(texts):
            lone = _SURROGATE.search(text)
            if lone is not None:
                raise ValueError(
                    f"text {row} has the lone surrogate U+{ord(lone.group()):04X}, which is no character; expected "
                    "valid Unicode. Replace it, for example by U+FFFD."
                )
        # An empty batch is an error in tokenizers.
        return self._copy(plain)[0].encode_batch(list(texts), add_special_tokens=False) if texts else []

    def _copy(self, plain):
        """The backend that reads plain text or markup, and the characters to escape for it; the same until a token is
        added to the tokenizer."""
        backend = self.tokenizer.backend_tokenizer
        state = (id(backend), len(backend.get_added_tokens_decoder()))
        if self._copies.get(plain, (None,))[0] != state:
            private = copy.deepcopy(backend)
            private.no_padding()
            private.no_truncation()
            private.encode_special_tokens = plain
            firsts = escape_characters(self.tokenizer) if reads_escapes(self.tokenizer) else []
            # One assignment: a thread that comes in between makes the same once more.
            self._copies[plain] = (state, private, firsts)
        return self._copies[plain][1:]


def as_reader(tokenizer) -> TokenReader:
    """A reader of the tokenizer; a reader is returned as it is, since to make one copies the whole vocabulary."""
    return tokenizer if isinstance(tokenizer, TokenReader) else TokenReader(tokenizer)


def _offsets_without_escapes(offsets, text, firsts):
    """Offsets in the escaped text to offsets in the text."""
    found = re.finditer("|".join(map(re.escape, firsts)), text) if firsts else ()
    escapes = [match.end() + index for index, match in enumerate(found)]
    if not escapes:
        return offsets
    # The normalizer gives a character whose escape it takes out the escape's own place.
    return [(start - bisect_right(escapes, start), end - bisect_left(escapes, end)) for start, end in offsets]


# Options of a tokenizer that would be wrong for a prompt, or mean nothing, and why.
_REFUSED_OPTIONS = {
    "add_special_tokens": "the markup holds every special token there is to be",
    "is_split_into_words": "a prompt is one string",
    "return_assistant_tokens_mask": "the collator of c3_hf.data makes labels",
    "return_length": "the attention mask says it",
    "return_offsets_mapping": "offsets would count the escapes of the markup",
    "return_overflowing_tokens": "a prompt cannot be cut into several",
    "return_special_tokens_mask": "compare `input_ids` with the ids of the special tokens",
    "return_token_type_ids": "the model takes none",
    "sanitize_control_tokens": "user text is kept plain anyhow",
    "split_special_tokens": "special strings of the markup count; user text goes through `escape`",
    "stride": "a prompt cannot be cut into several",
    "text_pair": "a prompt is one string",
}
# Those that are honoured, beside `padding`, `truncation` and `return_tensors`.
PROMPT_OPTIONS = ("max_length", "padding_side", "pad_to_multiple_of", "return_attention_mask")
TOKENIZER_OPTIONS = (*PROMPT_OPTIONS, *_REFUSED_OPTIONS, "verbose")


@dataclass(frozen=True)
class PromptOptions:
    """
    What was asked of the tokenizer for the prompts, checked.

    padding (`str`): `"longest"`, `"max_length"` or `"do_not_pad"`.
    truncation (`bool`): whether prompts are cut to `max_length`.
    max_length (`int`): tokens; 0 where it plays no part.
    left (`bool`): whether padding goes in front.
    multiple (`int`): the padded length is a multiple of it.
    return_tensors (`str`, *optional*): `"pt"`, `"np"` or `None`.
    return_attention_mask (`bool`).
    """

    padding: str
    truncation: bool
    max_length: int
    left: bool
    multiple: int
    return_tensors: Optional[str]
    return_attention_mask: bool

    def padded_length(self, longest: int) -> int:
        """Tokens of a batch whose longest prompt has `longest`."""
        length = max(longest, self.max_length) if self.padding == "max_length" else longest
        return -(-length // self.multiple) * self.multiple


def check_prompt_options(tokenizer, padding, truncation, return_tensors, options) -> PromptOptions:
    """
    The options of a call as [`PromptOptions`].

    Args:
        tokenizer (`PreTrainedTokenizerFast`): says `padding_side` and `model_max_length` where they are not given.
        padding, truncation, return_tensors: as in a tokenizer's call.
        options (`dict`): the others; those that ask for nothing (`None` or `False`) are passed over.

    Raises:
        ValueError: if an option has no meaning here, or a value that it cannot have.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name in _REFUSED_OPTIONS and value is not False:
            raise ValueError(f"`{name}`={value!r} cannot be had from a C3Processor: {_REFUSED_OPTIONS[name]}.")
        if name not in TOKENIZER_OPTIONS:
            raise ValueError(
                f"`{name}` is no option of a C3Processor; it takes `padding`, `truncation`, `return_tensors`, "
                f"{', '.join(f'`{option}`' for option in PROMPT_OPTIONS)}."
            )
    # Each may be an enumeration of transformers, or the value of it.
    strategy, cut, tensors = (getattr(each, "value", each) for each in (padding, truncation, return_tensors))
    strategy = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(strategy, strategy)
    cut = {None: False, "do_not_truncate": False, "longest_first": True, "only_first": True}.get(cut, cut)
    side = options.get("padding_side", tokenizer.padding_side)
    _check_choice("padding", strategy, ("longest", "max_length", "do_not_pad"))
    _check_choice("truncation", cut, (True, False))
    _check_choice("padding_side", side, ("left", "right"))
    _check_choice("return_tensors", tensors, ("pt", "np", None))
    multiple, max_length = options.get("pad_to_multiple_of", 1), options.get("max_length")
    for name, value in (("pad_to_multiple_of", multiple), ("max_length", 1 if max_length is None else max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive int, got {value!r}.")
    needed = cut or strategy == "max_length"
    if max_length is not None and not needed:
        raise ValueError(
            f'`max_length`={max_length} does nothing by itself: add `truncation=True`, or `padding="max_length"`.'
        )
    if needed and max_length is None:
        max_length = tokenizer.model_max_length
        if max_length > _NO_MAX_LENGTH:
            raise ValueError("`max_length` must be given: the tokenizer states no `model_max_length`.")
    with_mask = options.get("return_attention_mask", True)
    return PromptOptions(strategy, cut, max_length or 0, side == "left", multiple, tensors, with_mask)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def install_escapes(tokenizer) -> None:
    """
    Teach a fast tokenizer to take the escape out, and give it a chat template that puts it in.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): changed in place. Its special tokens are complete; the tokens of the
            chat template are among them.

    Raises:
        TypeError: if the tokenizer is not backed by the `tokenizers` library.
    """
    _check_fast(tokenizer)
    backend, characters = tokenizer.backend_tokenizer, escape_characters(tokenizer)
    if not reads_escapes(tokenizer):
        if any(token.special and token.normalized for token in tokenizer.added_tokens_decoder.values()):
            state = json.loads(backend.to_str())
            for token in state["added_tokens"]:
                # Else it is looked for in the normalised text, where no escape is left (GPT-2's `<|endoftext|>`).
                token["normalized"] = token["normalized"] and not token["special"]
            backend.__setstate__(json.dumps(state).encode())
        steps = [normalizers.Replace(first + ESCAPE, first) for first in characters]
        backend.normalizer = normalizers.Sequence(steps + ([backend.normalizer] if backend.normalizer else []))
    tokenizer.chat_template = build_chat_template(characters)
    # generate() takes no token types; a bare fast tokenizer returns them under transformers 4.57.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]


DEFAULT_CHAT_TEMPLATE = build_chat_template(["<"])
