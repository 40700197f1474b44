"""The model of a run: built new or loaded, parts frozen, LoRA put in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..modeling.configuration_c3 import C3Config
from ..modeling.modeling_c3 import C3ForConditionalGeneration, C3Model
from ..modeling.processing_c3 import C3Processor
from ..modeling.prompt_c3 import (
    CONTEXT_END_TOKEN,
    CONTEXT_START_TOKEN,
    CONTEXT_TOKEN,
    INLINE_CONTEXT_END_TOKEN,
    INLINE_CONTEXT_START_TOKEN,
    STOP_TOKEN,
)
from .arguments import PARTS, ModelArguments


logger = logging.get_logger(__name__)

# The two halves, as modules of the whole model.
_HALVES = {"encoder": "model.encoder", "decoder": "model.language_model"}


def prepare_model(arguments: ModelArguments, mixed_precision: bool = False) -> tuple[nn.Module, C3Processor]:
    """Build or load the model of a run and its processor.

    Whatever the checkpoint holds, parameters that train are float32, unless `arguments.trained_dtype` says otherwise:
    a bfloat16 number has 8 bits, so an update below 1/512 of it is rounded away, and at a learning rate of 1e-5 nearly
    all are.

    Args:
        mixed_precision: whether the run computes under autocast. Then the weights beside LoRA, which do not train,
            stay in the checkpoint's dtype; without autocast one dtype holds for the whole model.

    Returns:
        The model, a PEFT model if `arguments.lora` names a half, and the processor.

    Raises:
        ImportError: if LoRA is asked for without `peft`.
        ValueError: if the model does not suit the arguments.
    """
    dtype = getattr(torch, arguments.trained_dtype)
    if dtype != torch.float32:
        logger.warning(
            f"`trained_dtype` is {arguments.trained_dtype}: updates below 1/512 of a weight are lost, which at usual "
            "learning rates are nearly all. Leave it out to train in float32; `bf16: true` computes in bfloat16."
        )
    if arguments.model_name_or_path is None:
        model, processor = new_model(arguments)
        cast_model(model, dtype)
    else:
        # Engines that divide the weights among processes want one dtype.
        divided = is_fsdp_enabled() or is_deepspeed_zero3_enabled()
        as_saved = bool(arguments.lora) and mixed_precision and not divided
        loaded = {"dtype": "auto" if as_saved else dtype}
        model = C3ForConditionalGeneration.from_pretrained(arguments.model_name_or_path, **loaded)
        processor = C3Processor.from_pretrained(arguments.model_name_or_path)
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    freeze_parts(model, arguments.freeze, arguments.freeze_modules)
    if arguments.lora:
        model = add_lora(model, arguments)
        if not is_deepspeed_zero3_enabled():
            # The matrices and the copies of queries and projector that PEFT made.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(f"{trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters train.")
    return model, processor


def cast_model(model: C3ForConditionalGeneration, dtype: torch.dtype) -> C3ForConditionalGeneration:
    """Cast a model, in place, and what its configurations say: transformers 4.57 loads each half as its own says."""
    for config in (model.config, model.config.text_config, model.config.encoder_config):
        config.dtype = dtype
    return model.to(dtype)


def checkpoint_dtype(arguments: ModelArguments) -> torch.dtype:
    """The dtype of the checkpoint a run starts from; float32 for a new model."""
    if arguments.model_name_or_path is None:
        return torch.float32
    dtype = C3Config.from_pretrained(arguments.model_name_or_path).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def new_model(arguments: ModelArguments) -> tuple[C3ForConditionalGeneration, C3Processor]:
    """Build an untrained model whose two halves share the vocabulary of the tokenizer at `tokenizer_path`."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "`model_name_or_path` must name a checkpoint under DeepSpeed ZeRO-3, which takes weights apart before "
            "they can be initialised together. Build the model first: `c3-hf new`, or a run of one step without "
            "DeepSpeed."
        )
    # By its own class: the name transformers 5 writes into a folder is not known to 4.57.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer_path)
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([STOP_TOKEN, tokenizer.eos_token])
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    shared = {"model_type": "qwen2", "vocab_size": len(tokenizer), "tie_word_embeddings": True, **ids}
    # ModelArguments has checked that both configurations are there.
    config = C3Config(
        text_config={**shared, **arguments.text_config},  # type: ignore[dict-item]
        encoder_config={**shared, **arguments.encoder_config},  # type: ignore[dict-item]
        num_latents=arguments.num_latents,
        latent_stride=arguments.latent_stride,
        local_latents=arguments.local_latents,
        initializer_range=arguments.initializer_range,
        context_start_token_id=tokenizer.convert_tokens_to_ids(CONTEXT_START_TOKEN),
        context_end_token_id=tokenizer.convert_tokens_to_ids(CONTEXT_END_TOKEN),
        context_token_id=tokenizer.convert_tokens_to_ids(CONTEXT_TOKEN),
        inline_context_start_token_id=tokenizer.convert_tokens_to_ids(INLINE_CONTEXT_START_TOKEN),
        inline_context_end_token_id=tokenizer.convert_tokens_to_ids(INLINE_CONTEXT_END_TOKEN),
    )
    model = C3ForConditionalGeneration(config)
    if arguments.share_initial_embeddings:
        share_initial_embeddings(model)
    halves = {"encoder": model.model.encoder, "decoder": model.model.language_model}
    for half, spread in arguments.attention_bias_range.items():
        spread_attention_biases(halves[half], spread)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[end_of_turn, end_of_text],
        pad_token_id=end_of_text,
        do_sample=False,
        # As many as a restored text and its prompt leave room for.
        max_new_tokens=min(4096, getattr(config.text_config, "max_position_embeddings", 8192) // 2),
    )
    return model, C3Processor(tokenizer, num_latents=arguments.num_latents)


