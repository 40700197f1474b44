"""The two halves of a new C3 model as they are found: causal language models in folders, on the Hub, or GGUF files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from c3_hf.conversion.plan import find_absent_layers, naming
from c3_hf.conversion.weights import list_tensors, raise_problems
from c3_hf.files import read_json_object


# Newer transformers leaves weights in the file's quantised blocks unless asked; older always unpacks them.
try:
    from transformers import GgufConfig
except ImportError:
    _UNPACKED: dict[str, Any] = {}
else:
    _UNPACKED = {"quantization_config": GgufConfig(dequantize=True)}


def load_half(name: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A causal language model that becomes half of a C3 model, with plain weights whatever its file holds.

    Args:
        name: a folder, a Hub id, or a GGUF file, for which the packages `gguf` and `accelerate` are needed.
        dtype: floating-point type; "auto" for the stored one, which of a GGUF file is float32.

    Raises:
        FileNotFoundError: if there is no such GGUF file.
        ValueError: if `name` is empty, or a GGUF file or a folder's `config.json` is damaged, or describes another
            model than its weights.
    """
    if not str(name):
        raise ValueError("the name of a half is empty. Give a folder, a Hub id or a GGUF file.")
    folder = Path(name)
    if _is_gguf(folder):
        place, file = _place_of(folder)
        # transformers writes into what it is given.
        unpacked = copy.deepcopy(_UNPACKED)
        with naming(folder):
            model = AutoModelForCausalLM.from_pretrained(place, **file, dtype=dtype, **unpacked).eval()
        # It is an ordinary model now, and the path in here has no place in what is saved.
        model.config.__dict__.pop("quantization_config", None)
        return model
    if folder.is_dir():
        read_json_object(folder / "config.json")
        with naming(folder / "config.json"):
            config = AutoConfig.from_pretrained(folder)
        if list(folder.glob("*.safetensors")):
            names = [tensor.name for tensor in list_tensors(folder)]
            problems = find_absent_layers(config.num_hidden_layers, names, "config.json")
            raise_problems(f"the weights in {folder} do not fit its config.json", problems)
        with naming(folder / "config.json"), torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a half; see [`load_half`]."""
    if _is_gguf(Path(name)):
        place, file = _place_of(Path(name))
        tokenizer = AutoTokenizer.from_pretrained(place, **file)
        # transformers 4.57 takes the file's first token for its last; the configuration has the right one.
        end = AutoConfig.from_pretrained(place, **file).eos_token_id
        if isinstance(end, int):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        return tokenizer
    return AutoTokenizer.from_pretrained(name)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _place_of(path: Path) -> tuple[Path, dict[str, str]]:
    """A GGUF file as `from_pretrained` takes it: the folder, and the file's name in it."""
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` is absent. Give a GGUF file on this disk; one on the Hub is fetched first.")
    # Letters, a version and two counts.
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or not header.startswith(b"GGUF"):
        raise ValueError(f"{path} is no whole GGUF file, it begins with {header!r}. Fetch it again.")
    return path.parent, {"gguf_file": path.name}


def find_body(causal_lm: PreTrainedModel) -> tuple[str, nn.Module]:
    """The child of a causal language model that `AutoModel` would build, and its name.

    `base_model` is not asked: transformers 4.57 has a wrong prefix for Gemma 3.

    Raises:
        ValueError: if there is no such child, so that the model is no body with a head on it.
    """
    with torch.device("meta"):
        body_class = type(AutoModel.from_config(copy.deepcopy(causal_lm.config)))
    for name, child in causal_lm.named_children():
        if type(child) is body_class:
            return name, child
    raise ValueError(
        f"{type(causal_lm).__name__} holds no {body_class.__name__}, so it is not a language model with a head on it "
        "that a C3 model can take over. Choose a text-only causal language model."
    )


def as_plain_fast(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer under the class that takes its file as it is.

    Classes of single models rebuild parts when they load (Qwen2Tokenizer of transformers 5: the normalizer), and the
    normalizer is where the processor's escapes are read.

    Raises:
        TypeError: if the tokenizer is not backed by the `tokenizers` library.
    """
    if not tokenizer.is_fast:
        raise TypeError(
            f"the tokenizer must be a fast one, got {type(tokenizer).__name__}. Convert it to a tokenizer.json first."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
