# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Context Cascade Compression (C3, arXiv 2511.15244).

This file is both a module of the package and one of the remote-code files of every C3 repository on the Hub, so it
imports the standard library and transformers only.
"""

from typing import Optional, Union

from transformers import AutoConfig, PretrainedConfig


# Shapes of the released model (paper, section 3: Qwen2.5-1.5B encoder, Qwen2.5-3B decoder; vocabulary of the release).
RELEASED_ENCODER_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
RELEASED_TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151860,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
}


class C3Config(PretrainedConfig):
    r"""
    Configuration of a [`C3ForConditionalGeneration`]: two causal language models, a context encoder and a decoder,
    joined by `num_latents` learned queries and one linear projector. The defaults give the shapes of the released
    model.

    Args:
        text_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the decoder, any causal language model that `AutoModel.from_config` can build. The name is
            the one that `get_text_config()` of transformers looks for.
        encoder_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of the context encoder, likewise. Only its body is built: the encoder has no head.
        num_latents (`int`, defaults to 32):
            Number N of latent tokens a context is compressed into (paper: 32, 64 or 100).
        segment_length (`int`, *optional*):
            Most tokens of text that one context should hold; longer texts are cut into segments of at most so many.
            `None` means `latent_stride` for each latent, or without a stride 20, at which 98.4 to 99.7 % of a text
            come back (paper, Fig. 1). Smaller where a model was trained on shorter contexts.
        latent_stride (`int`, *optional*):
            Most tokens of text that one latent stands for, in a model whose latents keep the positions of their text.
            With a stride of k, query j of the encoder sits at position `(j + 1) * k - 1`, where its stretch of the
            text ends. In the decoder a block of placeholders takes `num_latents * latent_stride` positions, whatever
            the stride of its context (`context_strides`, at most this one): its placeholders sit k apart from the
            beginning of these positions, and what follows the block goes on behind all of them. A token is then at
            one distance from its latent in every text, which rotary attention finds at once (enhanced position
            layout, arXiv 2409.14364). `None` is the original's layout: positions count up by one. A stock decoder
            cannot place latents so.
        local_latents (`bool`, defaults to `False`):
            Whether a query of the encoder sees, of the text, only the tokens its latent stands for; it needs a
            `latent_stride`. What these tokens say of the text before them still reaches the latent, because the
            encoder is causal; nothing of the text behind them does. A small model with random weights learns many
            tokens a latent only so: attention chooses among `latent_stride` tokens, not among all of the text.
        context_start_token_id (`int`, defaults to 151857):
            Id of the token before a block of placeholders (`<img>` in the released vocabulary).
        context_end_token_id (`int`, defaults to 151858):
            Id of the token after a block of placeholders (`</img>`).
        context_token_id (`int`, defaults to 151859):
            Id of the placeholder whose embedding is replaced by a latent (`<imgpad>`).
        inline_context_start_token_id (`int`, *optional*, defaults to 151849):
            Id of the token that opens a context written in line in `input_ids` (`<|extra_203|>`). `None` switches
            in-line contexts off, as a model whose encoder has another vocabulary than its decoder needs.
        inline_context_end_token_id (`int`, *optional*, defaults to 151850):
            Id of the token that closes a context written in line (`<|extra_204|>`).
        encoder_context_start_token_id (`int`, *optional*):
            Id, in the encoder's vocabulary, of the token put between a context and the latent queries. Defaults to
            `context_start_token_id`; differs only where the two vocabularies do.
        projector_bias (`bool`, defaults to `True`):
            Whether the projector has a bias (the release: yes).
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial latent queries and projector weights.
        tie_word_embeddings (`bool`, *optional*):
            Whether the head shares the decoder's embedding table. Defaults to what `text_config` says; a value given
            here is written to `text_config` too, because transformers 4.57 reads it there and 5.x reads it here.
        base_models (`list[str]`, *optional*):
            Hub ids of the models the two halves were made from, for the model card.
        license (`str`, *optional*):
            Hub licence id of the weights, for the model card.

    Raises:
        ValueError: if a sub-configuration has no known `model_type`, `num_latents`, `segment_length` or
            `latent_stride` is not positive, `local_latents` comes without a `latent_stride`, a token id lies outside
            the vocabulary it indexes, two special ids coincide, or only one of the in-line ids is given.
        TypeError: if a sub-configuration is neither a `PretrainedConfig` nor a `dict`.

    Example:

    ```python
    >>> from c3_hf import C3Config

    >>> config = C3Config(num_latents=64)
    >>> config.text_config.hidden_size, config.encoder_config.hidden_size
    (2048, 1536)
    ```
    """

    model_type = "c3"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}

    def __init__(
        self,
        text_config: Optional[Union[PretrainedConfig, dict]] = None,
        encoder_config: Optional[Union[PretrainedConfig, dict]] = None,
        num_latents: int = 32,
        segment_length: Optional[int] = None,
        latent_stride: Optional[int] = None,
        local_latents: bool = False,
        context_start_token_id: int = 151857,
        context_end_token_id: int = 151858,
        context_token_id: int = 151859,
        inline_context_start_token_id: Optional[int] = 151849,
        inline_context_end_token_id: Optional[int] = 151850,
        encoder_context_start_token_id: Optional[int] = None,
        projector_bias: bool = True,
        initializer_range: float = 0.02,
        tie_word_embeddings: Optional[bool] = None,
        base_models: Optional[list[str]] = None,
        license: Optional[str] = None,
        **kwargs,
    ):
        self.text_config = _build_sub_config("text_config", text_config, RELEASED_TEXT_CONFIG)
        self.encoder_config = _build_sub_config("encoder_config", encoder_config, RELEASED_ENCODER_CONFIG)
        self.num_latents = num_latents
        self.segment_length = segment_length
        self.latent_stride = latent_stride
        self.local_latents = local_latents
        self.context_start_token_id = context_start_token_id
        self.context_end_token_id = context_end_token_id
        self.context_token_id = context_token_id
        self.inline_context_start_token_id = inline_context_start_token_id
        self.inline_context_end_token_id = inline_context_end_token_id
        self.encoder_context_start_token_id = (
            context_start_token_id if encoder_context_start_token_id is None else encoder_context_start_token_id
        )
        self.projector_bias = projector_bias
        self.initializer_range = initializer_range
        self.base_models = base_models
        self.license = license
        if tie_word_embeddings is None:
            tie_word_embeddings = self.text_config.tie_word_embeddings
        self._check_lengths()
        self._check_token_ids()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __setattr__(self, name, value):
        if name == "tie_word_embeddings":
            self.text_config.tie_word_embeddings = value
        super().__setattr__(name, value)

    @property
    def longest_segment(self) -> int:
        """Most tokens of a context: `segment_length`, or where it is `None` `latent_stride` or 20 for each latent."""
        return self.segment_length or (self.latent_stride or 20) * self.num_latents

    def _check_lengths(self):
        if not _is_positive_int(self.num_latents):
            raise ValueError(
                f"`num_latents` must be a positive int, got {self.num_latents!r}. The paper uses 32, 64 or 100."
            )
        if self.segment_length is not None and not _is_positive_int(self.segment_length):
            raise ValueError(
                f"`segment_length` must be a positive int or None, got {self.segment_length!r}. None means 20 tokens "
                "for each latent."
            )
        if self.latent_stride is not None and not _is_positive_int(self.latent_stride):
            raise ValueError(
                f"`latent_stride` must be a positive int or None, got {self.latent_stride!r}. None is the original's "
                "layout, in which positions count up by one."
            )
        if self.local_latents and self.latent_stride is None:
            raise ValueError(
                "`local_latents` is set without a `latent_stride`: which tokens a latent stands for is known by the "
                "stride. Set `latent_stride`, or leave `local_latents` out."
            )

    def _check_token_ids(self):
        decoder_names = ["context_start_token_id", "context_end_token_id", "context_token_id"]
        inline_names = ["inline_context_start_token_id", "inline_context_end_token_id"]
        given = [name for name in inline_names if getattr(self, name) is not None]
        if len(given) == 1:
            raise ValueError(
                "`inline_context_start_token_id` and `inline_context_end_token_id` belong together, got only "
                f"`{given[0]}`={getattr(self, given[0])}. Give both, or None for both to switch in-line contexts off."
            )
        for name in decoder_names + given:
            _check_token_id(name, getattr(self, name), "text_config", self.text_config.vocab_size)
        _check_token_id(
            "encoder_context_start_token_id",
            self.encoder_context_start_token_id,
            "encoder_config",
            self.encoder_config.vocab_size,
        )
        ids = {name: getattr(self, name) for name in decoder_names + given}
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"the special token ids of a C3 model must differ from each other, got {ids}.")


def _is_positive_int(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _build_sub_config(name, value, default):
    if value is None:
        value = default
    if isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, dict):
        raise TypeError(
            f"`{name}` must be a PretrainedConfig, a dict or None, got {type(value).__name__}. Pass for example "
            "AutoConfig.from_pretrained(...) of a causal language model."
        )
    value = dict(value)
    model_type = value.pop("model_type", default["model_type"])
    # A folder saved by transformers 5 holds `rope_parameters` only. 4.57 does not know the key and would fall back to
    # its default theta without a word, so the keys it does read are added; 5.x lets `rope_parameters` win.
    rope = value.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        value.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            value.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            value.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    try:
        return AutoConfig.for_model(model_type, **value)
    except ValueError as error:
        raise ValueError(
            f"`{name}` could not be built for model_type {model_type!r}: {error}. Pass the configuration of a causal "
            "language model that this transformers version knows."
        ) from error


def _check_token_id(name, token_id, config_name, vocab_size):
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
        raise ValueError(
            f"`{name}` must be an int in [0, {vocab_size}), the vocabulary of `{config_name}`, got {token_id!r}. Add "
            "the token to the tokenizer and resize the embeddings, or give the id of an existing token."
        )


C3Config.register_for_auto_class()

__all__ = ["C3Config"]
