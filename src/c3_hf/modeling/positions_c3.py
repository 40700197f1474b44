# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""Where things lie in a batch: padded rows, the places of latents, their positions, and whether there are enough.

One of the remote-code files of every C3 repository on the Hub.
"""

from typing import Optional

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


def merge_latents(inputs_embeds, placeholder_mask, context_latents, first_latent=None):
    """
    Put the j-th latent of a row in the place of the j-th placeholder of that row.

    Done row by row, not by one `masked_scatter` over the batch: rows may hold different numbers of placeholders, and
    those beyond a row's latents keep their own embedding (prompt-lookup decoding copies placeholders).

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`).
        placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True at placeholders.
        context_latents (`torch.FloatTensor` of shape
            `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`).
        first_latent (`torch.LongTensor` of shape `(batch_size,)`, *optional*): latents of each row that are passed
            over.

    Returns:
        `torch.FloatTensor` of the shape, dtype and device of `inputs_embeds`.
    """
    latents = context_latents.to(inputs_embeds).flatten(1, 2).expand(inputs_embeds.shape[0], -1, -1)
    placeholder_mask = placeholder_mask.to(inputs_embeds.device)
    index = placeholder_mask.cumsum(dim=1) - 1
    if first_latent is not None:
        index = index + first_latent.to(index.device).unsqueeze(1)
    fills = placeholder_mask & (index < latents.shape[1])
    index = index.clamp(min=0, max=latents.shape[1] - 1).unsqueeze(-1).expand(-1, -1, latents.shape[-1])
    return torch.where(fills.unsqueeze(-1), latents.gather(1, index), inputs_embeds)


def learnt_positions(half) -> Optional[int]:
    """How many positions a half can be given at all: those of its table; `None` where it computes them."""
    limit = getattr(half.config, "max_position_embeddings", None)
    words = half.get_input_embeddings()
    tables = (module for module in half.modules() if isinstance(module, nn.Embedding) and module is not words)
    return limit if limit is not None and any(table.num_embeddings >= limit for table in tables) else None


def check_context_length(config, context_length, table_length):
    """
    Check that the encoder has positions for a context, the start marker and the latent queries.

    Args:
        config (`C3Config`).
        context_length (`int`): tokens of the longest context.
        table_length (`int`, *optional*): what [`learnt_positions`] gave for the encoder.

    Raises:
        ValueError: if a table of positions is too short. Where positions are computed there is a warning.
    """
    taken = context_length + 1 + config.num_latents
    if config.latent_stride is not None:
        taken = max(context_length + 1, config.num_latents * config.latent_stride)
    positions = (
        getattr(config.encoder_config, "max_position_embeddings", None) if table_length is None else table_length
    )
    if positions is None or taken <= positions:
        return
    text = (
        f"`context_input_ids` has {context_length} tokens: with the marker and {config.num_latents} latent queries it "
        f"takes {taken} positions, more than the {positions} positions the context encoder was made for."
    )
    advice = f"Cut the text into segments of at most {config.longest_segment} tokens, as c3_hf.compress does."
    if table_length is not None:
        raise ValueError(f"{text} {advice}")
    logger.warning_once(f"{text} Expect poor latents. {advice}")


def warn_of_long_context(config, length):
    """Warn of a context of more tokens than the model was trained to restore. `length` (`int`): of the longest one."""
    if length > config.longest_segment:
        logger.warning_once(
            f"`context_input_ids` has a context of {length} tokens, and this model restores {config.longest_segment} "
            "(`config.segment_length`): expect the rest to be lost. Cut the text into segments, as c3_hf.compress "
            "does."
        )


def check_room(config, length, num_contexts, table_length, new_tokens=0):
    """
    Check that the decoder has positions for prompts.

    Args:
        config (`C3Config`).
        length (`int`): tokens of the longest prompt, those in a cache included.
        num_contexts (`int`): contexts of a prompt.
        table_length (`int`, *optional*): what [`learnt_positions`] gave for the decoder.
        new_tokens (`int`, defaults to 0): tokens of a reply, for the warning.

    Returns:
        `int`: new tokens that there are positions for; the last is not read again. `None` where there is no end.

    Raises:
        ValueError: if a table of positions is too short. Where positions are computed there is a warning, once.
    """
    taken = length
    if config.latent_stride is not None:
        taken += num_contexts * config.num_latents * (config.latent_stride - 1)
    if table_length is None:
        made_for = getattr(config.text_config, "max_position_embeddings", None)
        if made_for is not None and taken + max(new_tokens - 1, 0) > made_for:
            # Without the lengths, so that it is said once and not at each step of a loop.
            logger.warning_once(
                f"prompt and reply take more than the {made_for} positions the decoder was made for "
                "(`config.text_config.max_position_embeddings`). Expect poor replies. Give shorter prompts, fewer "
                "contexts or a smaller `max_new_tokens`."
            )
        return None
    if taken > table_length:
        raise ValueError(
            f"the prompts of {length} tokens, {num_contexts} contexts among them, take {taken} positions, and the "
            f"decoder has {table_length}. Give shorter prompts or fewer contexts."
        )
    return table_length - taken + 1


def context_positions(config, contexts, dtype):
    """
    Mask and positions of the encoder's input: contexts, start marker, latent queries.

    Args:
        config (`C3Config`).
        contexts (`Contexts`): checked, with ids.
        dtype (`torch.dtype`): of the encoder's states.

    Returns:
        Two `torch.LongTensor` of shape `(rows * num_contexts, context_length + 1 + num_latents)`; both `None` where
        nothing is padded and positions count up by one. With `config.local_latents` the mask is the one of
        [`local_mask`].
    """
    mask, num_latents = contexts.attention_mask, config.num_latents
    if mask is None:
        if contexts.strides is None:
            return None, None
        # Without a mask transformers takes positions that do not count up by one for packed sequences, and no query
        # would see the text.
        mask = torch.ones_like(contexts.input_ids)
    mask = mask.flatten(0, 1)
    attention_mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1 + num_latents)], dim=1)
    # Positions count real tokens only, so that left and right padding give the same latents.
    position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if contexts.strides is not None:
        places = torch.arange(1, num_latents + 1, device=mask.device) * contexts.strides.reshape(-1, 1) - 1
        position_ids = torch.cat([position_ids[:, :-num_latents], places], dim=1)
    if config.local_latents:
        attention_mask = local_mask(config, attention_mask, position_ids, contexts.strides.reshape(-1), dtype)
    return attention_mask, position_ids


def local_mask(config, attention_mask, position_ids, strides, dtype):
    """
    Additive mask of an encoder whose queries see only the tokens their latents stand for.

    Text sees the text before it, as without this mask. A query sees the `strides` tokens of text up to its own
    position, the start marker and itself; the start marker sees itself alone, so that it tells queries nothing of the
    text behind their own. Padding sees itself, so that no row of the softmax is empty.

    Args:
        config (`C3Config`).
        attention_mask, position_ids (`torch.LongTensor` of shape `(rows, length)`): of text, start marker, queries.
        strides (`torch.LongTensor` of shape `(rows,)`): tokens that a latent stands for.
        dtype (`torch.dtype`): of the mask.

    Returns:
        `torch.Tensor` of shape `(rows, 1, length, length)`: 0 where a token is seen, else the least value of `dtype`.

    Raises:
        ValueError: if the encoder's attention takes no such mask.
    """
    attention = config.encoder_config._attn_implementation
    if attention not in (None, "eager", "sdpa"):
        raise ValueError(
            f"`local_latents` needs eager or sdpa attention in the encoder, and this one has {attention!r}, which "
            'takes no mask by rows. Load the model with `attn_implementation={"encoder_config": "sdpa"}`.'
        )
    length, num_latents = attention_mask.shape[1], config.num_latents
    index = torch.arange(length, device=attention_mask.device)
    seen = (index <= index.unsqueeze(1)) & attention_mask.bool().unsqueeze(1)
    own, text = position_ids[:, -num_latents:, None], position_ids[:, None, : -num_latents - 1]
    seen[:, -num_latents:, : -num_latents - 1] &= (text <= own) & (text > own - strides.reshape(-1, 1, 1))
    seen[:, -num_latents - 1, :-num_latents] = False
    seen[:, -num_latents:, -num_latents:] = False
    seen |= index == index.unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def stride_positions(config, placeholder_mask, attention_mask, context_strides):
    """
    Positions of prompts whose latents keep the positions of their text.

    A block of placeholders takes `num_latents * latent_stride` positions. Its placeholders sit `context_strides` apart
    from the beginning of them, each where its stretch of the text would end, and what follows the block goes on behind
    all of them. So a token of the text that is written there lies at one distance from its latent, whatever the
    length of the text, and up to its place in the stretch whatever the stride: what was learnt at one stride holds at
    every other.

    Args:
        config (`C3Config`): with a `latent_stride`.
        placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True at placeholders. Those
            behind the last context are ordinary tokens.
        attention_mask (`torch.Tensor` of the same shape): 1 at tokens, 0 at padding.
        context_strides (`torch.LongTensor` of shape `(batch_size or 1, num_contexts)`).

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    num_latents = config.num_latents
    index = placeholder_mask.cumsum(dim=1) - 1
    slot = index.div(num_latents, rounding_mode="floor")
    in_block = placeholder_mask & (slot < context_strides.shape[1])
    context_strides = context_strides.expand(len(index), -1)
    strides = context_strides.gather(1, slot.clamp(min=0, max=context_strides.shape[1] - 1))
    # Behind its last placeholder a block leaves out the positions that a smaller stride does not use.
    is_last = in_block & (index % num_latents == num_latents - 1)
    left_out = torch.where(is_last, num_latents * (config.latent_stride - strides), 0)
    advance = torch.where(in_block, strides, 1) * attention_mask.to(strides.dtype)
    return (advance.cumsum(dim=1) - 1 + left_out.cumsum(dim=1) - left_out).clamp(min=0)


def carried_delta(cache, batch_size):
    """
    By how much the positions of a kept cache are ahead of the number of its tokens.

    Args:
        cache (`Cache`, *optional*): its `position_delta` is what [`continued_positions`] returned for it, if anything.
        batch_size (`int`): rows of the call; beams of one row stand together.

    Returns:
        `torch.LongTensor` of shape `(batch_size or 1, 1)`; `None` if the cache carries nothing.

    Raises:
        ValueError: if the cache had other rows.
    """
    delta = getattr(cache, "position_delta", None)
    if delta is None or len(delta) in (1, batch_size):
        return delta
    if batch_size % len(delta):
        raise ValueError(
            f"the cache was filled by {len(delta)} rows and is used for {batch_size}: the positions of its latents "
            "are not known. Choose rows with `keep_rows(cache, rows)` of positions_c3.py."
        )
    return delta.repeat_interleave(batch_size // len(delta), dim=0)


def keep_rows(cache, rows):
    """`cache.batch_select_indices(rows)`, and what it carries for these rows; `rows` are indices or a mask."""
    cache.batch_select_indices(rows)
    delta = getattr(cache, "position_delta", None)
    if delta is not None and len(delta) > 1:
        cache.position_delta = delta[rows]


def resolve_strides(config, context_strides, num_rows, num_contexts, device):
    """
    Tokens that each latent of a context stands for.

    Args:
        config (`C3Config`).
        context_strides (`int`, `list` or `torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*):
            `None` means `config.latent_stride` for every context.
        num_rows, num_contexts (`int`): shape of what is asked for.
        device (`torch.device`).

    Returns:
        `torch.LongTensor` of shape `(num_rows, num_contexts)`; `None` for a model without a stride.

    Raises:
        ValueError: if strides are given for a model without, or have another shape.
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
        return strides.expand(num_rows, num_contexts)
    except RuntimeError as error:
        raise ValueError(
            f"`context_strides` must have shape (batch_size, num_contexts), here ({num_rows}, {num_contexts}), or one "
            f"row or one number for all, got {tuple(strides.shape)}."
        ) from error


