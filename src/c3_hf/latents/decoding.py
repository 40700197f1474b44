"""Greedy decoding of segments from their latents: in blocks of guesses, in stretches, or as `generate()` does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, StaticLayer

from ..modeling.positions_c3 import keep_rows
from .fingerprints import Fingerprints, restoring_prompt_ids


# Greedy, spelled out: what is left open comes from the checkpoint's own generation settings.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# Generation settings that greedy decoding does not look at, or that are given here.
_NOT_GREEDY = {
    *GREEDY,
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "output_attentions", "output_hidden_states"),
    *("transformers_version", "_from_model_config"),
}
# Tokens guessed at a step from what the text has said before, where one text is restored alone: the checked guesses
# give the same tokens in fewer steps (docs/log.md). transformers does it for a batch of one only.
_DRAFTED_TOKENS = 3
# Decoder steps between two looks at which rows are done (docs/log.md).
_STRETCH = 64
# Tokens that are guessed together: a few first, to see whether it pays, then as many as a matrix product likes. With
# many rows fewer each, so that the logits stay small.
_FIRST_BLOCK, _BLOCK, _BLOCK_TOKENS = 16, 64, 2048
# Passes over a block after which a row that has not settled is left to ordinary decoding.
_PASSES = 3

# `context_latents` (batch_size, num_contexts, num_latents, text_hidden_size) and, for a model whose latents have a
# stride, `context_strides` (batch_size, num_contexts): the arguments of these names.
Latents = dict[str, torch.Tensor]


class Restorer:
    """A model with its processor, and what is known of the pair: found out once.

    Attributes:
        prompt_ids: `(prompt_length,)` int64, the prompt that asks for one context back, with its placeholders.
        room: Tokens that the decoder has positions for behind the prompt.
        segment_room: Most tokens of a segment that both halves have positions for.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.processor = model, processor
        self.prompt_ids = torch.tensor(restoring_prompt_ids(processor))
        self.fingerprints = Fingerprints(model, processor)
        self.room = decoder_positions(model) - len(self.prompt_ids) - skipped_positions(model)
        longest, config = min(context_room(model), self.room - 1), model.config
        stride = config.latent_stride
        self.segment_room = longest if stride is None else min(longest, stride * config.num_latents)
        # Whether guessing blocks pays for this model; None until it was tried.
        self._guesses: bool | None = None

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text, from the model's generation settings.

        Raises:
            ValueError: If it has none.
        """
        stop = self.model.generation_config.eos_token_id
        if stop is None:
            raise ValueError("`model` has no `generation_config.eos_token_id`: set it to the ids that end a reply.")
        return [stop] if isinstance(stop, int) else list(stop)

    @cached_property
    def never_ids(self) -> list[int]:
        """Ids that restoring never chooses: the marks of a context. No text has them, and a model that has learnt
        little may write them; where such a reply is gone on from they would be taken for a context of the prompt."""
        config = self.model.config
        marks = [config.context_token_id, config.context_start_token_id, config.context_end_token_id]
        return [*(self.model.generation_config.suppress_tokens or []), *marks]

    def generate(
        self,
        latents: torch.Tensor,
        max_new_tokens: int,
        strides: torch.LongTensor | None = None,
        forced: Sequence[Sequence[tuple[int, int]]] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy decoding from latents.

        Args:
            latents: `(batch_size, num_latents, text_hidden_size)`.
            max_new_tokens: Where to stop at the latest, or at the decoder's last position.
            strides: `(batch_size,)` int64, tokens that each latent stands for; for a model with a stride.
            forced: For each row the token ids to force, as (step, id).
            lengths: With `forced`, after how many tokens each row stops.

        Returns:
            The new ids of each row, without the stop token and what follows it.
        """
        contexts = context_arguments(latents, strides)
        steps = None if forced is None or lengths is None else self._steps(forced, lengths)
        prompts = self.prompt_ids.to(latents.device).expand(len(latents), -1)
        max_new_tokens = min(max_new_tokens, self.room)
        new_ids: list[list[int]] = [[] for _ in latents]
        if self._guesses is None:
            self._guesses = self._try_guessing(prompts, contexts, max_new_tokens, steps)
        if self._guesses:
            new_ids = self._guess(prompts, contexts, max_new_tokens, steps)
        waiting = self._waiting(new_ids, max_new_tokens)
        if self._guesses:
            given_up = sum(len(rows) for count, rows in waiting.items() if count < _FIRST_BLOCK)
            self._guesses = given_up <= len(latents) // 2
        for count, rows in waiting.items():
            known = torch.tensor([new_ids[row] for row in rows], dtype=torch.long, device=prompts.device)
            rest = self._decode(
                torch.cat([prompts[rows], known.reshape(len(rows), count)], dim=1),
                _rows(contexts, rows),
                max_new_tokens - count,
                None if steps is None else steps[rows, count:],
            )
            for row, ids in zip(rows, rest):
                new_ids[row] += ids
        if lengths is not None:
            return [row[:length] for row, length in zip(new_ids, lengths)]
        ends = [next((end for end, token in enumerate(row) if token in self.stop_ids), None) for row in new_ids]
        return [row[:end] for row, end in zip(new_ids, ends)]

    def _steps(self, forced: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int]) -> torch.LongTensor:
        """What [`ForcedTokens`] takes: corrections, and a stop behind the last token."""
        steps = torch.full((len(lengths), max(lengths) + 1), -1)
        for row, (corrections, length) in enumerate(zip(forced, lengths)):
            for step, token_id in corrections:
                steps[row, step] = token_id
            steps[row, length] = self.stop_ids[0]
        return steps

    def _try_guessing(
        self, prompts: torch.LongTensor, contexts: Latents, max_new_tokens: int, steps: torch.LongTensor | None
    ) -> bool:
        # One row and few tokens say it: how a model finds its place does not depend on the text.
        tried = min(max_new_tokens, _FIRST_BLOCK)
        if not self._can_guess():
            return False
        first = self._guess(prompts[:1], _rows(contexts, [0]), tried, steps)
        return not self._waiting(first, tried)

    def _guess(
        self, prompts: torch.LongTensor, contexts: Latents, max_new_tokens: int, steps: torch.LongTensor | None
    ) -> list[list[int]]:
        return guess_in_blocks(self.model, prompts, contexts, max_new_tokens, steps, self.stop_ids, self.never_ids)

    def _can_guess(self) -> bool:
        """Whether the greedy choice is the likeliest token and nothing else, and guesses can be taken back."""
        settings = self.model.generation_config.to_diff_dict()
        on_cpu = self.model.device.type == "cpu"
        return on_cpu and settings.keys() <= _NOT_GREEDY and has_full_attention(self.model)

    def _waiting(self, new_ids: Sequence[Sequence[int]], max_new_tokens: int) -> dict[int, list[int]]:
        """Rows that are not done, by the number of their new ids."""
        waiting: dict[int, list[int]] = {}
        for row, ids in enumerate(new_ids):
            if len(ids) < max_new_tokens and not set(ids[-1:]) & set(self.stop_ids):
                waiting.setdefault(len(ids), []).append(row)
        return waiting

    def _decode(
        self, prompts: torch.LongTensor, contexts: Latents, max_new_tokens: int, forced: torch.LongTensor | None
    ) -> list[list[int]]:
        """Greedy decoding token by token: the new ids of each row, with the stop token and what follows it."""
        chosen = self.model.generation_config.cache_implementation
        # A static cache cannot take guesses back.
        drafts = len(prompts) == 1 and forced is None and chosen is None
        settings = {
            **GREEDY,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.stop_ids[0],
            "suppress_tokens": self.never_ids,
            "prompt_lookup_num_tokens": _DRAFTED_TOKENS if drafts else None,
        }
        # On a GPU transformers would compile a step for each size of the batch and the cache. Under autocast keys and
        # values may differ in dtype, which a static cache does not take.
        on_cpu = self.model.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if len(prompts) > 1 and chosen is None and on_cpu:
            return generate_in_stretches(self.model, prompts, contexts, max_new_tokens, forced, settings)
        output = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            logits_processor=LogitsProcessorList([] if forced is None else [ForcedTokens(forced)]),
            max_new_tokens=max_new_tokens,
            **contexts,
            **settings,
        )
        return output[:, prompts.shape[1] :].tolist()


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
    contexts: Latents,
    max_new_tokens: int,
    forced: torch.LongTensor | None,
    settings: dict[str, Any],
) -> list[list[int]]:
    """What `generate()` gives, in less time on a CPU.

    A growing cache is copied whole at each step. A static one is not, but attention runs over all of it, filled or
    not, and rows that have stopped run on until the last one stops. So every 64 steps the rows that have not stopped
    go on in a longer static cache.

    Args:
        prompt_ids: `(batch_size, prompt_length)` int64, with placeholders and without padding.
        contexts: What [`context_arguments`] gives.
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
        # Latents that are in the cache already are passed over; positions are found from all of the prompt.
        ids = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=processors,
            max_new_tokens=steps,
            past_key_values=cache,
            **_rows(contexts, rows),
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


def guess_in_blocks(
    model: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    contexts: Latents,
    max_new_tokens: int,
    forced: torch.LongTensor | None,
    stop_ids: list[int],
    never_ids: list[int],
) -> list[list[int]]:
    """Greedy tokens as far as they can be had by Jacobi decoding (Santilli et al., arXiv 2305.10427).

    One pass over a block of guesses gives the greedy choice behind each. Where the choices repeat the guesses, they
    are what decoding token by token would have chosen; where not, they are the next guesses. A model that finds its
    place in the latents by counting is right in the first pass and knows it in the second; one that needs the words
    before is left to ordinary decoding after three passes over sixteen tokens.

    Args:
        model: A `C3ForConditionalGeneration` whose decoder has full attention.
        prompt_ids, contexts, max_new_tokens, forced: As for [`generate_in_stretches`].
        stop_ids: Ids that end a row.
        never_ids: Ids that are not chosen.

    Returns:
        The first new ids of each row. A row is done if its last one is a stop or there are `max_new_tokens`; rows that
        are not, and were given up in the same block, have the same number.
    """
    stops = torch.tensor(stop_ids, device=prompt_ids.device)
    new_ids: list[list[int]] = [[] for _ in prompt_ids]
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=prompt_ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1, **contexts)
    rows, last = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids[:, -1:]
    done, width = 0, _FIRST_BLOCK
    while len(rows) and done < max_new_tokens:
        width = min(width, max_new_tokens - done)
        wanted = None if forced is None else forced[rows, done : done + width]
        greedy, certain, lengths = _settle(model, cache, last, width, wanted, stops, never_ids)
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
        width = min(_BLOCK, max(_FIRST_BLOCK, _BLOCK_TOKENS // max(1, len(rows))))
    return new_ids


def _settle(
    model: PreTrainedModel,
    cache: DynamicCache,
    last: torch.LongTensor,
    width: int,
    forced: torch.LongTensor | None,
    stops: torch.LongTensor,
    never_ids: list[int],
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
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
        logits[..., never_ids] = -torch.inf
        greedy = logits.max(dim=-1).indices
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


def context_arguments(latents: torch.Tensor, strides: torch.LongTensor | None) -> Latents:
    """The model's arguments for one context a row: latents `(batch_size, num_latents, text_hidden_size)` and strides
    `(batch_size,)`."""
    contexts = {"context_latents": latents.unsqueeze(1)}
    return contexts if strides is None else {**contexts, "context_strides": strides.unsqueeze(1)}


def _rows(contexts: Latents, rows: Any) -> Latents:
    return {name: tensor[rows] for name, tensor in contexts.items()}


def context_room(model: PreTrainedModel) -> int:
    """Tokens of a context that the encoder has positions for, beside the queries and their marker."""
    # Queries that keep the positions of their text take none behind it.
    behind = 1 if model.config.latent_stride is not None else 1 + model.config.num_latents
    return model.config.encoder_config.max_position_embeddings - behind


def decoder_positions(model: PreTrainedModel) -> int:
    """Positions of the decoder, for prompt and reply together."""
    return model.config.text_config.max_position_embeddings


def cache_bytes(config: PretrainedConfig, batch_size: int, length: int, element_size: int) -> int:
    """Bytes of a decoder's keys and values; families without grouped heads give no `num_key_value_heads`."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * batch_size * length * element_size


def skipped_positions(model: PreTrainedModel) -> int:
    """Positions that a context takes in the decoder beyond those of its tokens."""
    stride = model.config.latent_stride
    return 0 if stride is None else model.config.num_latents * (stride - 1)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of `lengths` in batches of like lengths, longest first, so that memory peaks at the start."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generation_budget(num_tokens: int) -> int:
    """New tokens allowed for restoring `num_tokens`: an eighth more than needed, and some."""
    return num_tokens + num_tokens // 8 + 16


def decode_tokens(processor: ProcessorMixin, token_ids: Sequence[int]) -> str:
    """Text of token ids as they are: nothing cleaned up, special tokens dropped."""
    return processor.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
