# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""How a C3 model generates: contexts are compressed once, then transformers' own decoding runs on the short prompt.

One of the remote-code files of every C3 repository on the Hub.
"""

import copy
from dataclasses import fields
from typing import Optional

import torch
from torch.nn import functional
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from .contexts_c3 import (
    check_contexts,
    find_inline_contexts,
    resolve_latents,
)
from .positions_c3 import carried_delta, check_room, merge_latents, pad_contexts, pad_rows, stride_positions


CONTEXT_ARGUMENTS = ("context_input_ids", "context_attention_mask", "context_latents", "context_strides")
# What transformers calls the decoder's cache, as argument and in outputs: `past_key_values` up to 5.23, then `cache`.
# Everything of this package that hands a cache on to transformers does it under this name.
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name != "last_hidden_state")


def one_cache(past_key_values, cache):
    """The cache given under either of its names; `None` if there is none, ValueError if there are two."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument, got both. Give one of them.")
    return past_key_values if cache is None else cache


class C3GenerationMixin(GenerationMixin):
    """`generate()` for models with contexts: as tensors, as latents, or written in line in `input_ids`."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """
        Compress the contexts, then generate as any causal language model does.

        The encoder runs once a call: not for each step, beam or returned sequence.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): the prompts; the same as
                `input_ids`.
            generation_config (`GenerationConfig`, *optional*): as in `transformers`.
            args, kwargs: everything `transformers.GenerationMixin.generate` takes, and the context arguments of
                [`C3ForConditionalGeneration.forward`], as `context_latents` a `CompressedContext` too. Contexts may
                instead stand in line in the prompts, between the tokens `config.inline_context_start_token_id` and
                `config.inline_context_end_token_id`; they are cut out and compressed. Logits processors then see the
                short prompt, so that for example `no_repeat_ngram_size` does not forbid the copy.

        Returns:
            As `transformers`: the prompts as they were given, followed by the new tokens. `max_length` counts
            those prompts too.

        Raises:
            TypeError: if `context_latents` is neither a tensor nor gives one.
            ValueError: if contexts are given both in line and as tensors, a row has fewer placeholders than its
                contexts need, shapes or batch sizes do not fit, prompts and new tokens are more than the decoder has
                positions for, or an option is asked for under which the contexts would be lost
                (`prefill_chunk_size`, `cache_implementation="paged"`).
        """
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
            if getattr(cache, "position_delta", None) is not None and cache.get_seq_length() == 0:
                # Emptied since: nothing in it is ahead of its number.
                cache.position_delta = None
        if "context_latents" in kwargs:
            latents, strides = resolve_latents(kwargs["context_latents"], kwargs.get("context_strides"), self)
            kwargs["context_latents"], kwargs["context_strides"] = latents, strides
        name = "inputs" if inputs is not None else "input_ids"
        prompt_ids = inputs if inputs is not None else kwargs.get("input_ids")
        split = None
        if prompt_ids is not None and prompt_ids.dim() == 2:
            split = split_inline_contexts(self.config, prompt_ids, kwargs.get("attention_mask"))
        short_ids = prompt_ids if split is None else split["input_ids"]
        if split is not None:
            self._refuse_mixed_contexts(kwargs, name)
            inputs = None if inputs is None else split.pop("input_ids")
            kwargs |= split
        in_ids = short_ids is not None and short_ids.shape[1] > 0
        prompts = short_ids if in_ids else kwargs.get("inputs_embeds")
        if prompts is not None:
            given = prompts if split is None else prompt_ids
            generation_config = _count_new_tokens(self, generation_config, kwargs, given.shape[1])
        if any(kwargs.get(argument) is not None for argument in CONTEXT_ARGUMENTS):
            _refuse_options(generation_config or self.generation_config, kwargs)
            self._compress_for_generation(prompts, generation_config, kwargs)
        elif prompts is not None:
            self._fit_new_tokens(prompts, 0, generation_config, kwargs)
        outputs = super().generate(inputs, generation_config, *args, **kwargs)
        return outputs if split is None else _put_prompt_back(outputs, prompt_ids, short_ids.shape[1])

    def _refuse_mixed_contexts(self, kwargs, name):
        given = [argument for argument in CONTEXT_ARGUMENTS if kwargs.get(argument) is not None]
        if given:
            raise ValueError(
                f"`{name}` holds contexts in line and `{given[0]}` was given too. Use one of the two ways."
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"`{name}` holds contexts in line and `inputs_embeds` was given too: the embeddings cannot be split. "
                "Pass the contexts as `context_input_ids`."
            )

    def _compress_for_generation(self, prompts, generation_config, kwargs):
        """
        Put latents in the place of the contexts in `kwargs`, and where the prompts hold placeholders for them.

        Args:
            prompts (`torch.Tensor` of shape `(batch_size, sequence_length)` or
                `(batch_size, sequence_length, text_hidden_size)`): ids or embeddings.
            generation_config (`GenerationConfig`, *optional*): the caller's.
            kwargs (`dict`): of `generate`; changed in place.
        """
        given = {name: kwargs.pop(name, None) for name in CONTEXT_ARGUMENTS}
        if prompts is None:
            raise ValueError("contexts were given without a prompt: pass `input_ids` with placeholders for them.")
        prompt_ids = prompts if prompts.dim() == 2 else None
        placeholder_mask = self.model.get_placeholder_mask(prompt_ids, prompts)
        contexts = check_contexts(self.config, **given, placeholder_mask=placeholder_mask, prompt_ids=prompt_ids)
        self._fit_new_tokens(prompts, contexts.shape[1], generation_config, kwargs)
        latents = self.model.latents_of(contexts).expand(prompts.shape[0], -1, -1, -1)
        # Slots that pad rows with fewer contexts become zeros, the sign of an unused slot among given latents.
        used = placeholder_mask.sum(dim=1, keepdim=True).to(latents.device)
        slots = torch.arange(latents.shape[1], device=latents.device) * self.config.num_latents
        kwargs["context_latents"] = torch.where((slots < used)[..., None, None], latents, 0)
        kwargs["context_placeholder_mask"] = placeholder_mask
        if contexts.strides is not None:
            kwargs["context_strides"] = contexts.strides.expand(prompts.shape[0], -1)
        # Then the ids that transformers collects begin behind the prompts.
        kwargs["context_embeds_length"] = 0 if prompt_ids is not None else prompts.shape[1]

    def _fit_new_tokens(self, prompts, num_contexts, generation_config, kwargs):
        """Raise if the caller asks for more tokens than the decoder has positions for; fit the model's own number."""
        table_length = self.model.decoder_positions
        asked = kwargs.get("max_new_tokens") or getattr(generation_config, "max_new_tokens", None)
        # transformers adds 20 tokens where nothing is said.
        own = 20 if self.generation_config.max_new_tokens is None else self.generation_config.max_new_tokens
        new_tokens = own if asked is None else asked
        room = check_room(self.config, prompts.shape[1], num_contexts, table_length, new_tokens)
        if room is None or new_tokens <= room:
            return
        if asked is not None:
            raise ValueError(
                f"prompts of {prompts.shape[1]} tokens and `max_new_tokens`={asked} do not fit the decoder's "
                f"{table_length} positions. Ask for at most {room}, or shorten the prompts."
            )
        kwargs["max_new_tokens"] = room

    def prepare_inputs_for_generation(
        self,
        input_ids,
        inputs_embeds=None,
        context_latents=None,
        context_strides=None,
        context_placeholder_mask=None,
        context_embeds_length=0,
        **kwargs,
    ):
        """
        As in transformers; a step that reads a stretch of the prompt gets embeddings with latents in their places.

        Beside the prefill that is a second turn on a kept cache: then the latents of placeholders that are in the
        cache already are passed over. What was generated is ordinary, placeholders that prompt lookup copies too.
        """
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        cache = kwargs.get(CACHE_NAME)
        embeds, ids = model_inputs.get("inputs_embeds"), model_inputs.get("input_ids")
        step_length = (ids if embeds is None else embeds).shape[1]
        if context_latents is None:
            delta = carried_delta(cache, input_ids.shape[0])
            if delta is not None and model_inputs.get("position_ids") is not None:
                model_inputs["position_ids"] = model_inputs["position_ids"] + delta
            return model_inputs
        prompt_length, total_length = context_placeholder_mask.shape[1], context_embeds_length + input_ids.shape[1]
        placeholders = functional.pad(context_placeholder_mask, (0, total_length - prompt_length))
        if context_strides is not None:
            self._place_by_stride(
                model_inputs, kwargs.get("attention_mask"), placeholders, context_strides, step_length
            )
        if total_length - step_length < prompt_length:
            model_inputs["inputs_embeds"] = merge_latents(
                self.get_input_embeddings()(ids) if embeds is None else embeds,
                placeholders[:, -step_length:],
                context_latents,
                first_latent=placeholders[:, :-step_length].sum(dim=1),
            )
            model_inputs["input_ids"] = None
        return model_inputs

    def _place_by_stride(self, model_inputs, attention_mask, placeholders, context_strides, step_length):
        if attention_mask is None:
            attention_mask = torch.ones_like(placeholders, dtype=torch.long)
            # generate() drops a mask of ones. Without one transformers takes positions that do not count up by one
            # for packed sequences.
            if model_inputs.get("attention_mask") is None:
                model_inputs["attention_mask"] = attention_mask
        positions = stride_positions(self.config, placeholders, attention_mask, context_strides)
        # Cloned, because one column counts as contiguous with any stride, and another stride compiles the step again.
        model_inputs["position_ids"] = positions[:, -step_length:].clone(memory_format=torch.contiguous_format)
        cache = model_inputs.get(CACHE_NAME)
        if cache is not None:
            # For a next turn that does not bring the latents again.
            cache.position_delta = positions[:, -1:] - (attention_mask.long().sum(dim=1, keepdim=True) - 1)

    def generate_batch(self, inputs, *args, **kwargs):
        """
        Continuous batching, for prompts without contexts.

        Raises:
            ValueError: if contexts are given: the paged scheduler of transformers feeds token ids only, so they would
                never reach the model.
        """
        given = [name for name in CONTEXT_ARGUMENTS if kwargs.get(name) is not None]
        inline = any(find_inline_contexts(self.config, torch.tensor([row])) for row in inputs)
        if given or inline:
            raise ValueError(
                f"`generate_batch` cannot serve contexts, got {'in-line contexts' if inline else f'`{given[0]}`'}: "
                "continuous batching feeds token ids only. Use `generate`."
            )
        return super().generate_batch(inputs, *args, **kwargs)


