# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""PyTorch model of Context Cascade Compression (C3, arXiv 2511.15244).

A context encoder reads a text followed by N learned queries; its last hidden states at the queries go through one
linear projector and take the place of N placeholder embeddings in the prompt of a decoder. This file is both a module
of the package and one of the remote-code files of every C3 repository on the Hub.
"""

from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_c3 import C3Config
from .contexts_c3 import check_contexts, check_no_context_is_missing, inline_contexts_are_read_raw, resolve_latents
from .generation_c3 import CACHE_NAME, C3GenerationMixin, one_cache
from .positions_c3 import (
    check_context_length,
    check_room,
    context_positions,
    continued_positions,
    learnt_positions,
    merge_latents,
    warn_of_long_context,
)


logger = logging.get_logger(__name__)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class C3ModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`C3Model`]: that of its decoder, plus

    context_latents (`torch.FloatTensor` of shape `(batch_size, num_contexts, num_latents, text_hidden_size)`,
    *optional*):
        The latents that were merged into the prompt; `None` if no context was given.
    """

    context_latents: Optional[torch.FloatTensor] = None


@dataclass
class C3CausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`C3ForConditionalGeneration`]: that of a causal language model, and `context_latents` likewise."""

    context_latents: Optional[torch.FloatTensor] = None


class C3PreTrainedModel(PreTrainedModel):
    """Loading and saving, and what transformers asks of every C3 model."""

    config_class = C3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The two halves name their own unsplittable layers; transformers collects them from the sub-models.
    _no_split_modules = []
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class C3Model(C3PreTrainedModel):
    """Context encoder, latent queries, projector and decoder body, without a language modelling head."""

    def __init__(self, config: C3Config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.latent_queries = nn.Embedding(config.num_latents, config.encoder_config.hidden_size)
        widths = config.encoder_config.hidden_size, config.text_config.hidden_size
        self.projector = nn.Linear(*widths, bias=config.projector_bias)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @property
    def decoder_positions(self) -> Optional[int]:
        """Positions in the decoder's table; `None` where it computes them, as with rotary embeddings."""
        return learnt_positions(self.language_model)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self):
        return self.language_model

    def get_encoder(self, modality=None):
        return self.encoder

    def get_encoder_latents(
        self,
        context_input_ids: torch.LongTensor,
        context_attention_mask: Optional[torch.Tensor] = None,
        context_strides: Optional[torch.LongTensor] = None,
    ) -> torch.FloatTensor:
        """
        Read contexts and return the encoder's last hidden states at the latent queries, before the projector
        (paper, section 3.1).

        Args:
            context_input_ids (`torch.LongTensor` of shape `(batch_size, num_contexts, context_length)` or
                `(batch_size, context_length)`): ids of the texts, without markers, padded left or right with any id.
            context_attention_mask (`torch.Tensor` of the same shape, *optional*): 1 at text, 0 at padding. An empty
                text is a row of zeros.
            context_strides (`torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*): tokens of
                text each latent of a context stands for, 1 to `config.latent_stride`, which is the default. Only for
                models with a stride.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_contexts, num_latents, encoder_hidden_size)`.

        Raises:
            ValueError: if the ids are not two- or three-dimensional, hold the start marker, the mask has another
                shape, or strides do not fit.
        """
        contexts = check_contexts(self.config, context_input_ids, context_attention_mask, None, context_strides)
        return self._read(contexts)

    def _read(self, contexts):
        """Encoder latents of checked contexts."""
        num_latents = self.config.num_latents
        batch_size, num_contexts, context_length = contexts.input_ids.shape
        if not torch.compiler.is_compiling():
            check_context_length(self.config, context_length, learnt_positions(self.encoder))
        input_ids = contexts.input_ids.reshape(batch_size * num_contexts, context_length)
        start = input_ids.new_full((input_ids.shape[0], 1), self.config.encoder_context_start_token_id)
        # The queries see the text, the start marker and the queries before them. The end marker that the original
        # puts behind them is left out: the encoder is causal, so nothing that is used could see it.
        text_embeds = self.encoder.get_input_embeddings()(torch.cat([input_ids, start], dim=1))
        queries = self.latent_queries(torch.arange(num_latents, device=input_ids.device)).to(text_embeds)
        inputs_embeds = torch.cat([text_embeds, queries.expand(input_ids.shape[0], -1, -1)], dim=1)
        # Reentrant checkpointing trains nothing behind an input without a gradient: a frozen table under an adapter.
        if self.training and torch.is_grad_enabled() and not inputs_embeds.requires_grad:
            inputs_embeds.requires_grad_(any(parameter.requires_grad for parameter in self.encoder.parameters()))
        attention_mask, position_ids = context_positions(self.config, contexts, inputs_embeds.dtype)
        outputs = self.encoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, -num_latents:].reshape(batch_size, num_contexts, num_latents, -1)

    def latents_of(self, contexts) -> torch.FloatTensor:
        """
        The latents that checked contexts bring, or those they are compressed to.

        Args:
            contexts ([`Contexts`]): what `check_contexts` returned.

        Returns:
            `torch.FloatTensor` of shape `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`.
        """
        if contexts.latents is not None:
            return contexts.latents
        if not self.training:
            warn_of_long_context(self.config, contexts.input_ids.shape[2])
        return self._project(self._read(contexts))

    def _project(self, latents):
        # A projector may be kept in a finer dtype than the model, to be trained; a quantised one says no float dtype.
        dtype = self.projector.weight.dtype
        return self.projector(latents.to(dtype if dtype in _FLOATS else self.latent_queries.weight.dtype))

    def get_context_features(
        self,
        context_input_ids: torch.LongTensor,
        context_attention_mask: Optional[torch.Tensor] = None,
        context_strides: Optional[torch.LongTensor] = None,
    ) -> torch.FloatTensor:
        """
        Compress contexts into latents of the decoder's width: [`get_encoder_latents`], then the projector.

        Args:
            context_input_ids (`torch.LongTensor` of shape `(batch_size, num_contexts, context_length)` or
                `(batch_size, context_length)`): see [`get_encoder_latents`].
            context_attention_mask (`torch.Tensor` of the same shape, *optional*): 1 at text, 0 at padding.
            context_strides (`torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*): see
                [`get_encoder_latents`].

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_contexts, num_latents, text_hidden_size)`.
        """
        return self._project(self.get_encoder_latents(context_input_ids, context_attention_mask, context_strides))

    def get_placeholder_mask(
        self, input_ids: Optional[torch.LongTensor], inputs_embeds: torch.FloatTensor
    ) -> torch.BoolTensor:
        """Placeholders `(batch_size, sequence_length)`, found by the ids or, without them, by the embeddings."""
        if input_ids is not None:
            return input_ids == self.config.context_token_id
        token = torch.tensor(self.config.context_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        context_input_ids: Optional[torch.LongTensor] = None,
        context_attention_mask: Optional[torch.Tensor] = None,
        context_latents: Optional[torch.FloatTensor] = None,
        context_strides: Optional[torch.LongTensor] = None,
        cache: Optional[Cache] = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, C3ModelOutputWithPast]:
        """As [`C3ForConditionalGeneration.forward`], where everything is described; `context_latents` is a tensor."""
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of `input_ids` and `inputs_embeds` must be given, got "
                + ("neither." if input_ids is None else "both. Drop one of them.")
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds.shape[0] == 0:
            raise ValueError("the batch is empty: `input_ids` (or `inputs_embeds`) must have at least one row.")
        given = (context_input_ids, context_attention_mask, context_latents, context_strides)
        contexts, placeholder_mask, strides = None, None, None
        if any(argument is not None for argument in given):
            placeholder_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            contexts = check_contexts(self.config, *given, placeholder_mask=placeholder_mask, prompt_ids=input_ids)
            strides = contexts.strides
        if position_ids is None and not torch.compiler.is_compiling():
            past_length = 0 if cache is None else int(cache.get_seq_length())
            num_contexts = 0 if contexts is None else contexts.shape[1]
            check_room(self.config, past_length + inputs_embeds.shape[1], num_contexts, self.decoder_positions)
        if contexts is not None:
            context_latents = self.latents_of(contexts)
            inputs_embeds = merge_latents(inputs_embeds, placeholder_mask, context_latents)
        elif self.training:
            check_no_context_is_missing(self.config, input_ids)
        position_delta = None
        carried = getattr(cache, "position_delta", None) is not None
        if position_ids is None and (strides is not None or carried):
            attention_mask, position_ids, position_delta = continued_positions(
                self.config, inputs_embeds, attention_mask, cache, placeholder_mask, strides
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **{**kwargs, "return_dict": True},
        )
        cache = getattr(outputs, CACHE_NAME)
        if position_delta is not None and cache is not None:
            cache.position_delta = position_delta
        return C3ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            context_latents=context_latents,
            **{CACHE_NAME: cache},
        )


