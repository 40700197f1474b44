# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks on the context arguments of a C3 model, and contexts written in line in `input_ids`.

Everything here works on tensors and a `C3Config`; nothing needs the model. One of the remote-code files of every C3
repository on the Hub.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, runtime_checkable

import torch


@runtime_checkable
class LatentSource(Protocol):
    """What may stand for latents without being a tensor: it gives them for a model, as `CompressedContext` does."""

    def context_latents(self, model) -> torch.Tensor:
        """Latents of shape `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`."""
        ...


def resolve_latents(context_latents, model):
    """
    The tensor behind the argument `context_latents`.

    Args:
        context_latents (`torch.FloatTensor` or [`LatentSource`], *optional*).
        model (`C3ForConditionalGeneration`): whom a source is asked for.

    Returns:
        The tensor; `None` if there is nothing, or a source that holds no context.

    Raises:
        TypeError: if it is neither a tensor nor a source.
    """
    if context_latents is None or isinstance(context_latents, torch.Tensor):
        return context_latents
    # A class has the method too, but nothing to give.
    if isinstance(context_latents, type) or not isinstance(context_latents, LatentSource):
        raise TypeError(
            "`context_latents` must be a tensor (batch_size, num_contexts, num_latents, text_hidden_size), or give "
            "one by its method `context_latents(model)` as a CompressedContext does, got "
            f"{type(context_latents).__name__}. Open a stored file with `CompressedContext.load`."
        )
    latents = context_latents.context_latents(model)
    return latents if latents.shape[1] else None


def check_context_shapes(context_input_ids, context_attention_mask):
    """
    Bring context ids and mask to three dimensions.

    Args:
        context_input_ids (`torch.LongTensor` of shape `(batch_size, num_contexts, context_length)` or
            `(batch_size, context_length)`).
        context_attention_mask (`torch.Tensor` of the same shape, *optional*).

    Returns:
        Both with shape `(batch_size, num_contexts, context_length)`; the mask stays `None` if it was.

    Raises:
        ValueError: if the ids have another number of dimensions, no context at all, or another shape than the mask.
    """
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


def check_context_arguments(config, batch_size, context_input_ids, context_attention_mask, context_latents):
    """
    Check that contexts and latents exclude each other and fit the batch and the model.

    Args:
        config (`C3Config`).
        batch_size (`int`): number of prompts.
        context_input_ids, context_attention_mask: see [`check_context_shapes`]; *optional*.
        context_latents (`torch.FloatTensor` of shape
            `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`, *optional*).

    Raises:
        TypeError: if the latents are no tensor.
        ValueError: if the batch is empty, both contexts and latents are given, a mask comes without ids, batch sizes
            differ (a batch of one context serves every prompt), or the latents have the wrong shape.
    """
    if batch_size == 0:
        raise ValueError("the batch is empty: `input_ids` (or `inputs_embeds`) must have at least one row.")
    if context_input_ids is not None and context_latents is not None:
        raise ValueError(
            "`context_input_ids` and `context_latents` exclude each other: latents stand for contexts that are "
            "compressed already. Give one of them."
        )
    if context_input_ids is None and context_attention_mask is not None:
        raise ValueError("`context_attention_mask` was given without `context_input_ids`.")
    if context_input_ids is not None:
        context_input_ids, _ = check_context_shapes(context_input_ids, context_attention_mask)
        _check_batch("context_input_ids", context_input_ids.shape[0], batch_size)
    if context_latents is not None:
        if not isinstance(context_latents, torch.Tensor):
            raise TypeError(
                f"`context_latents` of the model without its head must be a tensor, got "
                f"{type(context_latents).__name__}. Call its method `context_latents(model)` with the whole model."
            )
        expected = (config.num_latents, config.text_config.hidden_size)
        shape = tuple(context_latents.shape)
        if len(shape) != 4 or shape[2:] != expected or shape[1] == 0:
            raise ValueError(
                f"`context_latents` must have shape (batch_size, num_contexts, {expected[0]}, {expected[1]}), "
                f"(…, num_latents, text hidden size) of this model, got {shape}. Latents from before the projector "
                "must go through `model.model.projector` first."
            )
        _check_batch("context_latents", shape[0], batch_size)


def _check_batch(name, got, batch_size):
    if got not in (1, batch_size):
        raise ValueError(
            f"`{name}` has batch size {got} for {batch_size} prompts. Give one row a prompt, or a single row for all."
        )


def required_latents(config, context_input_ids=None, context_attention_mask=None, context_latents=None):
    """
    How many placeholders each row must have so that no context is lost.

    Ragged batches are padded at their end: a slot of padding only (mask all 0, or latents all 0) behind the last used
    slot of its row needs no placeholders.

    Returns:
        `torch.LongTensor` of shape `(batch_size or 1,)`, in placeholders.
    """
    if context_latents is not None:
        used = (context_latents != 0).flatten(2).any(dim=-1)
    elif context_attention_mask is None:
        context_input_ids, _ = check_context_shapes(context_input_ids, None)
        used = torch.ones(context_input_ids.shape[:2], dtype=torch.bool, device=context_input_ids.device)
    else:
        _, mask = check_context_shapes(context_input_ids, context_attention_mask)
        used = mask.bool().any(dim=-1)
    slots = torch.arange(1, used.shape[1] + 1, device=used.device)
    return (used * slots).amax(dim=-1) * config.num_latents