def split_inline_contexts(config, input_ids, attention_mask=None) -> Optional[dict]:
    """
    Cut in-line contexts out of prompts and put blocks of placeholders in their place.

    Args:
        config (`C3Config`).
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`).
        attention_mask (`torch.Tensor` of the same shape, *optional*): padding is dropped and laid anew on the left.

    Returns:
        The arguments of `generate` in the place of these, or `None` if there is no in-line context: `input_ids` and
        `attention_mask` `(batch_size, prompt_length)`, padded left; `context_input_ids` and `context_attention_mask`
        `(batch_size, num_contexts, context_length)`, padded right, slots of rows with fewer contexts masked out.
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
    names = ("input_ids", "attention_mask", "context_input_ids", "context_attention_mask")
    return dict(zip(names, (*pad_rows(prompts, left=True), *pad_contexts(contexts))))


def _refuse_options(generation_config, kwargs):
    for name, lost in (("prefill_chunk_size", None), ("cache_implementation", "paged")):
        value = kwargs.get(name, getattr(generation_config, name, None))
        if value is not None and (lost is None or value == lost):
            raise ValueError(
                f"`{name}`={value!r} cannot be combined with contexts: the latents would not reach the prompt. Leave "
                "it out."
            )
    if kwargs.get("inputs_embeds") is None:
        return
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if kwargs.get(name, getattr(generation_config, name, None)) is not None:
            raise ValueError(
                f"`{name}` cannot be combined with `inputs_embeds`: guessed tokens are checked by their ids. Give "
                "`input_ids` alone."
            )


def _count_new_tokens(model, generation_config, kwargs, prompt_length):
    """
    Turn the caller's `max_length` and `min_length` into numbers of new tokens, so that they win over the number in the
    model's own settings, and count the prompt as the caller gave it, not the compressed one.

    Returns:
        The generation configuration to go on with; `kwargs` are changed in place.
    """
    unset = GenerationConfig()
    for end in ("max", "min"):
        length, new = f"{end}_length", f"{end}_new_tokens"
        if kwargs.get(new) is not None or getattr(generation_config, new, None) is not None:
            continue
        value = kwargs.pop(length, None)
        for settings in filter(None, (generation_config, model.generation_config)):
            own = getattr(settings, length, None)
            if value is None and own != getattr(unset, length) and getattr(settings, new, None) is None:
                value = own
        if value is None:
            continue
        if end == "max" and value <= prompt_length:
            raise ValueError(
                f"`max_length`={value} counts the prompt, which has {prompt_length} tokens: there is no room for a "
                "reply. Give `max_new_tokens`."
            )
        kwargs[new] = max(value - prompt_length, 0)
        if generation_config is not None and getattr(generation_config, length) != getattr(unset, length):
            generation_config = copy.deepcopy(generation_config)
            setattr(generation_config, length, getattr(unset, length))
    return generation_config


def _put_prompt_back(outputs, prompt_ids, short_length):
    """Replace the compressed prompt at the front of the generated sequences by the one the caller gave."""
    sequences = outputs.sequences if isinstance(outputs, ModelOutput) else outputs
    prompts = prompt_ids.repeat_interleave(sequences.shape[0] // prompt_ids.shape[0], dim=0)
    sequences = torch.cat([prompts.to(sequences.device), sequences[:, short_length:]], dim=1)
    if isinstance(outputs, ModelOutput):
        outputs.sequences = sequences
        return outputs
    return sequences
