"""Greedy decoding of a batch: with tokens forced at given steps, and without waiting for rows that are done."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer


# Decoder steps between two looks at which rows are done (docs/log.md).
_STRETCH = 64


class ForcedTokens(LogitsProcessor):
    """Let greedy decoding go where it wants except at given steps.

    Args:
        forced: `(batch_size, num_steps)` int64, the token id to take at each step; -1 where decoding is free.
    """

    def __init__(self, forced: torch.LongTensor):
        self.forced = forced
        # Known beforehand, so that the steps without a forced token (most of them) cost nothing.
        self._steps = set((forced >= 0).any(dim=0).nonzero().flatten().tolist())
        self._prompt_length: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(batch_size, vocab_size)` with everything but the forced tokens at minus infinity."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        step = input_ids.shape[1] - self._prompt_length
        if step not in self._steps:
            return scores
        wanted = self.forced[:, step].to(scores.device)
        choices = torch.arange(scores.shape[-1], device=scores.device)
        other = (wanted >= 0).unsqueeze(1) & (choices != wanted.unsqueeze(1))
        return scores.masked_fill(other, -torch.inf)


def generate_in_stretches(
    model: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    context_latents: torch.Tensor,
    max_new_tokens: int,
    forced: torch.LongTensor | None,
    settings: dict[str, Any],
) -> list[list[int]]:
    """What `generate()` gives, in less time on a CPU.

    A growing cache is copied whole at each step. A static one is not, but attention runs over all of it, filled or
    not, and rows that have stopped run on until the last one stops. So every 64 steps the rows that have not stopped
    go on in a longer static cache.

    Args:
        model: A `C3ForConditionalGeneration`.
        prompt_ids: `(batch_size, prompt_length)` int64, with placeholders and without padding.
        context_latents: `(batch_size, num_contexts, num_latents, text_hidden_size)`.
        max_new_tokens: Where to stop at the latest.
        forced: What [`ForcedTokens`] takes, for all steps.
        settings: What else `generate()` is to know; `eos_token_id` among it, a list.

    Returns:
        The new ids of each row, up to the end of the stretch in which it stopped.
    """
    stop_ids = torch.tensor(settings["eos_token_id"], device=prompt_ids.device)
    prompt_length = prompt_ids.shape[1]
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    new_ids: list[list[int]] = [[] for _ in prompt_ids]
    ids = prompt_ids
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    # Others cannot be moved: the entries of a sliding window are not where their positions say.
    movable = all(
        type(layer) is StaticLayer for layer in StaticCache(model.config.text_config, max_cache_len=1).layers
    )
    while len(rows):
        start = ids.shape[1]
        steps = max_new_tokens - (start - prompt_length)
        if movable:
            steps = min(steps, _STRETCH)
        cache = StaticCache(model.config.text_config, max_cache_len=start + steps)
        for index, (keys, values) in enumerate(kept):
            cache.update(keys, values, index)
        processors = LogitsProcessorList()
        if forced is not None:
            processors.append(ForcedTokens(forced[rows, start - prompt_length : start - prompt_length + steps]))
        # Latents that are in the cache already are passed over.
        ids = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            context_latents=context_latents[rows],
            logits_processor=processors,
            max_new_tokens=steps,
            past_key_values=cache,
            **settings,
        )
        for row, sequence in zip(rows.tolist(), ids[:, prompt_length:].tolist()):
            new_ids[row] = sequence
        going = ~torch.isin(ids[:, start:], stop_ids).any(dim=1)
        if ids.shape[1] - prompt_length >= max_new_tokens:
            break
        rows, ids = rows[going], ids[going]
        # All but the last token, which generate() reads first.
        used = ids.shape[1] - 1
        kept = [(layer.keys[going, :, :used], layer.values[going, :, :used]) for layer in cache.layers]
    return new_ids