class C3ForConditionalGeneration(C3PreTrainedModel, C3GenerationMixin):
    """
    C3 with a language modelling head. Without a context it is the plain decoder, bit for bit.

    Example:

    ```python
    >>> import c3_hf
    >>> from transformers import AutoModelForCausalLM, AutoProcessor

    >>> path = c3_hf.tiny_model_path()
    >>> model = AutoModelForCausalLM.from_pretrained(path)
    >>> processor = AutoProcessor.from_pretrained(path)
    >>> messages = processor.restore_messages("It was a bright cold day in April.")
    >>> inputs = processor.apply_chat_template(messages)
    >>> new_ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    >>> texts = processor.batch_decode(new_ids)
    ```
    """

    _tp_plan = {"lm_head": "colwise_rep"}

    def __init__(self, config: C3Config):
        super().__init__(config)
        self.model = C3Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # The table's name depends on the decoder's family: `embed_tokens` in most, `wte` in GPT-2.
        table = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.add_model_tags(["c3", "context-compression", "arxiv:2511.15244"])
        self.post_init()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`: a whole Hub folder with the remote code, but for a card."""
        # transformers writes the one auto class that a class is registered for; generate() must be reachable through
        # plain AutoModel too.
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": "modeling_c3.C3ForConditionalGeneration"}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_encoder(self, modality=None):
        return self.model.get_encoder()

    def resize_encoder_token_embeddings(self, new_num_tokens: int, **kwargs) -> nn.Embedding:
        """
        Resize the context encoder's embedding table; `resize_token_embeddings` does the decoder's.

        Args:
            new_num_tokens (`int`): rows of the new table.
            kwargs: those of `resize_token_embeddings`.

        Returns:
            `nn.Embedding`: the encoder's new table.
        """
        embeddings = self.model.encoder.resize_token_embeddings(new_num_tokens, **kwargs)
        self.config.encoder_config.vocab_size = embeddings.weight.shape[0]
        return embeddings

    def get_encoder_latents(self, context_input_ids, context_attention_mask=None, context_strides=None):
        """See [`C3Model.get_encoder_latents`]."""
        return self.model.get_encoder_latents(context_input_ids, context_attention_mask, context_strides)

    def get_context_features(self, context_input_ids, context_attention_mask=None, context_strides=None):
        """See [`C3Model.get_context_features`]."""
        return self.model.get_context_features(context_input_ids, context_attention_mask, context_strides)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        context_input_ids: Optional[torch.LongTensor] = None,
        context_attention_mask: Optional[torch.Tensor] = None,
        context_latents: Optional[torch.FloatTensor] = None,
        context_strides: Optional[torch.LongTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        cache: Optional[Cache] = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, C3CausalLMOutputWithPast]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompts with `num_latents`
                placeholders (`config.context_token_id`) for each context, anywhere.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 at tokens, 0 at
                padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*).
            past_key_values (`Cache`, *optional*): keys and values of the decoder; `cache` in newer transformers.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                instead of `input_ids`; rows equal to the placeholder's embedding are the placeholders.
            context_input_ids (`torch.LongTensor` of shape `(batch_size or 1, num_contexts, context_length)` or
                `(batch_size or 1, context_length)`, *optional*): ids of the contexts, text only, padded left or right.
                One row serves every prompt.
            context_attention_mask (`torch.Tensor` of the same shape, *optional*): 1 at text, 0 at padding. A row with
                fewer contexts than others has slots of zeros at its end.
            context_latents (`torch.FloatTensor` of shape
                `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`, *optional*): instead of
                `context_input_ids`, what [`get_context_features`] returned; or a `CompressedContext`, which gives it.
            context_strides (`torch.LongTensor` of shape `(batch_size or 1, num_contexts)`, *optional*): tokens of
                text that each latent of a context stands for, `config.latent_stride` where it is not given. Latents
                must come with the strides they were made with.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): -100 is ignored. The loss
                is the mean cross-entropy over all other tokens of the batch, in float32.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(kept_length,)`, defaults to 0): compute logits for
                the last so many positions, or for these; 0 means all.
            cache (`Cache`, *optional*): another name of `past_key_values`.

        Returns:
            [`C3CausalLMOutputWithPast`] with `logits` of shape `(batch_size, kept_length, vocab_size)`, or a tuple.

        Raises:
            TypeError: if `context_latents` is neither a tensor nor gives one.
            ValueError: if neither or both of `input_ids` and `inputs_embeds` are given, a row has fewer placeholders
                than its contexts need, contexts and latents are both given, shapes or batch sizes do not fit, the
                batch is empty, or `labels` come with contexts in line, which only `generate()` splits.
        """
        has_context = context_input_ids is not None or context_latents is not None
        if not has_context and inline_contexts_are_read_raw(self.config, input_ids, labels, self.training):
            logger.warning_once(
                "`input_ids` holds contexts in line, but only `generate()` splits them: forward() reads them as raw "
                "text. Pass `context_input_ids` to compress them."
            )
        context_latents, context_strides = resolve_latents(context_latents, context_strides, self)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            context_input_ids=context_input_ids,
            context_attention_mask=context_attention_mask,
            context_latents=context_latents,
            context_strides=context_strides,
            **{**kwargs, "return_dict": True},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return C3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            context_latents=outputs.context_latents,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


C3Model.register_for_auto_class("AutoModel")
C3ForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["C3ForConditionalGeneration", "C3Model", "C3PreTrainedModel"]
