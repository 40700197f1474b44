# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""The gate of a C3 model: checks on its context arguments, and contexts written in line.

Everything here works on tensors and a `C3Config`; nothing needs the model. One of the remote-code files of every C3
repository on the Hub.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, runtime_checkable

import torch

from .positions_c3 import resolve_strides


@runtime_checkable
class LatentSource(Protocol):
    """What may stand for latents without being a tensor: it gives them for a model, as `CompressedContext` does."""

    def context_latents(self, model) -> torch.Tensor:
        """Latents of shape `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`."""
        ...

    def context_strides(self, model) -> Optional[torch.Tensor]:
        """The strides they were made with, `(batch_size or 1, num_contexts)`; `None` for a model without a stride."""
        ...


def resolve_latents(context_latents, context_strides, model):
    """
    The tensors behind the arguments `context_latents` and `context_strides`.

    Args:
        context_latents (`torch.FloatTensor` or [`LatentSource`], *optional*).
        context_strides (`torch.LongTensor`, *optional*): a source gives its own where there are none.
        model (`C3ForConditionalGeneration`): whom a source is asked for.

    Returns:
        The tensors; `None` for both if there is nothing, or a source that holds no context.

    Raises:
        TypeError: if the latents are neither a tensor nor a source.
    """
    if context_latents is None or isinstance(context_latents, torch.Tensor):
        return context_latents, context_strides
    # A class has the methods too, but nothing to give.
    if isinstance(context_latents, type) or not isinstance(context_latents, LatentSource):
        raise TypeError(
            "`context_latents` must be a tensor (batch_size, num_contexts, num_latents, text_hidden_size), or give "
            "one by its method `context_latents(model)` as a CompressedContext does, got "
            f"{type(context_latents).__name__}. Open a stored file with `CompressedContext.load`."
        )
    latents = context_latents.context_latents(model)
    if not latents.shape[1]:
        return None, None
    return latents, context_latents.context_strides(model) if context_strides is None else context_strides


@dataclass
class Contexts:
    """
    The contexts of a call, checked: either `input_ids` or `latents`, the other is `None`.

    input_ids (`torch.LongTensor` of shape `(batch_size or 1, num_contexts, context_length)`, *optional*).
    attention_mask (`torch.Tensor` of the same shape, *optional*): 1 at text, 0 at padding.
    latents (`torch.FloatTensor` of shape `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`,
        *optional*).
    strides (`torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*): tokens that a latent of each
        context stands for; `None` for a model without a stride.
    """

    input_ids: Optional[torch.LongTensor]
    attention_mask: Optional[torch.Tensor]
    latents: Optional[torch.FloatTensor]
    strides: Optional[torch.LongTensor]

    @property
    def shape(self):
        """`(batch_size or 1, num_contexts)`."""
        return tuple((self.latents if self.input_ids is None else self.input_ids).shape[:2])


def check_contexts(
    config,
    context_input_ids=None,
    context_attention_mask=None,
    context_latents=None,
    context_strides=None,
    placeholder_mask=None,
    prompt_ids=None,
) -> Contexts:
    """
    The gate of the model: every check of contexts, and of the prompts' room for them, once a call.

    What depends on values is asked of the device together, in one transfer. Under `torch.compile` only shapes are
    checked.

    Args:
        config (`C3Config`).
        context_input_ids (`torch.LongTensor` of shape `(batch_size or 1, num_contexts, context_length)` or
            `(batch_size or 1, context_length)`, *optional*).
        context_attention_mask (`torch.Tensor` of the same shape, *optional*).
        context_latents (`torch.FloatTensor` of shape
            `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`, *optional*).
        context_strides (`int`, `list` or `torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*):
            `None` means `config.latent_stride` for every context.
        placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): True at the
            prompts' placeholders. Without it contexts are checked by themselves. More than the contexts need are
            allowed, because prompt-lookup decoding copies them.
        prompt_ids (`torch.LongTensor` of the same shape, *optional*): for the markers around placeholders. A row that
            holds no context may have markers anywhere.

    Raises:
        TypeError: if the latents are no tensor.
        ValueError: if not exactly one of contexts and latents is given, shapes or batch sizes do not fit, a context
            holds the marker that the original appended to it or an id that the encoder has not, strides do not fit,
            or a row has fewer placeholders than its contexts need or a marker outside a whole block.
    """
    if context_input_ids is not None and context_latents is not None:
        raise ValueError(
            "`context_input_ids` and `context_latents` exclude each other: latents stand for contexts that are "
            "compressed already. Give one of them."
        )
    if context_input_ids is None and context_latents is None:
        name = "context_strides" if context_attention_mask is None else "context_attention_mask"
        raise ValueError(f"`{name}` was given without `context_input_ids`.")
    if context_latents is None:
        context_input_ids, context_attention_mask = _with_slots(context_input_ids, context_attention_mask)
    elif context_attention_mask is not None:
        raise ValueError("`context_attention_mask` was given without `context_input_ids`.")
    else:
        _check_latents(config, context_latents)
    contexts = Contexts(context_input_ids, context_attention_mask, context_latents, None)
    if placeholder_mask is not None and contexts.shape[0] not in (1, placeholder_mask.shape[0]):
        name = "context_input_ids" if context_latents is None else "context_latents"
        raise ValueError(
            f"`{name}` has batch size {contexts.shape[0]} for {placeholder_mask.shape[0]} prompts. Give one row a "
            "prompt, or a single row for all."
        )
    num_rows, num_contexts = contexts.shape
    if context_latents is not None and placeholder_mask is not None:
        # One row of latents may serve prompts that give strides of their own.
        num_rows = placeholder_mask.shape[0]
    device = (context_input_ids if context_latents is None else context_latents).device
    contexts.strides = resolve_strides(config, context_strides, num_rows, num_contexts, device)
    if not torch.compiler.is_compiling():
        _check_values(config, contexts, placeholder_mask, prompt_ids)
    return contexts


