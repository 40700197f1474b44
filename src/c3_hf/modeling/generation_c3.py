# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""How a C3 model generates: contexts are compressed once, then transformers' own decoding runs on the short prompt.

One of the remote-code files of every C3 repository on the Hub.
"""

import copy

import torch
from torch.nn import functional
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .contexts_c3 import (
    check_blocks,
    check_context_arguments,
    check_placeholders,
    find_inline_contexts,
    required_latents,
    resolve_latents,
    resolve_strides,
    split_inline_contexts,
    stride_positions,
)


CONTEXT_ARGUMENTS = ("context_input_ids", "context_attention_mask", "context_latents")


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
                contexts need, shapes or batch sizes do not fit, or an option is asked for under which the contexts
                would be lost (`prefill_chunk_size`, `cache_implementation="paged"`).
        """
        if "context_latents" in kwargs:
            kwargs["context_latents"] = resolve_latents(kwargs["context_latents"], self)
        name = "inputs" if inputs is not None else "input_ids"
        prompt_ids = inputs if inputs is not None else kwargs.get("input_ids")
        attention_mask = kwargs.get("attention_mask")
        split = None
        if prompt_ids is not None and prompt_ids.dim() == 2:
            split = split_inline_contexts(self.config, prompt_ids, attention_mask)
        if split is not None:
            self._refuse_mixed_contexts(kwargs, name)
            kwargs["attention_mask"] = split.attention_mask
            kwargs["context_input_ids"] = split.context_input_ids
            kwargs["context_attention_mask"] = split.context_attention_mask
            generation_config = _shorten_max_length(
                self, generation_config, kwargs, prompt_ids.shape[1] - split.input_ids.shape[1]
            )
            if inputs is not None:
                inputs = split.input_ids
            else:
                kwargs["input_ids"] = split.input_ids
        short_ids = prompt_ids if split is None else split.input_ids
        if any(kwargs.get(argument) is not None for argument in CONTEXT_ARGUMENTS):
            _refuse_options(generation_config or self.generation_config, kwargs)
            self._compress_for_generation(short_ids, kwargs)
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

    def _compress_for_generation(self, prompt_ids, kwargs):
        """
        Put latents `(batch_size, num_contexts, num_latents, text_hidden_size)` in the place of contexts in `kwargs`.

        A model with a stride also finds there the strides of all contexts and where the prompts hold their blocks.
        """
        context_ids = kwargs.pop("context_input_ids", None)
        context_mask = kwargs.pop("context_attention_mask", None)
        latents = kwargs.pop("context_latents", None)
        prompts = prompt_ids if prompt_ids is not None and prompt_ids.shape[1] else kwargs.get("inputs_embeds")
        if prompts is None:
            raise ValueError("contexts were given without a prompt: pass `input_ids` with placeholders for them.")
        check_context_arguments(self.config, prompts.shape[0], context_ids, context_mask, latents)
        required = required_latents(self.config, context_ids, context_mask, latents)
        if prompts.dim() == 2:
            placeholder_mask = prompts == self.config.context_token_id
            check_blocks(self.config, prompts)
        else:
            placeholder_mask = self.model.get_placeholder_mask(None, prompts)
        check_placeholders(placeholder_mask, required)
        strides = kwargs.pop("context_strides", None)
        if latents is None:
            latents = self.get_context_features(context_ids, context_mask, strides)
        strides = resolve_strides(self.config, strides, prompts.shape[0], latents.shape[1], prompts.device)
        if strides is not None:
            kwargs["context_strides"] = strides
            kwargs["context_placeholder_mask"] = placeholder_mask
        latents = latents.expand(prompts.shape[0], -1, -1, -1)
        # Slots that pad rows with fewer contexts become zeros, the sign of an unused slot among given latents.
        used = placeholder_mask.sum(dim=1, keepdim=True).to(latents.device)
        slots = torch.arange(latents.shape[1], device=latents.device) * self.config.num_latents
        kwargs["context_latents"] = torch.where((slots < used)[..., None, None], latents, 0)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        context_placeholder_mask=None,
        **kwargs,
    ):
        # Only a step that reads a stretch of the prompt can meet placeholders. Beside the prefill that is a second
        # turn on a kept cache: then the latents of placeholders already in the cache are passed over.
        contexts = {name: kwargs.pop(name, None) for name in CONTEXT_ARGUMENTS}
        strides = kwargs.pop("context_strides", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        latents = contexts["context_latents"]
        if latents is None:
            return model_inputs
        if strides is not None:
            # What was generated behind the prompts is ordinary, placeholders that prompt lookup copies too.
            prompt_length, total_length = context_placeholder_mask.shape[1], input_ids.shape[1]
            if total_length < prompt_length:
                total_length += prompt_length
            if attention_mask is None:
                attention_mask = context_placeholder_mask.new_ones(len(input_ids), total_length, dtype=torch.long)
                # generate() drops a mask of ones. Without one transformers takes positions that do not count up by
                # one for packed sequences.
                if model_inputs.get("attention_mask") is None:
                    model_inputs["attention_mask"] = attention_mask
            placeholders = functional.pad(context_placeholder_mask, (0, attention_mask.shape[1] - prompt_length))
            positions = stride_positions(self.config, placeholders, attention_mask, strides)
            step = model_inputs["inputs_embeds" if model_inputs.get("inputs_embeds") is not None else "input_ids"]
            model_inputs["position_ids"] = positions[:, -step.shape[1] :].contiguous()
        if model_inputs.get("inputs_embeds") is not None:
            model_inputs["context_latents"] = latents
            return model_inputs
        step_length, total_length = model_inputs["input_ids"].shape[1], input_ids.shape[1]
        if step_length == total_length:
            # After a prompt given as embeddings only, the first step has as many ids as the text so far: one.
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                model_inputs["context_latents"] = latents
        elif step_length > 1:
            is_placeholder = input_ids == self.config.context_token_id
            model_inputs["inputs_embeds"] = self.model.merge_latents(
                self.get_input_embeddings()(model_inputs["input_ids"]),
                is_placeholder[:, -step_length:],
                latents,
                first_latent=is_placeholder[:, :-step_length].sum(dim=1),
            )
            model_inputs["input_ids"] = None
        return model_inputs

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


def _refuse_options(generation_config, kwargs):
    for name, lost in (("prefill_chunk_size", None), ("cache_implementation", "paged")):
        value = kwargs.get(name, getattr(generation_config, name, None))
        if value is not None and (lost is None or value == lost):
            raise ValueError(
                f"`{name}`={value!r} cannot be combined with contexts: the latents would not reach the prompt. Leave "
                "it out."
            )


def _shorten_max_length(model, generation_config, kwargs, shrink):
    """Let `max_length` and `min_length` count the prompt as the caller gave it, not the compressed one."""
    names = [name for name in ("max_length", "min_length") if kwargs.get(name)]
    for name in names:
        kwargs[name] = max(kwargs[name] - shrink, 0)
    if generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        for name in ("max_length", "min_length"):
            if getattr(generation_config, name, None):
                setattr(generation_config, name, max(getattr(generation_config, name) - shrink, 0))
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
