"""The original's algorithm, restated to be measured against: not a way to use a model.

Sources: the description of what the original computes and does (batch 1 in its chat, contexts embedded again at
every step, a complete encoder with head and cache, logits of every prompt position, a growing cache). tests/benchmarks
proves it equal to what the original's own code recorded. It runs on the weights of a `C3ForConditionalGeneration` and
on transformers' own generate(), as the original does, so that the two differ in nothing but the algorithm.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from c3_hf import C3Config, C3ForConditionalGeneration
from c3_hf.modeling.generation_c3 import CACHE_NAME, one_cache


class OriginalC3(PreTrainedModel, GenerationMixin):
    """The original's forward and generation inputs over the halves of a converted model."""

    config_class = C3Config
    _supports_sdpa = True

    def __init__(self, model: C3ForConditionalGeneration):
        super().__init__(model.config)
        self.encoder = model.model.encoder
        self.latent_queries = model.model.latent_queries
        self.projector = model.model.projector
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.generation_config = model.generation_config

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def encode(self, context_embeds: torch.Tensor, context_ids: torch.LongTensor) -> torch.Tensor:
        """Run the encoder as the complete language model it is; latents `(batch_size, num_latents, hidden_size)`."""
        starts = (context_ids == self.config.context_start_token_id).int().argmax(dim=1)
        rows = [slice(start + 1, start + 1 + self.config.num_latents) for start in starts.tolist()]
        for row, positions in enumerate(rows):
            context_embeds[row, positions] = self.latent_queries.weight
        outputs = self.encoder(
            inputs_embeds=context_embeds, use_cache=True, output_hidden_states=True, return_dict=True
        )
        # The head of the encoder, tied to its table: 151,936 logits for every token, in float32, that nobody reads.
        nn.functional.linear(outputs.last_hidden_state, self.encoder.get_input_embeddings().weight).float()
        last = outputs.hidden_states[-1]
        return self.projector(torch.stack([last[row, positions] for row, positions in enumerate(rows)]))

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        context_ids: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        cache=None,
        **unused,
    ) -> CausalLMOutputWithPast:
        """`input_ids` `(batch_size, length)`; `context_ids` `(batch_size, context_length)`, marker block included."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if context_ids is not None:
            context_embeds = self.encoder.get_input_embeddings()(context_ids)
            if input_ids.shape[1] > 1:
                latents = self.encode(context_embeds, context_ids)
                starts = (input_ids == self.config.context_start_token_id).int().argmax(dim=1)
                for row, start in enumerate(starts.tolist()):
                    inputs_embeds[row, start + 1 : start + 1 + self.config.num_latents] = latents[row]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
        )
        logits = self.lm_head(outputs.last_hidden_state).float()
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: getattr(outputs, CACHE_NAME)})


def original_context_ids(config: C3Config, context_input_ids: torch.LongTensor) -> torch.LongTensor:
    """Contexts `(batch_size, context_length)` of plain text with the marker block the original wants behind them."""
    placeholders = [config.context_token_id] * config.num_latents
    block = [config.context_start_token_id, *placeholders, config.context_end_token_id]
    rows = torch.tensor(block, device=context_input_ids.device).expand(context_input_ids.shape[0], -1)
    return torch.cat([context_input_ids, rows], dim=1)