def _with_slots(context_input_ids, context_attention_mask):
    """Context ids and mask with three dimensions."""
    shape = tuple(context_input_ids.shape)
    if len(shape) not in (2, 3):
        raise ValueError(
            "`context_input_ids` must have shape (batch_size, num_contexts, context_length) or (batch_size, "
            f"context_length), got {shape}."
        )
    if context_attention_mask is not None and tuple(context_attention_mask.shape) != shape:
        raise ValueError(
            f"`context_attention_mask` must have the shape of `context_input_ids`, {shape}, got "
            f"{tuple(context_attention_mask.shape)}."
        )
    if len(shape) == 2:
        context_input_ids = context_input_ids.unsqueeze(1)
        context_attention_mask = None if context_attention_mask is None else context_attention_mask.unsqueeze(1)
    if 0 in context_input_ids.shape[:2]:
        raise ValueError(
            f"`context_input_ids` holds no context: its shape is {shape}. Leave the argument out where there is none."
        )
    return context_input_ids, context_attention_mask


def _check_latents(config, context_latents):
    if not isinstance(context_latents, torch.Tensor):
        raise TypeError(
            f"`context_latents` of the model without its head must be a tensor, got {type(context_latents).__name__}. "
            "Call its method `context_latents(model)` with the whole model."
        )
    expected = (config.num_latents, config.text_config.hidden_size)
    shape = tuple(context_latents.shape)
    if len(shape) != 4 or shape[2:] != expected or shape[1] == 0:
        raise ValueError(
            f"`context_latents` must have shape (batch_size, num_contexts, {expected[0]}, {expected[1]}), "
            f"(…, num_latents, text hidden size) of this model, got {shape}. Latents from before the projector "
            "must go through `model.model.projector` first."
        )


def _check_values(config, contexts, placeholder_mask, prompt_ids):
    """What shapes cannot tell. Only where something is wrong is the device asked a second time: what and where."""
    wrong = {}
    if contexts.input_ids is not None:
        wrong["marked"] = contexts.input_ids == config.encoder_context_start_token_id
        if contexts.attention_mask is not None:
            wrong["marked"] = wrong["marked"] & contexts.attention_mask.bool()
        wrong["foreign"] = (contexts.input_ids < 0) | (contexts.input_ids >= config.encoder_config.vocab_size)
    if contexts.strides is not None:
        wrong["strides"] = (contexts.strides < 1) | (contexts.strides > config.latent_stride)
    if placeholder_mask is not None:
        counts = placeholder_mask.sum(dim=-1)
        required = required_latents(config, contexts).to(counts.device).expand(len(counts))
        wrong["short"] = counts < required
        if prompt_ids is not None:
            wrong["stray"] = _stray_markers(config, prompt_ids) & (required > 0)
    device = next(iter(wrong.values())).device if wrong else None
    if not wrong or not torch.stack([flags.any().to(device) for flags in wrong.values()]).any():
        return
    for name, flags in wrong.items():
        found = flags.nonzero().tolist()
        if not found:
            continue
        row = found[0][0]
        if name == "marked":
            raise ValueError(
                f"`context_input_ids` of row {row}, context {found[0][1]}, holds the context start marker "
                f"{config.encoder_context_start_token_id}: a context is text only, the model adds the marker and the "
                "latent queries. Cut the original's `<img>…</img>` block off."
            )
        if name == "foreign":
            raise ValueError(
                f"`context_input_ids` of row {row}, context {found[0][1]}, has the id "
                f"{contexts.input_ids[tuple(found[0])].item()}, outside the encoder's vocabulary of "
                f"{config.encoder_config.vocab_size}: contexts are read with `processor.encoder_tokenizer`, and pads "
                "need an id of it too."
            )
        if name == "strides":
            raise ValueError(
                f"`context_strides` must lie between 1 and `config.latent_stride`={config.latent_stride}, got "
                f"{contexts.strides.tolist()}. Cut longer texts into segments."
            )
        if name == "short":
            raise ValueError(
                f"row {row} of the prompts has {counts[row].item()} context placeholders, its contexts need "
                f"{required[row].item()}: the context would be ignored. Put one block of placeholders into the prompt "
                "for each context (C3Processor does), or, if the row has fewer contexts than others, pad it with a "
                "mask (or latents) of zeros."
            )
        raise ValueError(
            f"row {row} of the prompts has a stray context marker ({config.context_start_token_id} or "
            f"{config.context_end_token_id}): each start must be followed by {config.num_latents} placeholders and an "
            "end. Remove the marker or complete the block."
        )


