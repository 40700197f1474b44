# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""Text in and text out for C3 models: the prompt format of the original, contexts, and user text kept plain.

This file is both a module of the package and one of the remote-code files of every C3 repository on the Hub.
"""

import re
from pathlib import Path
from typing import Optional, Union

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .chats_c3 import as_chats, kind_of, reopen_last_turn, take_contexts
from .positions_c3 import pad_contexts, pad_rows
from .prompt_c3 import (
    CONTEXT_END_TOKEN,
    CONTEXT_START_TOKEN,
    CONTEXT_TOKEN,
    DEFAULT_CHAT_TEMPLATE,
    INLINE_CONTEXT_END_TOKEN,
    INLINE_CONTEXT_START_TOKEN,
    RESTORE_PROMPT,
    STOP_TOKEN,
    TOKENIZER_OPTIONS,
    TURN_TOKEN,
    TokenReader,
    check_prompt_options,
    escape,
    escape_characters,
    reads_escapes,
)


class C3Processor(ProcessorMixin):
    r"""
    Makes the inputs of a [`C3ForConditionalGeneration`] from text and text from its outputs.

    Text that a user wrote, in a context, a message, a role or a document, never becomes a special token; only what
    the chat template (or the markup given to `__call__`) writes does.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): the decoder's tokenizer; contexts are read with it too, unless
            `encoder_tokenizer` is given. It must read escapes (see [`install_escapes`]).
        num_latents (`int`, defaults to 32): placeholders a context takes in the prompt, `config.num_latents`.
        encoder_tokenizer (`PreTrainedTokenizerBase`, *optional*): the context encoder's own tokenizer, for models
            whose two halves have different vocabularies.
        separate_encoder_vocabulary (`bool`, defaults to `False`): set by the saved file, so that `from_pretrained`
            knows to load `encoder_tokenizer`.
        chat_template (`str` or `dict[str, str]`, *optional*): defaults to the tokenizer's, else to the original's.
        prompts (`dict[str, str]`, *optional*): what the model was trained to be asked behind a context, saved with the
            processor. `"restore"` asks for the text back and is always there; `"find"` for the rest of a reply that
            begins with words of the text; `"ask"` stands in front of a free question.
        calibration (`dict[str, float]`, *optional*): how the model goes on behind an error in what it restores, saved
            with the processor: `derail`, its chance to lose the place, and `floor`, what is then still right, 0 to 1.

    Raises:
        ValueError: if `num_latents` is not positive, the tokenizer does not read escapes, or `prompts` holds anything
            but strings.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        num_latents=32,
        encoder_tokenizer=None,
        separate_encoder_vocabulary=False,
        chat_template=None,
        prompts=None,
        calibration=None,
        **kwargs,
    ):
        if isinstance(num_latents, bool) or not isinstance(num_latents, int) or num_latents < 1:
            raise ValueError(f"`num_latents` must be a positive int, the model's, got {num_latents!r}.")
        self._readers = {id(part): TokenReader(part) for part in (tokenizer, encoder_tokenizer) if part is not None}
        if not reads_escapes(tokenizer):
            raise ValueError(
                "`tokenizer` does not read escapes, so text such as '<|im_end|>' in a message would become a special "
                "token. Call install_escapes(tokenizer) of prompt_c3.py on it first."
            )
        prompts = {} if prompts is None else prompts
        if not isinstance(prompts, dict) or not all(
            isinstance(item, str) for pair in prompts.items() for item in pair
        ):
            raise ValueError(f"`prompts` must give a string for each name, such as 'restore', got {prompts!r}.")
        self.prompts = {"restore": RESTORE_PROMPT, **prompts}
        self.calibration = calibration
        self.num_latents = num_latents
        self.separate_encoder_vocabulary = separate_encoder_vocabulary or encoder_tokenizer is not None
        self._encoder_tokenizer = encoder_tokenizer
        chat_template = chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        tokenizer.chat_template = chat_template
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls):
        # transformers 5 takes every argument named like a tokenizer for a part that each folder holds; the encoder's
        # is optional and is loaded in from_pretrained.
        return ["tokenizer"]

    @property
    def encoder_tokenizer(self):
        """The tokenizer that contexts are read with."""
        return self._encoder_tokenizer or self.tokenizer

    @property
    def reader(self) -> TokenReader:
        """Reads prompts, and text in the decoder's vocabulary, from any thread; the tokenizer stays as it is."""
        return self._reader_of(self.tokenizer)

    @property
    def encoder_reader(self) -> TokenReader:
        """Reads contexts in the encoder's vocabulary; see [`reader`]."""
        return self._reader_of(self.encoder_tokenizer)

    def _reader_of(self, tokenizer):
        # Somebody may have put another tokenizer in the place of the one given on construction.
        reader = self._readers.get(id(tokenizer))
        if reader is None or reader.tokenizer is not tokenizer:
            reader = self._readers[id(tokenizer)] = TokenReader(tokenizer)
        return reader

    @property
    def context_block(self) -> str:
        """The markup of one context in a prompt: start marker, `num_latents` placeholders, end marker."""
        return CONTEXT_START_TOKEN + CONTEXT_TOKEN * self.num_latents + CONTEXT_END_TOKEN

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "context_input_ids", "context_attention_mask"]

    def escape(self, text: str) -> str:
        """The markup that the tokenizer reads as exactly `text`, special strings included."""
        return escape(text, escape_characters(self.tokenizer))

    def inline_context(self, context: str) -> str:
        """The markup of a context written in line, for the stock text-generation pipeline."""
        return INLINE_CONTEXT_START_TOKEN + self.escape(context) + INLINE_CONTEXT_END_TOKEN

    def restore_messages(self, context) -> list[dict]:
        """
        The chat that asks for a context back, word by word.

        Args:
            context (`str` or `torch.FloatTensor` of shape `(num_blocks, num_latents, text_hidden_size)`): the text, or
                its latents.

        Returns:
            `list[dict]`: one user message with a context part and `prompts["restore"]`, "Repeat the text: ".
        """
        key = "text" if isinstance(context, str) else "latents"
        content = [{"type": "context", key: context}, {"type": "text", "text": self.prompts["restore"]}]
        return [{"role": "user", "content": content}]

    def __call__(
        self, text=None, contexts=None, padding=True, truncation=False, return_tensors="pt", **kwargs
    ) -> BatchFeature:
        """
        Tokenize prompts and contexts.

        Args:
            text (`str` or `list[str]`): prompts as markup, in which special strings count: what
                `apply_chat_template(..., tokenize=False)` returns, or written by hand with [`escape`] around user
                text. `<imgpad>`, or the full block, stands for one context and becomes the full block.
            contexts (`str`, `list[str]` or `list[list[str]]`, *optional*): plain text. For one prompt: its context or
                contexts. For several: one for all, one each, or a list each.
            padding (`bool` or `str`, defaults to `True`): padding of the prompts, as a tokenizer takes it;
                contexts are always padded, right.
            truncation (`bool` or `str`, defaults to `False`): cut prompts to `max_length`, at the tokenizer's
                `truncation_side`.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for lists.
            kwargs: `max_length`, `padding_side`, `pad_to_multiple_of` and `return_attention_mask`, as a tokenizer
                takes them, for the prompts.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` `(batch_size, sequence_length)` and, with contexts,
            `context_input_ids` and `context_attention_mask` `(batch_size or 1, num_contexts, context_length)`, int64.

        Raises:
            TypeError: if `text` or `contexts` is not made of strings.
            ValueError: if there is no prompt, the numbers of prompts and contexts differ, a prompt's context markers
                do not match its contexts, truncation would cut a context, or another option of the tokenizer is
                asked for.
        """
        texts, rows = _as_texts(text), _as_rows(contexts, text)
        if rows is not None and len(rows) not in (1, len(texts)):
            raise ValueError(
                f"`contexts` has {len(rows)} rows for {len(texts)} prompts. Give one context (or list of contexts) a "
                "prompt, or a single string for all."
            )
        counts = [len(row) for row in rows] if rows is not None else [0]
        counts = counts * len(texts) if len(counts) == 1 else counts
        texts = [self._expand_markers(row, markup, count) for row, (markup, count) in enumerate(zip(texts, counts))]
        data = self._tokenize_prompts(texts, padding, truncation, return_tensors, **kwargs)
        if rows is not None and any(rows):
            ids, mask = self._tokenize_contexts(rows)
            data["context_input_ids"] = _as_tensors(ids, return_tensors)
            data["context_attention_mask"] = _as_tensors(mask, return_tensors)
        return BatchFeature(data)

    def _tokenize_prompts(self, texts, padding, truncation, return_tensors, **options):
        asked = check_prompt_options(self.tokenizer, padding, truncation, return_tensors, options)
        rows = self.reader.read_markup(texts)
        if asked.truncation:
            rows = [self._truncate(row, ids, asked.max_length) for row, ids in enumerate(rows)]
        length = asked.padded_length(max(map(len, rows)))
        if asked.padding == "do_not_pad" and asked.return_tensors is None:
            data = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
        elif asked.padding == "do_not_pad" and {len(ids) for ids in rows} != {length}:
            raise ValueError(
                f"`return_tensors`={asked.return_tensors!r} needs prompts of one length, got "
                f"{sorted({len(ids) for ids in rows})} tokens. Give `padding=True`, or `return_tensors=None`."
            )
        else:
            rows = [torch.tensor(ids, dtype=torch.long) for ids in rows]
            padded = pad_rows(rows, asked.left, length, self.tokenizer.pad_token_id or 0)
            ids, mask = (_as_tensors(tensor, asked.return_tensors) for tensor in padded)
            data = {"input_ids": ids, "attention_mask": mask}
        return data if asked.return_attention_mask else {"input_ids": data["input_ids"]}

    def _truncate(self, row, ids, max_length):
        """The first or last `max_length` ids; raise if context markers are among the others."""
        if len(ids) <= max_length:
            return ids
        left = self.tokenizer.truncation_side == "left"
        kept, cut = (ids[-max_length:], ids[:-max_length]) if left else (ids[:max_length], ids[max_length:])
        markers = [CONTEXT_START_TOKEN, CONTEXT_TOKEN, CONTEXT_END_TOKEN]
        if set(cut) & set(self.tokenizer.convert_tokens_to_ids(markers)):
            raise ValueError(
                f"`text` row {row} has {len(ids)} tokens, and cutting it to `max_length`={max_length} would cut a "
                "context off. Give a larger `max_length`, or shorten the text around the context."
            )
        return kept

    def _expand_markers(self, row, markup, num_contexts):
        """Turn every context marker into the full block; raise if they do not match the contexts."""
        start, end, pad = (re.escape(s) for s in (CONTEXT_START_TOKEN, CONTEXT_END_TOKEN, CONTEXT_TOKEN))
        marker = re.compile(f"{start}(?:{pad})*{end}|(?:{pad})+")
        found = marker.findall(markup)
        for block in found:
            length = block.count(CONTEXT_TOKEN)
            if length not in (1, self.num_latents):
                raise ValueError(
                    f"`text` row {row} has a context block of {length} placeholders, expected {self.num_latents} (the "
                    f"model's number of latents) or a single {CONTEXT_TOKEN!r}."
                )
        if len(found) != num_contexts:
            raise ValueError(
                f"`text` row {row} has {len(found)} context markers for {num_contexts} contexts. Write one "
                f"{CONTEXT_TOKEN!r} a context, or let `apply_chat_template` place them."
            )
        rest = marker.sub("", markup)
        for stray in (CONTEXT_START_TOKEN, CONTEXT_END_TOKEN):
            if stray in rest:
                raise ValueError(
                    f"`text` row {row} has a stray {stray!r} outside a context block. If it is user text, pass it "
                    "through `escape`."
                )
        return marker.sub(lambda _: self.context_block, markup)

    def tokenize_context(self, text: str) -> list[int]:
        """Ids of a context in the encoder's vocabulary: plain text, nothing in it is special."""
        return self.encoder_reader.read_plain([text])[0][0]

    def _tokenize_contexts(self, rows):
        read = iter(self.encoder_reader.read_plain([context for row in rows for context in row]))
        return pad_contexts([[torch.tensor(next(read)[0], dtype=torch.long) for _ in row] for row in rows])

    def apply_chat_template(
        self,
        conversation,
        documents=None,
        add_generation_prompt=None,
        tokenize=True,
        return_dict=True,
        padding=True,
        truncation=False,
        return_tensors="pt",
        chat_template=None,
        continue_final_message=False,
        **kwargs,
    ) -> Union[BatchFeature, str, list]:
        """
        Render chats with contexts and tokenize them.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): one chat or several. A message's `content` is a string
                or a list of parts: `{"type": "text", "text": str}`, `{"type": "context", "text": str}`,
                `{"type": "context", "latents": tensor}` with latents `(num_blocks, num_latents, text_hidden_size)`
                that are computed already, one block a segment, or `{"type": "context", "num_blocks": int,
                "num_latents": int}`, which only keeps their place: the latents go to `generate` by themselves.
            documents (`list[dict]`, *optional*): with `text`, perhaps `title`; compressed into the first user message.
            add_generation_prompt (`bool`, *optional*): open the assistant's turn at the end; by default, unless
                `continue_final_message`.
            tokenize (`bool`, defaults to `True`): `False` returns the markup.
            return_dict (`bool`, defaults to `True`): `False` returns `input_ids` only.
            padding, truncation, return_tensors: as in `__call__`.
            chat_template (`str`, *optional*): instead of the default one; `"decoder"` is the decoder's own, if kept.
            continue_final_message (`bool`, defaults to `False`): leave the last message open, a begun reply.
            kwargs: the other options of `__call__`, also as dicts `tokenizer_kwargs`, `processor_kwargs` or
                `text_kwargs`; and variables of the template.

        Returns:
            As `__call__`; with latents, `context_latents`
            `(batch_size, num_contexts, num_latents, text_hidden_size)` instead of contexts, short rows padded with
            zeros.

        Raises:
            ValueError: if a message or part is not as above, one call mixes the three kinds of context, documents have
                no user message to stand in, the template has no place for `tools`, or as in `__call__`.
        """
        options = {name: kwargs.pop(name) for name in TOKENIZER_OPTIONS if name in kwargs}
        for name in ("tokenizer_kwargs", "processor_kwargs", "text_kwargs"):
            options |= kwargs.pop(name, None) or {}
        padding, truncation = options.pop("padding", padding), options.pop("truncation", truncation)
        return_tensors = options.pop("return_tensors", return_tensors)
        chats, single = as_chats(conversation)
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = named.get(chat_template or "default", chat_template)
        if kwargs.get("tools") and "tools" not in template:
            raise ValueError("`tools` have no place in this chat template. Give a `chat_template` that writes them.")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        kwargs.setdefault("context_block", self.context_block)
        texts, rows = [], []
        for chat in chats:
            chat, contexts = take_contexts(chat, documents, self.num_latents)
            rows.append(contexts)
            text = self.tokenizer.apply_chat_template(
                chat,
                documents=documents,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kwargs,
            )
            texts.append(reopen_last_turn(text, add_generation_prompt) if continue_final_message else text)
        if not tokenize:
            return texts[0] if single else texts
        kinds = {kind_of(context) for row in rows for context in row}
        if len(kinds) > 1:
            raise ValueError(
                "the context parts of one call must be all `text`, all `latents` or all `num_blocks`, got several "
                "kinds. Compress the texts."
            )
        if kinds <= {"text"}:
            inputs = self(texts, rows, padding, truncation, return_tensors, **options)
        else:
            inputs = BatchFeature(self._tokenize_prompts(texts, padding, truncation, return_tensors, **options))
            if kinds == {"latents"}:
                inputs["context_latents"] = _as_tensors(_pad_latents(rows), return_tensors)
        return inputs if return_dict else inputs["input_ids"]

    def batch_decode(self, sequences, skip_special_tokens=True, **kwargs) -> list[str]:
        """
        Text of generated ids, up to where the original stops: `<|im_end|>` or the end-of-text token.

        Args:
            sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)` or `list[list[int]]`): new tokens,
                or prompts followed by new tokens; in the latter only a stop behind the last `<|im_start|>` counts.
            skip_special_tokens (`bool`, defaults to `True`): drop special tokens from the text.

        Returns:
            `list[str]`: not stripped; the original's chat() strips whitespace on both sides.
        """
        sequences = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        return [self.decode(sequence, skip_special_tokens=skip_special_tokens, **kwargs) for sequence in sequences]

    def decode(self, token_ids, skip_special_tokens=True, **kwargs) -> str:
        """Text of one sequence, `(sequence_length,)`, or of one id; see [`batch_decode`]."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        turn, stop = self.tokenizer.convert_tokens_to_ids([TURN_TOKEN, STOP_TOKEN])
        first = max((i + 1 for i, token in enumerate(ids) if token == turn), default=0)
        stops = (i for i in range(first, len(ids)) if ids[i] in (stop, self.tokenizer.eos_token_id))
        return self.tokenizer.decode(ids[: next(stops, len(ids))], skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As `ProcessorMixin.save_pretrained`, in a form that both ends of the supported transformers range load."""
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        _keep_loadable(Path(save_directory))
        if self._encoder_tokenizer is not None:
            folder = Path(save_directory) / "encoder_tokenizer"
            self._encoder_tokenizer.save_pretrained(folder)
            _keep_loadable(folder)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.separate_encoder_vocabulary:
            processor._encoder_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, **{**kwargs, "subfolder": "encoder_tokenizer"}
            )
        return processor


