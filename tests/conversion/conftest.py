"""Checkpoints in the released layout, made up for a test, and language models to put together."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from c3_hf.modeling.prompt_c3 import SPECIAL_TOKENS


# Bytes, and a few words that need merges of merges.
WORDS = (b"th", b"the", b" t", b" the", b"in", b"ing", b"\xe4\xb8", b"\xe4\xb8\xad")
NUM_RANKS = 256 + len(WORDS)
TRAINING_TEXT = "the cat sat on the mat and the dog lay by the door of the house in the rain".split()
VOCAB_SIZE = NUM_RANKS + len(SPECIAL_TOKENS)


def ranks_text(newline: str = "\n") -> str:
    tokens = [bytes([value]) for value in range(256)] + list(WORDS)
    return "".join(f"{base64.b64encode(token).decode()} {rank}{newline}" for rank, token in enumerate(tokens))


class ReleasedFolder:
    """A random checkpoint in the released layout, to be bent by a test before it is written."""

    def __init__(self, num_latents: int = 3, dtype: torch.dtype = torch.float32, tied: bool = True, **main_changes):
        common = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "eos_token_id": NUM_RANKS,
        }
        main = Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            tie_word_embeddings=tied,
            rope_theta=50000.0,
            rms_norm_eps=1e-5,
            **common,
        )
        encoder = Qwen2Config(
            vocab_size=VOCAB_SIZE + 5, hidden_size=8, intermediate_size=12, tie_word_embeddings=True, **common
        )
        torch.manual_seed(7)
        self.main = self._weights(Qwen2ForCausalLM(main), dtype)
        self.encoder = self._weights(Qwen2ForCausalLM(encoder), dtype)
        if tied:
            del self.main["lm_head.weight"]
        del self.encoder["lm_head.weight"]
        self.main["model.Q.weight"] = torch.randn(num_latents, 8).to(dtype)
        self.main["model.mm_projector.weight"] = torch.randn(16, 8).to(dtype)
        self.main["model.mm_projector.bias"] = torch.randn(16).to(dtype)
        self.main_config = self._config(main, dtype, rope_theta=50000.0) | {
            "model_type": "C3",
            "architectures": ["C3QwenForCausalLM"],
            "latent_token_len": num_latents,
            "contexts_compression_llm_hidden_size": 8,
            "im_start_token": NUM_RANKS + 214,
            "im_end_token": NUM_RANKS + 215,
            "im_patch_token": NUM_RANKS + 216,
            "use_im_start_end": True,
            **main_changes,
        }
        self.encoder_config = self._config(encoder, dtype, rope_theta=10000.0)
        self.tiktoken: str | None = ranks_text()

    @staticmethod
    def _weights(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: (tensor * 5).to(dtype) for name, tensor in model.state_dict().items()}

    @staticmethod
    def _config(config: Qwen2Config, dtype: torch.dtype, rope_theta: float) -> dict:
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept += ("num_key_value_heads", "eos_token_id", "rms_norm_eps", "tie_word_embeddings")
        return {key: getattr(config, key) for key in kept} | {
            "model_type": "qwen2",
            "rope_theta": rope_theta,
            "max_position_embeddings": 512,
            "use_sliding_window": False,
            "sliding_window": 512,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

    def write(self, folder: Path, main_shards: int = 1, encoder_shards: int = 1) -> Path:
        self._write_half(folder, self.main_config, self.main, main_shards)
        self._write_half(folder / "llm1", self.encoder_config, self.encoder, encoder_shards)
        if self.tiktoken is not None:
            (folder / "qwen.tiktoken").write_bytes(self.tiktoken.encode())
        return folder

    @staticmethod
    def _write_half(folder: Path, config: dict, weights: dict[str, torch.Tensor], shards: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: weights[key] for key in list(weights)[number::shards]}
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(folder: Path, kind: str, specials: tuple[str, ...] = ("<|endoftext|>",)) -> int:
    """Save a tokenizer: "bytes", or "words" with merges learned from a sentence; returns its size."""
    backend = Tokenizer(models.BPE())
    # As Qwen2Tokenizer of transformers 5 has it, whatever the file says.
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    size = 256 if kind == "bytes" else 290
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(TRAINING_TEXT)], trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[0])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder: Path, family: str, kind: str = "bytes", hidden_size: int = 32, **changes) -> Path:
    size = write_tokenizer(folder, kind)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": size,
            "hidden_size": hidden_size,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": size - 1,
            "pad_token_id": None,
            **changes,
        },
    )
    torch.manual_seed(len(family) + hidden_size)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Write a model once and hand out its folder."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str, **arguments) -> Path:
        key = (family, *sorted(arguments.items()))
        if key not in made:
            made[key] = write_model(root / f"{len(made)}-{family}", family, **arguments)
        return made[key]

    return get


@pytest.fixture
def released() -> Callable[..., ReleasedFolder]:
    """The class of made-up checkpoints."""
    return ReleasedFolder
