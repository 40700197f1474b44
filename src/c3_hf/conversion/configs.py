"""Configurations: the original's two `config.json` to a [`C3Config`] and back, and stock ones for single halves."""

from __future__ import annotations

import json

import torch
from transformers import GenerationConfig, PretrainedConfig

from c3_hf.conversion.plan import naming
from c3_hf.conversion.released import ReleasedCheckpoint, Vocabulary, find_contradictions
from c3_hf.conversion.weights import raise_problems
from c3_hf.modeling.configuration_c3 import C3Config


# What transformers 4.49, the version the original runs on, writes for a Qwen2 model.
_QWEN2_KEYS_OF_449 = (
    "attention_dropout",
    "bos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)
# What a half's configuration says about a Qwen2 model. Other entries are of the original alone, or of transformers'
# tasks, where one number (`num_labels`) can be the work of minutes.
_OF_A_HALF = (
    *_QWEN2_KEYS_OF_449,
    "dtype",
    "eos_token_id",
    "head_dim",
    "pad_token_id",
    "rope_parameters",
    "sliding_window",
    "torch_dtype",
)
_NO_SLIDING_WINDOW = {"use_sliding_window": False, "layer_types": None}

# chat() of the original: greedy, at most 4096 new tokens.
MAX_NEW_TOKENS = 4096


def read_released_config(
    checkpoint: ReleasedCheckpoint,
    vocabulary: Vocabulary,
    dtype: torch.dtype | None = None,
    tie_word_embeddings: bool | None = None,
) -> C3Config:
    """Build the configuration of the converted model.

    Args:
        vocabulary: its tokenizer's stop ids and in-line markers.
        dtype: the type the weights are cast to; None for the type the main configuration names.
        tie_word_embeddings: whether the head is the embedding table; None for what the main configuration says.

    Returns:
        A [`C3Config`]. Sliding windows are off in both halves, as in the
        original's code, whatever the files say.

    Raises:
        ValueError: if configurations and weights contradict each other (everything that is wrong is named), or
            transformers can make no configuration of the entries.
    """
    main, encoder = checkpoint.main_config, checkpoint.encoder_config
    raise_problems(f"the configurations in {checkpoint.folder} are inconsistent", find_contradictions(checkpoint))
    text_config = {key: value for key, value in main.items() if key in _OF_A_HALF}
    text_config |= {"model_type": "qwen2", "eos_token_id": vocabulary.stop_ids, **_NO_SLIDING_WINDOW}
    encoder_config = {key: value for key, value in encoder.items() if key in _OF_A_HALF}
    encoder_config |= {"model_type": "qwen2", **_NO_SLIDING_WINDOW}
    stored_dtype = main.get("torch_dtype") or main.get("dtype")
    if dtype is not None:
        stored_dtype = dtype_name(dtype)
        for half in (text_config, encoder_config):
            half.pop("torch_dtype", None)
            half["dtype"] = stored_dtype
    start_id, end_id = vocabulary.inline_ids or (None, None)
    with naming(checkpoint.config_files):
        return C3Config(
            text_config=text_config,
            encoder_config=encoder_config,
            num_latents=main["latent_token_len"],
            context_start_token_id=main["im_start_token"],
            context_end_token_id=main["im_end_token"],
            context_token_id=main["im_patch_token"],
            inline_context_start_token_id=start_id,
            inline_context_end_token_id=end_id,
            initializer_range=main.get("initializer_range", 0.02),
            tie_word_embeddings=tie_word_embeddings,
            dtype=stored_dtype,
        )


def write_released_configs(config: C3Config) -> tuple[dict, dict]:
    """The original's two configurations, main and `llm1`, of a converted model.

    Raises:
        ValueError: if a half is no Qwen2, or the projector has no bias: the original's code knows nothing else.
    """
    for name in ("text_config", "encoder_config"):
        model_type = getattr(config, name).model_type
        if model_type != "qwen2":
            raise ValueError(
                f"`layout` 'original' needs Qwen2 halves, but `{name}` is {model_type!r}. Export the halves with "
                "`layout` 'decoder' and 'encoder' instead."
            )
    if not config.projector_bias:
        raise ValueError("`layout` 'original' needs a projector with a bias, but `projector_bias` is False.")
    main = _original_half(config.text_config, config)
    main |= {
        "architectures": ["C3QwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_C3.C3Config",
            "AutoModel": "modeling_C3.C3QwenForCausalLM",
            "AutoModelForCausalLM": "modeling_C3.C3QwenForCausalLM",
        },
        "contexts_compression_llm_hidden_size": config.encoder_config.hidden_size,
        "im_end_token": config.context_end_token_id,
        "im_patch_token": config.context_token_id,
        "im_start_token": config.context_start_token_id,
        "latent_token_len": config.num_latents,
        "model_type": "C3",
        "use_im_start_end": True,
    }
    encoder = _original_half(config.encoder_config, config)
    encoder |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    return dict(sorted(main.items())), dict(sorted(encoder.items()))


def _original_half(half: PretrainedConfig, config: C3Config) -> dict:
    """A half's configuration with the keys of transformers 4.49, which the original runs on."""
    fields = both_rope_keys(half.to_dict())
    eos = fields.get("eos_token_id")
    return {key: fields.get(key) for key in _QWEN2_KEYS_OF_449} | {
        # The original stops at <|im_end|> by its own code and has <|endoftext|>, our last stop id, as its one eos.
        "eos_token_id": eos[-1] if isinstance(eos, list) else eos,
        # Windows are off; a width that reaches every position says the same to code that looks at it alone.
        "sliding_window": half.max_position_embeddings,
        "torch_dtype": dtype_name(half.dtype or config.dtype),
        "transformers_version": "4.49.0",
    }


def stock_config(half: PretrainedConfig, architecture: str, dtype: torch.dtype | str | None) -> dict:
    """The `config.json` of one half as a stock causal language model, readable by transformers 4.57 and 5.x."""
    fields = half.to_diff_dict()
    return both_rope_keys(fields) | {"architectures": [architecture], "dtype": dtype_name(dtype)}


def both_rope_keys(fields: dict) -> dict:
    """A copy of a configuration's fields with rope settings under the keys of transformers 4 and of 5.

    transformers 4.57 reads `rope_theta` and `rope_scaling`, 5.x writes `rope_parameters` alone; 4.57 then falls back
    to its default theta without a word. Settings by layer type (nested dicts) exist in 5.x only and are left alone.
    """
    fields = dict(fields)
    parameters = fields.get("rope_parameters")
    if parameters is None and fields.get("rope_theta") is not None:
        scaling = dict(fields.get("rope_scaling") or {})
        rope_type = scaling.pop("type", None)
        scaling.setdefault("rope_type", rope_type or "default")
        fields["rope_parameters"] = {"rope_theta": fields["rope_theta"], **scaling}
    elif isinstance(parameters, dict) and "rope_theta" in parameters:
        fields["rope_theta"] = parameters["rope_theta"]
        scaled = parameters.get("rope_type", "default") != "default"
        fields["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"} if scaled else None
    return fields


def generation_config(config: C3Config, bos_token_id: int | None, pad_token_id: int) -> GenerationConfig:
    """The generation defaults of the original's chat(): greedy, all stop ids, at most 4096 new tokens.

    Its ban on repeated 20-grams is left out: it makes text with a legitimately repeated span impossible to restore.
    """
    return GenerationConfig(
        bos_token_id=bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=pad_token_id,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The name of a type in configuration files: "bfloat16" for torch.bfloat16."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def config_json(config: C3Config, architecture: str, auto_map: dict[str, str]) -> str:
    """The text of a C3 repository's `config.json`: what save_pretrained writes, plus both rope keys in each half."""
    fields = json.loads(config.to_json_string())
    for name in ("text_config", "encoder_config"):
        fields[name] = both_rope_keys(fields[name])
    fields |= {"architectures": [architecture], "auto_map": auto_map}
    return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
