# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""PyTorch model of Context Cascade Compression (C3, arXiv 2511.15244).

A context encoder reads a text followed by N learned queries; its last hidden states at the queries go through one
linear projector and take the place of N placeholder embeddings in the prompt of a decoder. This file is both a module
of the package and one of the remote-code files of every C3 repository on the Hub.
"""

import os
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .card_c3 import write_model_card
from .configuration_c3 import C3Config
from .contexts_c3 import (
    check_blocks,
    check_context_arguments,
    check_context_ids,
    check_context_shapes,
    check_no_context_is_missing,
    check_placeholders,
    find_inline_contexts,
    required_latents,
    resolve_latents,
    resolve_strides,
    stride_positions,
)
from .generation_c3 import C3GenerationMixin


logger = logging.get_logger(__name__)


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
    """
    Output of [`C3ForConditionalGeneration`]: that of a causal language model, plus

    context_latents (`torch.FloatTensor` of shape `(batch_size, num_contexts, num_latents, text_hidden_size)`,
    *optional*):
        The latents that were merged into the prompt; `None` if no context was given.
    """

    context_latents: Optional[torch.FloatTensor] = None


class C3PreTrainedModel(PreTrainedModel):
    """Loading and saving, and what transformers asks of every C3 model."""

    config_class = C3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The two halves name their own unsplittable layers; transformers collects them from the sub-models.
    _no_split_modules = []
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`; adds a model card where there is none."""
        super().save_pretrained(save_directory, *args, **kwargs)
        name = os.path.basename(os.path.normpath(save_directory))
        if kwargs.get("is_main_process", True) and os.path.isdir(save_directory):
            write_model_card(self.config, save_directory, name)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # push_to_hub of transformers lays its template card over the folder just before this upload.
        write_model_card(self.config, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class C3Model(C3PreTrainedModel):
    """Context encoder, latent queries, projector and decoder body, without a language modelling head."""

    def __init__(self, config: C3Config):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.latent_queries = nn.Embedding(config.num_latents, config.encoder_config.hidden_size)
        self.projector = nn.Linear(
            config.encoder_config.hidden_size, config.text_config.hidden_size, bias=config.projector_bias
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

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
        context_input_ids, context_attention_mask = check_context_shapes(context_input_ids, context_attention_mask)
        check_context_ids(self.config, context_input_ids, context_attention_mask)
        batch_size, num_contexts, context_length = context_input_ids.shape
        num_latents = self.config.num_latents
        max_positions = getattr(self.config.encoder_config, "max_position_embeddings", None)
        if max_positions is not None and context_length + 1 + num_latents > max_positions:
            logger.warning_once(
                f"`context_input_ids` has {context_length} tokens: with the marker and {num_latents} latent queries "
                f"that is more than the {max_positions} positions the context encoder was made for. Expect poor "
                "latents; cut the text into segments."
            )
        input_ids = context_input_ids.reshape(batch_size * num_contexts, context_length)
        start = input_ids.new_full((input_ids.shape[0], 1), self.config.encoder_context_start_token_id)
        # The queries see the text, the start marker and the queries before them. The end marker that the original
        # puts behind them is left out: the encoder is causal, so nothing that is used could see it.
        text_embeds = self.encoder.get_input_embeddings()(torch.cat([input_ids, start], dim=1))
        queries = self.latent_queries(torch.arange(num_latents, device=input_ids.device))
        queries = queries.to(text_embeds).expand(input_ids.shape[0], -1, -1)
        inputs_embeds = torch.cat([text_embeds, queries], dim=1)
        # Reentrant checkpointing trains nothing behind an input without a gradient: a frozen table under an adapter.
        trains = self.training and any(parameter.requires_grad for parameter in self.encoder.parameters())
        if trains and not inputs_embeds.requires_grad:
            inputs_embeds.requires_grad_(torch.is_grad_enabled())
        strides = resolve_strides(self.config, context_strides, batch_size, num_contexts, input_ids.device)
        if strides is not None and context_attention_mask is None:
            # Without a mask transformers takes positions that do not count up by one for packed sequences, and no
            # query would see the text.
            context_attention_mask = torch.ones_like(context_input_ids)
        attention_mask, position_ids = None, None
        if context_attention_mask is not None:
            mask = context_attention_mask.reshape(input_ids.shape)
            attention_mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1 + num_latents)], dim=1)
            # Positions count real tokens only, so that left and right padding give the same latents.
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if strides is not None:
            places = torch.arange(1, num_latents + 1, device=input_ids.device) * strides.reshape(-1, 1) - 1
            position_ids = torch.cat([position_ids[:, :-num_latents], places], dim=1)
        outputs = self.encoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
        )
        latents = outputs.last_hidden_state[:, -num_latents:]
        return latents.reshape(batch_size, num_contexts, num_latents, -1)

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
        latents = self.get_encoder_latents(context_input_ids, context_attention_mask, context_strides)
        return self.projector(latents.to(self.latent_queries.weight.dtype))

    def merge_latents(
        self,
        inputs_embeds: torch.FloatTensor,
        placeholder_mask: torch.BoolTensor,
        context_latents: torch.FloatTensor,
        first_latent: Optional[torch.LongTensor] = None,
    ) -> torch.FloatTensor:
        """
        Put the j-th latent of a row in the place of the j-th placeholder of that row.

        Done row by row, not by one `masked_scatter` over the batch: rows may hold different numbers of placeholders,
        and those beyond a row's latents keep their own embedding (prompt-lookup decoding copies placeholders).

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`).
            placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True at placeholders.
            context_latents (`torch.FloatTensor` of shape
                `(batch_size or 1, num_contexts, num_latents, text_hidden_size)`).

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

    def get_placeholder_mask(
        self, input_ids: Optional[torch.LongTensor], inputs_embeds: torch.FloatTensor
    ) -> torch.BoolTensor:
        """Placeholders `(batch_size, sequence_length)`, found by the ids or, without them, by the embeddings."""
        if input_ids is not None:
            return input_ids == self.config.context_token_id
        token = torch.tensor(self.config.context_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    def _stride_positions(self, inputs_embeds, attention_mask, past_key_values, placeholder_mask, context_strides):
        """
        Positions of a call that was given none, of a model whose latents keep the positions of their text.

        Returns:
            The mask `(batch_size, total_length)`, the positions `(batch_size, sequence_length)`, and by how much they
            are ahead of the number of tokens, `(batch_size, 1)`: the cache carries it to the next call.
        """
        batch_size, length = inputs_embeds.shape[:2]
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, past_length + length, device=inputs_embeds.device)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` has {attention_mask.dim()} dimensions and no `position_ids` came with it: a model "
                "with `latent_stride` finds them from a mask (batch_size, sequence_length). Give one of the two."
            )
        counted = attention_mask.long().cumsum(dim=1) - 1
        delta = getattr(past_key_values, "position_delta", None) if past_length else None
        position_ids = counted[:, -length:] if delta is None else counted[:, -length:] + delta
        if placeholder_mask is not None:
            steps = stride_positions(self.config, placeholder_mask, attention_mask[:, -length:], context_strides)
            position_ids = steps + position_ids[:, :1].clamp(min=0)
        delta = position_ids[:, -1:] - counted[:, -1:]
        return attention_mask, position_ids.clamp(min=0), delta

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, C3ModelOutputWithPast]:
        """As [`C3ForConditionalGeneration.forward`], where everything is described; `context_latents` is a tensor."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of `input_ids` and `inputs_embeds` must be given, got "
                + ("neither." if input_ids is None else "both. Drop one of them.")
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        check_context_arguments(
            self.config, inputs_embeds.shape[0], context_input_ids, context_attention_mask, context_latents
        )
        has_context = context_input_ids is not None or context_latents is not None
        placeholder_mask = None
        if has_context:
            required = required_latents(self.config, context_input_ids, context_attention_mask, context_latents)
            placeholder_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            check_placeholders(placeholder_mask, required)
            if context_latents is None:
                if input_ids is not None:
                    check_blocks(self.config, input_ids)
                context_latents = self.get_context_features(context_input_ids, context_attention_mask, context_strides)
            inputs_embeds = self.merge_latents(inputs_embeds, placeholder_mask, context_latents)
        elif self.training:
            check_no_context_is_missing(self.config, input_ids)
        position_delta = None
        carried = getattr(past_key_values, "position_delta", None) is not None
        if position_ids is None and self.config.latent_stride is not None and (has_context or carried):
            if has_context:
                num_contexts = context_latents.shape[1]
                context_strides = resolve_strides(
                    self.config, context_strides, inputs_embeds.shape[0], num_contexts, inputs_embeds.device
                )
            attention_mask, position_ids, position_delta = self._stride_positions(
                inputs_embeds, attention_mask, past_key_values, placeholder_mask, context_strides
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        if position_delta is not None and outputs.past_key_values is not None:
            outputs.past_key_values.position_delta = position_delta
        return C3ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            context_latents=context_latents,
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
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model.get_decoder()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> Union[tuple, C3CausalLMOutputWithPast]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompts with `num_latents`
                placeholders (`config.context_token_id`) for each context, anywhere.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 at tokens, 0 at
                padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*).
            past_key_values (`Cache`, *optional*): keys and values of the decoder.
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

        Returns:
            [`C3CausalLMOutputWithPast`] with `logits` of shape `(batch_size, kept_length, vocab_size)`, or a tuple.

        Raises:
            TypeError: if `context_latents` is neither a tensor nor gives one.
            ValueError: if neither or both of `input_ids` and `inputs_embeds` are given, a row has fewer placeholders
                than its contexts need, contexts and latents are both given, shapes or batch sizes do not fit, the
                batch is empty, or `labels` come with contexts in line, which only `generate()` splits, or with none.
        """
        self._check_inline_contexts(input_ids, labels)
        if labels is not None and not self.training and context_input_ids is None and context_latents is None:
            check_no_context_is_missing(self.config, input_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            context_input_ids=context_input_ids,
            context_attention_mask=context_attention_mask,
            context_latents=resolve_latents(context_latents, self),
            context_strides=context_strides,
            **kwargs,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            context_latents=outputs.context_latents,
        )

    def _check_inline_contexts(self, input_ids, labels):
        if input_ids is None or input_ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        if find_inline_contexts(self.config, input_ids):
            if labels is not None:
                raise ValueError(
                    "`input_ids` holds contexts in line, but only `generate()` splits them: this loss would be that "
                    "of raw text. Pass `context_input_ids` (C3Processor makes them)."
                )
            logger.warning_once(
                "`input_ids` holds contexts in line, but only `generate()` splits them: forward() reads them as raw "
                "text. Pass `context_input_ids` to compress them."
            )


C3Model.register_for_auto_class("AutoModel")
C3ForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["C3ForConditionalGeneration", "C3Model", "C3PreTrainedModel"]
