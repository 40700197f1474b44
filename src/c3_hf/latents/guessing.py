"""Greedy decoding of many tokens at once: guess a block, see which guesses the model confirms, guess again."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..modeling.positions_c3 import keep_rows


# Tokens that are guessed together: a few first, to see whether it pays, then as many as a matrix product likes. With
# many rows fewer each, so that the logits stay small.
FIRST_BLOCK, _BLOCK, _BLOCK_TOKENS = 16, 64, 2048
# Passes over a block after which a row that has not settled is left to ordinary decoding.
_PASSES = 3


def guess_in_blocks(
    model: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    context_latents: torch.Tensor,
    max_new_tokens: int,
    forced: torch.LongTensor | None,
    stop_ids: list[int],
) -> list[list[int]]:
    """Greedy tokens as far as they can be had by Jacobi decoding (Santilli et al., arXiv 2305.10427).

    One pass over a block of guesses gives the greedy choice behind each. Where the choices repeat the guesses, they
    are what decoding token by token would have chosen; where not, they are the next guesses. A model that finds its
    place in the latents by counting is right in the first pass and knows it in the second; one that needs the words
    before is left to ordinary decoding after three passes over sixteen tokens.

    Args:
        model: A `C3ForConditionalGeneration` whose decoder has full attention.
        prompt_ids: `(batch_size, prompt_length)` int64, with placeholders and without padding.
        context_latents: `(batch_size, num_contexts, num_latents, text_hidden_size)`.
        max_new_tokens: Where to stop at the latest.
        forced: What [`ForcedTokens`] takes, for all steps.
        stop_ids: Ids that end a row.

    Returns:
        The first new ids of each row. A row is done if its last one is a stop or there are `max_new_tokens`; rows that
        are not, and were given up in the same block, have the same number.
    """
    stops = torch.tensor(stop_ids, device=prompt_ids.device)
    new_ids: list[list[int]] = [[] for _ in prompt_ids]
    cache = DynamicCache(config=model.config.text_config)
    model(
        input_ids=prompt_ids[:, :-1],
        context_latents=context_latents,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    rows, last = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids[:, -1:]
    done, width = 0, FIRST_BLOCK
    while len(rows) and done < max_new_tokens:
        width = min(width, max_new_tokens - done)
        wanted = None if forced is None else forced[rows, done : done + width]
        greedy, certain, lengths = _settle(model, cache, last, width, wanted, stops)
        settled = certain >= lengths
        if not settled.all():
            lengths = torch.where(settled, lengths, certain[~settled].min())
        for row, length, tokens in zip(rows.tolist(), lengths.tolist(), greedy.tolist()):
            new_ids[row] += tokens[:length]
        going = settled & ~torch.isin(greedy, stops).any(dim=1)
        rows, last = rows[going], greedy[going, -1:]
        if len(rows) and not going.all():
            keep_rows(cache, going)
        done += width
        width = min(_BLOCK, max(FIRST_BLOCK, _BLOCK_TOKENS // max(1, len(rows))))
    return new_ids


def _settle(
    model: PreTrainedModel,
    cache: DynamicCache,
    last: torch.LongTensor,
    width: int,
    forced: torch.LongTensor | None,
    stops: torch.LongTensor,
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """Guess the `width` tokens behind `last` until they repeat themselves, or for three passes.

    Returns:
        Choices `(batch_size, width)`; how many of each row are certain `(batch_size,)`; and how many there are up to
        the first stop, or all. Certain ones are in the cache.
    """
    greedy = last.expand(-1, width)
    for number in range(_PASSES):
        if number:
            cache.crop(-width)
        inputs = torch.cat([last, greedy[:, :-1]], dim=1)
        greedy = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits.max(dim=-1).indices
        if forced is not None:
            known = greedy[:, : forced.shape[1]]
            known.copy_(torch.where(forced >= 0, forced, known))
        certain = 1 + (inputs[:, 1:] == greedy[:, :-1]).int().cumprod(dim=1).sum(dim=1)
        is_stop = torch.isin(greedy, stops)
        lengths = torch.where(is_stop.any(dim=1), is_stop.int().argmax(dim=1) + 1, width)
        if (certain >= lengths).all():
            break
    return greedy, certain, lengths


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether all layers of the decoder keep all keys and values, so that guesses can be taken back."""
    layers = DynamicCache(config=model.config.text_config).layers
    return all(type(layer) is DynamicLayer for layer in layers)
