"""Tiny models, tokenizers and processors for tests: random weights from a fixed seed, every part of the real thing."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from c3_hf import C3Config, C3ForConditionalGeneration, C3Processor
from c3_hf.modeling.prompt_c3 import install_escapes


NUM_LATENTS = 4
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|extra_203|>",
    "<|extra_204|>",
    "<img>",
    "</img>",
    "<imgpad>",
]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer (256 ids) with the special tokens of the real one behind the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    install_escapes(tokenizer)
    return tokenizer


def sub_config(model_type: str = "qwen2", hidden_size: int = 32, **changes) -> dict:
    """A two-layer causal language model over `VOCAB_SIZE` words."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
        **changes,
    }


def make_config(num_latents: int = NUM_LATENTS, **changes) -> C3Config:
    ids = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    return C3Config(
        **{
            "text_config": sub_config(hidden_size=32),
            "encoder_config": sub_config(hidden_size=24, head_dim=6),
            "num_latents": num_latents,
            "context_start_token_id": ids["<img>"],
            "context_end_token_id": ids["</img>"],
            "context_token_id": ids["<imgpad>"],
            "inline_context_start_token_id": ids["<|extra_203|>"],
            "inline_context_end_token_id": ids["<|extra_204|>"],
            **changes,
        }
    )


# What two vocabularies change in the configuration: no contexts in line, a marker of the encoder's own.
ENCODER_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("Ġ", "a"), ("i", "n"), ("o", "n")]
ENCODER_VOCAB_SIZE = 256 + len(ENCODER_MERGES) + 1
TWO_VOCABULARIES = {
    "inline_context_start_token_id": None,
    "inline_context_end_token_id": None,
    "encoder_context_start_token_id": ENCODER_VOCAB_SIZE - 1,
}


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary: the bytes in reverse order, and longer tokens, so that a text has fewer of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    words = [*alphabet, *("".join(pair) for pair in ENCODER_MERGES)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=ENCODER_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<img>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def make_model(seed: int = 0, **changes) -> C3ForConditionalGeneration:
    """A model whose greedy continuations vary: weights larger than at the start of a training."""
    torch.manual_seed(seed)
    model = C3ForConditionalGeneration(make_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.generation_config.eos_token_id = [256, 258]
    model.generation_config.pad_token_id = 256
    return model


def make_processor(num_latents: int = NUM_LATENTS, **options) -> C3Processor:
    return C3Processor(make_tokenizer(), num_latents=num_latents, **options)


def make_two_vocabularies() -> tuple[C3ForConditionalGeneration, C3Processor]:
    """A model whose encoder has a vocabulary of its own, and its processor."""
    encoder = sub_config(hidden_size=24, head_dim=6, vocab_size=ENCODER_VOCAB_SIZE)
    model = make_model(encoder_config=encoder, **TWO_VOCABULARIES)
    return model, make_processor(encoder_tokenizer=make_encoder_tokenizer())