def check_placeholders(placeholder_mask, required):
    """
    Raise if a row has fewer placeholders than its contexts need.

    Surplus placeholders are allowed: they keep their own embedding, because prompt-lookup decoding copies them.
    Under `torch.compile` nothing is checked, since the answer depends on data.

    Args:
        placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`).
        required (`torch.LongTensor` of shape `(batch_size or 1,)`).

    Raises:
        ValueError: naming the first row that falls short, what it has and what it needs.
    """
    if torch.compiler.is_compiling():
        return
    counts = placeholder_mask.sum(dim=-1)
    short = (counts < required.to(counts.device)).nonzero().flatten().tolist()
    if short:
        row = short[0]
        needed = required.expand(counts.shape[0])[row].item()
        raise ValueError(
            f"row {row} of the prompts has {counts[row].item()} context placeholders, its contexts need {needed}: the "
            "context would be ignored. Put one block of placeholders into the prompt for each context (C3Processor "
            "does), or, if the row has fewer contexts than others, pad it with a mask (or latents) of zeros."
        )


def check_context_ids(config, context_input_ids, context_attention_mask):
    """
    Raise if contexts hold the marker that the original appended to them: here they are text only.

    Under `torch.compile` nothing is checked, since the answer depends on data.

    Raises:
        ValueError: naming the first context that holds `config.encoder_context_start_token_id`.
    """
    if torch.compiler.is_compiling():
        return
    is_marker = context_input_ids == config.encoder_context_start_token_id
    if context_attention_mask is not None:
        is_marker = is_marker & context_attention_mask.bool()
    found = is_marker.any(dim=-1).nonzero().tolist()
    if found:
        row, slot = found[0]
        raise ValueError(
            f"`context_input_ids` of row {row}, context {slot}, holds the context start marker "
            f"{config.encoder_context_start_token_id}: a context is text only, the model adds the marker and the "
            "latent queries. Cut the original's `<img>…</img>` block off."
        )


def check_no_context_is_missing(config, input_ids):
    """
    Raise if a row of a training batch without contexts has a block of placeholders, or a context in line.

    Batches get that way where a data collator keeps `input_ids` and drops the rest: the decoder would train on prompts
    without their contexts, and the encoder on nothing. Under `torch.compile` nothing is checked.

    Args:
        config (`C3Config`).
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*).

    Raises:
        ValueError: naming the first such row.
    """
    if input_ids is None or torch.compiler.is_compiling():
        return
    inline = find_inline_contexts(config, input_ids)
    if inline:
        raise ValueError(
            f"`input_ids` of a training batch hold contexts in line (row {inline[0][0]}), but only `generate()` "
            "splits them: the encoder would not train, and the decoder on raw text. "
            "`c3_hf.data.collator.C3DataCollator(processor)` makes batches with contexts from chat messages."
        )
    rows = _whole_blocks(config, input_ids).nonzero()[:1].tolist()
    if rows:
        raise ValueError(
            f"`context_input_ids` are missing from a training batch: row {rows[0][0]} of its prompts has a block of "
            f"{config.num_latents} context placeholders. A data collator that knows only `input_ids` drops them; "
            "`c3_hf.data.collator.C3DataCollator(processor)` makes whole batches from chat messages."
        )


def check_blocks(config, input_ids):
    """
    Raise if a start or end marker stands outside a whole block: start, `num_latents` placeholders, end.

    Placeholders without markers are allowed. Under `torch.compile` nothing is checked.

    Args:
        config (`C3Config`).
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).

    Raises:
        ValueError: naming the first row with a stray marker.
    """
    if torch.compiler.is_compiling():
        return
    is_start = input_ids == config.context_start_token_id
    is_end = input_ids == config.context_end_token_id
    blocks = _whole_blocks(config, input_ids).sum(dim=1)
    stray = ((is_start.sum(dim=1) != blocks) | (is_end.sum(dim=1) != blocks)).nonzero().flatten().tolist()
    if stray:
        raise ValueError(
            f"row {stray[0]} of the prompts has a stray context marker ({config.context_start_token_id} or "
            f"{config.context_end_token_id}): each start must be followed by {config.num_latents} placeholders and an "
            "end. Remove the marker or complete the block."
        )


def _whole_blocks(config, input_ids):
    """True where a whole block begins: start marker, `num_latents` placeholders, end marker."""
    span = config.num_latents + 1
    before = (input_ids == config.context_token_id).cumsum(dim=1)
    opens = (input_ids[:, :-span] == config.context_start_token_id) & (
        input_ids[:, span:] == config.context_end_token_id
    )
    return opens & (before[:, span:] - before[:, :-span] == config.num_latents)