def continued_positions(config, inputs_embeds, attention_mask, cache, placeholder_mask, context_strides):
    """
    Positions of a call that was given none, of a model whose latents keep the positions of their text.

    Args:
        config (`C3Config`): with a `latent_stride`.
        inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`).
        attention_mask (`torch.Tensor` of shape `(batch_size, total_length)`, *optional*).
        cache (`Cache`, *optional*): see [`carried_delta`].
        placeholder_mask, context_strides (*optional*): see [`stride_positions`]; of this call.

    Returns:
        The mask `(batch_size, total_length)`, the positions `(batch_size, sequence_length)`, and by how much they are
        ahead of the number of tokens, `(batch_size, 1)`: the cache carries it to the next call.

    Raises:
        ValueError: if the mask has another number of dimensions, or the cache had other rows.
    """
    batch_size, length = inputs_embeds.shape[:2]
    past_length = 0 if cache is None else cache.get_seq_length()
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, past_length + length, device=inputs_embeds.device)
    if attention_mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` has {attention_mask.dim()} dimensions and no `position_ids` came with it: a model "
            "with `latent_stride` finds them from a mask (batch_size, sequence_length). Give one of the two."
        )
    counted = attention_mask.long().cumsum(dim=1) - 1
    delta = carried_delta(cache, batch_size) if past_length else None
    position_ids = counted[:, -length:] if delta is None else counted[:, -length:] + delta
    if placeholder_mask is not None:
        steps = stride_positions(config, placeholder_mask, attention_mask[:, -length:], context_strides)
        position_ids = steps + position_ids[:, :1].clamp(min=0)
    delta = position_ids[:, -1:] - counted[:, -1:]
    return attention_mask, position_ids.clamp(min=0), delta


def pad_contexts(rows):
    """
    Contexts of a batch of prompts as one tensor, and its mask.

    Args:
        rows (`list[list[torch.LongTensor]]`): for each prompt the ids of its contexts, each `(context_length,)`; at
            least one context in all.

    Returns:
        Two `torch.LongTensor` of shape `(len(rows), num_contexts, context_length)`: padded right, and with slots
        masked out where a prompt has fewer contexts than others.
    """
    num_contexts = max(map(len, rows))
    empty = next(context for row in rows for context in row).new_empty(0)
    flat = [context for row in rows for context in [*row, *[empty] * (num_contexts - len(row))]]
    ids, mask = pad_rows(flat, left=False)
    shape = (len(rows), num_contexts, ids.shape[1])
    return ids.reshape(shape), mask.reshape(shape)


def pad_rows(rows, left, length=0, value=0):
    """
    Rows of ids as one tensor, and its mask.

    Args:
        rows (`list[torch.LongTensor]`): each of shape `(row_length,)`; at least one.
        left (`bool`): padding goes in front; else behind.
        length (`int`, defaults to 0): least length of the result.
        value (`int`, defaults to 0): the id that pads.

    Returns:
        Two `torch.LongTensor` of shape `(len(rows), sequence_length)`: ids, and 1 at a row's own ids, 0 at padding.
    """
    length = max(length, *map(len, rows))
    ids = rows[0].new_full((len(rows), length), value)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return ids, mask