def spread_attention_biases(half: nn.Module, spread: float) -> None:
    """Draw the biases of a half's attention anew, so wide that each head looks at distances of its own.

    With rotary positions the product of the two biases is a function of the distance alone, another random one for
    each head. With small biases every head begins with the mean of all it sees, and the heads then crowd round the
    few places that are found first.

    Args:
        spread: standard deviation; about 3 makes a head prefer a few of twenty distances. The weights beside the
            biases are halved, so that words change less of what the distance says.

    Raises:
        ValueError: if the half has no such biases (`attention_bias`).
    """
    layers = [module for name, module in half.named_modules() if name.endswith(("q_proj", "k_proj"))]
    if not layers or any(layer.bias is None for layer in layers):
        raise ValueError(
            "`attention_bias_range` was given for a half without biases of attention queries and keys. Set "
            "`attention_bias: true` in its configuration (Llama), or leave it out."
        )
    for layer in layers:
        nn.init.normal_(layer.bias, std=spread)
        layer.weight.data.mul_(0.5)


def share_initial_embeddings(model: C3ForConditionalGeneration) -> None:
    """Start both halves from one random embedding table; then they train apart.

    Copying is then one linear map that serves every word at once; from independent tables each word of the vocabulary
    would have to be learnt by itself. Rows have a length of about one, so that a state in the direction of a word's
    row gets a clear logit through the tied head from the first step on. Where the halves differ in width, the common
    columns are shared.

    Raises:
        ValueError: if the two vocabularies differ in size.
    """
    encoder, decoder = model.model.encoder.get_input_embeddings(), model.get_input_embeddings()
    if encoder.num_embeddings != decoder.num_embeddings:
        raise ValueError(
            f"`share_initial_embeddings` needs one vocabulary, got {encoder.num_embeddings} words in the encoder and "
            f"{decoder.num_embeddings} in the decoder. Leave it out for a model with two vocabularies."
        )
    scale = decoder.embedding_dim**-0.5
    width = min(encoder.embedding_dim, decoder.embedding_dim)
    with torch.no_grad():
        decoder.weight.normal_(std=scale)
        encoder.weight[:, :width].copy_(decoder.weight[:, :width])


def freeze_parts(model: C3ForConditionalGeneration, parts: Sequence[str], modules: Sequence[str] = ()) -> None:
    """Switch off the gradients of the named parts, see `PARTS`, and modules.

    Raises:
        ValueError: if the model has no module of a name.
    """
    for part in parts:
        for name, parameter in model.named_parameters():
            if name.startswith(PARTS[part]):
                parameter.requires_grad_(False)
    known = dict(model.named_modules())
    unknown = sorted(set(modules) - set(known))
    if unknown:
        raise ValueError(
            f"`freeze_modules` names {unknown}, which the model does not have. Its modules are called like "
            f"{[name for name in known if name.count('.') == 1][:4]}; `model.named_modules()` has them all."
        )
    for name in modules:
        known[name].requires_grad_(False)


def add_lora(model: C3ForConditionalGeneration, arguments: ModelArguments) -> nn.Module:
    """Wrap the model with LoRA matrices on every linear layer of the halves `arguments.lora` names.

    The latent queries and the projector, new in every C3 model, train in full unless they are frozen.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('`lora` needs peft. In a clone of the repository: pip install ".[train]"') from error
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="|".join(f"({_linear_layers(model, _HALVES[half])})" for half in arguments.lora),
        modules_to_save=[part for part in ("projector", "latent_queries") if part not in arguments.freeze],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # GPT-2's layers hold their weights the other way round. PEFT sees it, sets the option by itself, and warns.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        return get_peft_model(model, config)


def _linear_layers(model: nn.Module, half: str) -> str:
    """A regular expression for the linear layers of a half; plain layer names would hit both, which share them."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.get_submodule(half).named_modules()
        # GPT-2 and its like have a class of their own for them.
        if isinstance(module, (nn.Linear, Conv1D))
    }
    return rf"{re.escape(half)}\.(.*\.)?({'|'.join(sorted(map(re.escape, names)))})"


def body(model: nn.Module) -> C3Model:
    """The body of the C3 model that trains, inside LoRA or not."""
    return next(module for module in model.modules() if isinstance(module, C3Model))


def compile_layers(model: nn.Module) -> None:
    """Compile every transformer layer of both halves, in place and for any shape.

    The layers of a half share one program, which takes a minute or two to build; the whole model would take many.
    """
    for name, module in model.named_modules():
        # Most families keep their layers in `layers`, GPT-2 in `h`.
        if name.rpartition(".")[0].endswith(("layers", ".h")):
            module.compile(dynamic=True)