def resolve_strides(config, context_strides, num_rows, num_contexts, device):
    """
    Tokens that each latent of a context stands for, checked.

    Args:
        config (`C3Config`).
        context_strides (`int`, `list` or `torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*):
            `None` means `config.latent_stride` for every context.
        num_rows, num_contexts (`int`): shape of what is asked for.
        device (`torch.device`).

    Returns:
        `torch.LongTensor` of shape `(num_rows, num_contexts)`; `None` for a model without a stride.

    Raises:
        ValueError: if strides are given for a model without, have another shape, or lie outside
            `[1, config.latent_stride]`.
    """
    if config.latent_stride is None:
        if context_strides is not None:
            raise ValueError(
                "`context_strides` was given, but the latents of this model have no stride (`config.latent_stride` is "
                "None). Leave it out."
            )
        return None
    if context_strides is None:
        return torch.full((num_rows, num_contexts), config.latent_stride, device=device)
    strides = torch.as_tensor(context_strides, device=device)
    try:
        strides = strides.expand(num_rows, num_contexts)
    except RuntimeError as error:
        raise ValueError(
            f"`context_strides` must have shape (batch_size, num_contexts), here ({num_rows}, {num_contexts}), or one "
            f"row or one number for all, got {tuple(strides.shape)}."
        ) from error
    if not torch.compiler.is_compiling() and ((strides < 1) | (strides > config.latent_stride)).any():
        raise ValueError(
            f"`context_strides` must lie between 1 and `config.latent_stride`={config.latent_stride}, got "
            f"{strides.tolist()}. Cut longer texts into segments."
        )
    return strides


def stride_positions(config, placeholder_mask, attention_mask, context_strides):
    """
    Positions of prompts whose latents keep the positions of their text.

    A block of placeholders takes `num_latents * latent_stride` positions. Its placeholders sit `context_strides` apart
    at the end of them, so that what follows lies at the same distance behind the latents for every stride, and a text
    token at the same distance behind its latent for every length.

    Args:
        config (`C3Config`): with a `latent_stride`.
        placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True at placeholders. Those
            behind the last context are ordinary tokens.
        attention_mask (`torch.Tensor` of the same shape): 1 at tokens, 0 at padding.
        context_strides (`torch.LongTensor` of shape `(batch_size, num_contexts)`).

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    num_latents = config.num_latents
    index = placeholder_mask.cumsum(dim=1) - 1
    slot = index.div(num_latents, rounding_mode="floor")
    in_block = placeholder_mask & (slot < context_strides.shape[1])
    strides = context_strides.gather(1, slot.clamp(min=0, max=context_strides.shape[1] - 1))
    # The first placeholder of a block skips what a smaller stride leaves over.
    skipped = torch.where(index % num_latents == 0, num_latents * (config.latent_stride - strides), 0)
    advance = torch.where(in_block, strides + skipped, 1) * attention_mask.to(strides.dtype)
    return (advance.cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class InlineContexts:
    """
    A batch of prompts whose in-line contexts were cut out.

    input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`): the prompts with a block of
        placeholders for each context, padded left.
    context_input_ids, context_attention_mask (`torch.LongTensor` of shape
        `(batch_size, num_contexts, context_length)`): the contexts, padded right; slots of rows with fewer contexts
        are masked out.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    context_input_ids: torch.LongTensor
    context_attention_mask: torch.LongTensor


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


def split_inline_contexts(config, input_ids, attention_mask=None) -> Optional[InlineContexts]:
    """
    Cut in-line contexts out of prompts and put blocks of placeholders in their place.

    Args:
        config (`C3Config`).
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).
        attention_mask (`torch.Tensor` of the same shape, *optional*): padding is dropped and laid anew on the left.

    Returns:
        [`InlineContexts`], or `None` if there is no in-line context.
    """
    spans = find_inline_contexts(config, input_ids)
    if not spans:
        return None
    batch_size = input_ids.shape[0]
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    block = input_ids.new_tensor(
        [config.context_start_token_id, *[config.context_token_id] * config.num_latents, config.context_end_token_id]
    )
    prompts, contexts = [], []
    for row in range(batch_size):
        pieces, row_contexts, position = [], [], 0
        for _, start, end in (span for span in spans if span[0] == row):
            pieces += [input_ids[row, position:start][keep[row, position:start]], block]
            row_contexts.append(input_ids[row, start + 1 : end])
            position = end + 1
        pieces.append(input_ids[row, position:][keep[row, position:]])
        prompts.append(torch.cat(pieces))
        contexts.append(row_contexts)
    prompt_ids, prompt_mask = _pad(prompts, left=True)
    num_contexts = max(len(row) for row in contexts)
    empty = input_ids.new_empty(0)
    flat = [context for row in contexts for context in row + [empty] * (num_contexts - len(row))]
    context_ids, context_mask = _pad(flat, left=False)
    shape = (batch_size, num_contexts, -1) if context_ids.shape[1] else (batch_size, num_contexts, 0)
    return InlineContexts(prompt_ids, prompt_mask, context_ids.reshape(shape), context_mask.reshape(shape))


def _pad(sequences, left):
    length = max(len(sequence) for sequence in sequences)
    ids = sequences[0].new_zeros((len(sequences), length))
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(length - len(sequence), None) if left else slice(len(sequence))
        ids[row, where] = sequence
        mask[row, where] = 1
    return ids, mask