def _as_texts(text):
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(item, str) for item in texts):
        raise TypeError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
    if not texts:
        raise ValueError("`text` is an empty list: there must be at least one prompt.")
    return list(texts)


def _as_rows(contexts, text) -> Optional[list]:
    if contexts is None:
        return None
    if isinstance(contexts, str):
        return [[contexts]]
    if isinstance(contexts, (list, tuple)):
        if all(isinstance(item, str) for item in contexts):
            return [list(contexts)] if isinstance(text, str) else [[item] for item in contexts]
        if all(isinstance(row, (list, tuple)) and all(isinstance(item, str) for item in row) for row in contexts):
            return [list(row) for row in contexts]
    raise TypeError(
        f"`contexts` must be a string, a list of strings or a list of lists of strings, got {type(contexts).__name__}"
        " with other things in it."
    )


def _as_tensors(tensor, return_tensors):
    if return_tensors == "pt":
        return tensor
    # numpy has no bfloat16.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy() if return_tensors else tensor.tolist()


def _pad_latents(rows):
    example = next(latents for row in rows for latents in row)
    none = example.new_zeros((0, *example.shape))
    return pad_sequence([torch.stack(row) if row else none for row in rows], batch_first=True)


def _keep_loadable(folder):
    # transformers 5 writes the name "TokenizersBackend", which 4.57 does not know; both know the older name.
    path, entry = folder / "tokenizer_config.json", '"tokenizer_class": "{}"'
    names = entry.format("TokenizersBackend"), entry.format("PreTrainedTokenizerFast")
    path.write_text(path.read_text(encoding="utf-8").replace(*names), encoding="utf-8")


C3Processor.register_for_auto_class("AutoProcessor")

__all__ = ["C3Processor"]