def required_latents(config, contexts):
    """
    How many placeholders each row must have so that no context is lost.

    Ragged batches are padded at their end: a slot of padding only (mask all 0, or latents all 0) behind the last used
    slot of its row needs no placeholders.

    Args:
        config (`C3Config`).
        contexts ([`Contexts`]).

    Returns:
        `torch.LongTensor` of shape `(batch_size or 1,)`, in placeholders.
    """
    if contexts.latents is not None:
        used = (contexts.latents != 0).flatten(2).any(dim=-1)
    elif contexts.attention_mask is None:
        used = torch.ones(contexts.shape, dtype=torch.bool, device=contexts.input_ids.device)
    else:
        used = contexts.attention_mask.bool().any(dim=-1)
    slots = torch.arange(1, used.shape[1] + 1, device=used.device)
    return (used * slots).amax(dim=-1) * config.num_latents


def _whole_blocks(config, prompt_ids):
    """True where a whole block begins: start marker, `num_latents` placeholders, end marker."""
    span = config.num_latents + 1
    before = (prompt_ids == config.context_token_id).cumsum(dim=1)
    opens = (prompt_ids[:, :-span] == config.context_start_token_id) & (
        prompt_ids[:, span:] == config.context_end_token_id
    )
    return opens & (before[:, span:] - before[:, :-span] == config.num_latents)


def _stray_markers(config, prompt_ids):
    """Rows `(batch_size,)` with a start or end marker outside a whole block; placeholders need no markers."""
    is_start = prompt_ids == config.context_start_token_id
    is_end = prompt_ids == config.context_end_token_id
    blocks = _whole_blocks(config, prompt_ids).sum(dim=1)
    return (is_start.sum(dim=1) != blocks) | (is_end.sum(dim=1) != blocks)


def find_inline_contexts(config, input_ids):
    """
    Find contexts written in line: the tokens between a start marker and the end marker that follows it.

    An end pairs with the nearest start before it; a marker without a partner is an ordinary token.

    Returns:
        `list[tuple[int, int, int]]`: row, position of the start marker and position of the end marker, in order.
    """
    if config.inline_context_start_token_id is None:
        return []
    is_end = input_ids == config.inline_context_end_token_id
    markers = ((input_ids == config.inline_context_start_token_id) | is_end).nonzero()
    ends = is_end[markers[:, 0], markers[:, 1]].tolist()
    markers = markers.tolist()
    return [
        (row, start, end)
        for (row, start), (next_row, end), closed_before, closes in zip(markers, markers[1:], ends, ends[1:])
        if row == next_row and closes and not closed_before
    ]


def inline_contexts_are_read_raw(config, input_ids, labels, training):
    """
    Whether a call of forward(), which does not split contexts in line, reads some as raw text.

    Looking waits for the device: not at a step of one token, and in training only in the body, which raises.

    Raises:
        ValueError: if there are labels for them, see [`check_no_context_is_missing`].
    """
    if input_ids is None or input_ids.shape[1] == 1 or training or torch.compiler.is_compiling():
        return False
    if labels is not None:
        check_no_context_is_missing(config, input_ids)
    return bool(find_inline_contexts(config, input_ids))


def check_no_context_is_missing(config, input_ids):
    """
    Raise if prompts that are trained on without contexts have a block of placeholders, or a context in line.

    Batches get that way where a data collator keeps `input_ids` and drops the rest: the decoder would train on prompts
    without their contexts, and the encoder on nothing. Under `torch.compile` nothing is checked.

    Raises:
        ValueError: naming the first such row.
    """
    if input_ids is None or torch.compiler.is_compiling():
        return
    inline = find_inline_contexts(config, input_ids)
    if inline:
        raise ValueError(
            "`input_ids` holds contexts in line, but only `generate()` splits them: this loss would be that of raw "
            f"text (row {inline[0][0]}). Pass `context_input_ids`: `c3_hf.data.collator.C3DataCollator(processor)` "
            "makes batches that have them from chat messages."
        )
    rows = _whole_blocks(config, input_ids).nonzero()[:1].tolist()
    if rows:
        raise ValueError(
            f"`context_input_ids` are missing from a training batch: row {rows[0][0]} of its prompts has a block of "
            f"{config.num_latents} context placeholders. A data collator that knows only `input_ids` drops them; "
            "`c3_hf.data.collator.C3DataCollator(processor)` makes whole batches from chat messages."
        )
