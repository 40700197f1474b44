"""What a conversion reads: a folder or Hub repository in the released layout, its configurations, its vocabulary.

Everything in the two `config.json` that something is computed from is checked here, before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from c3_hf.conversion.plan import find_absent_layers
from c3_hf.conversion.qwen_tiktoken import TIKTOKEN_FILE, load_qwen_tokenizer
from c3_hf.conversion.weights import StoredTensor, list_tensors, raise_problems
from c3_hf.files import read_json_object
from c3_hf.modeling.prompt_c3 import (
    CONTEXT_END_TOKEN,
    CONTEXT_START_TOKEN,
    CONTEXT_TOKEN,
    END_OF_TEXT,
    INLINE_CONTEXT_END_TOKEN,
    INLINE_CONTEXT_START_TOKEN,
    STOP_TOKEN,
    install_escapes,
)


logger = logging.get_logger(__name__)


ENCODER_FOLDER = "llm1"
# What a conversion reads. Optimizer states, pickles and the original's Python files stay where they are.
READ_PATTERNS = ("*.safetensors", "*.json", "*.tiktoken", "*.jinja", "merges.txt", "README.md")


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint in the released layout, headers only.

    Attributes:
        name: what the user gave: a path or a Hub id.
        revision: the commit that was downloaded; None for a local folder.
        encoder_tensors: tensors of `llm1`; empty if the main folder holds the encoder too.
    """

    name: str
    revision: str | None
    folder: Path
    main_config: dict
    encoder_config: dict
    main_tensors: list[StoredTensor]
    encoder_tensors: list[StoredTensor]

    @property
    def config_files(self) -> str:
        """Both configurations, as a message names them."""
        return f"{self.folder}/config.json and {ENCODER_FOLDER}/config.json"

    def decoder_weights(self) -> dict[str, StoredTensor]:
        """The decoder's body, by the names a stock model has."""
        own = ("model.embed_tokens.", "model.layers.", "model.norm.")
        return {tensor.name: tensor for tensor in self.main_tensors if tensor.name.startswith(own)}

    def encoder_weights(self) -> dict[str, StoredTensor]:
        """The encoder, by the names a stock model has, wherever it lies."""
        if self.encoder_tensors:
            return {tensor.name: tensor for tensor in self.encoder_tensors}
        prefix = f"model.{ENCODER_FOLDER}."
        return {t.name.removeprefix(prefix): t for t in self.main_tensors if t.name.startswith(prefix)}


def fetch_folder(name: str | Path, **hub: Any) -> tuple[Path, str | None]:
    """Find a folder, downloading it if `name` is a Hub id. An interrupted download resumes.

    Args:
        name: an existing folder, or the id of a Hub repository.
        hub: what `snapshot_download` takes of `revision`, `token`, `cache_dir` and `local_files_only`.

    Returns:
        The folder, and the commit it holds (None for a local folder).

    Raises:
        FileNotFoundError: if `name` is neither a folder nor shaped like a Hub id.
    """
    if Path(name).is_dir():
        return Path(name), None
    if Path(name).is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise FileNotFoundError(
            f"{name} is no folder, and no Hub id of the form 'owner/name' either. Check the path, or give the id."
        )
    patterns = [*READ_PATTERNS, *(f"{ENCODER_FOLDER}/{pattern}" for pattern in READ_PATTERNS)]
    folder = Path(snapshot_download(str(name), allow_patterns=patterns, **hub))
    return folder, folder.name


def open_released_checkpoint(name: str | Path, **hub: Any) -> ReleasedCheckpoint:
    """Open a checkpoint in the released layout; the arguments are those of [`fetch_folder`].

    Raises:
        FileNotFoundError: if the folder, one of its two `config.json` or its weights are absent.
        ValueError: if it is not in the released layout, an entry of a configuration is absent or cannot be, or a
            weight file is damaged.
    """
    folder, commit = fetch_folder(name, **hub)
    main_config = read_json_object(folder / "config.json")
    if "latent_token_len" not in main_config:
        raise ValueError(
            f"{folder}/config.json has no `latent_token_len` (model_type {main_config.get('model_type')!r}), so it is "
            "not a checkpoint in the released C3 layout. A folder that this package wrote needs no conversion."
        )
    encoder_folder = folder / ENCODER_FOLDER
    encoder_config = read_json_object(encoder_folder / "config.json")
    main_tensors = list_tensors(folder)
    whole = any(tensor.name.startswith(f"model.{ENCODER_FOLDER}.") for tensor in main_tensors)
    encoder_tensors = [] if whole else list_tensors(encoder_folder)
    problems = find_bad_entries(main_config, "config.json", {**_OF_BOTH, **_OF_MAIN})
    problems += find_bad_entries(encoder_config, f"{ENCODER_FOLDER}/config.json", _OF_BOTH)
    raise_problems(f"the configurations in {folder} hold what cannot be", problems)
    return ReleasedCheckpoint(str(name), commit, folder, main_config, encoder_config, main_tensors, encoder_tensors)


_ROPE_TYPES = tuple({"default": None, **ROPE_INIT_FUNCTIONS})


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _rope(value: Any) -> bool:
    rope_type = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else None
    return rope_type in _ROPE_TYPES


def _stop_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return value is None or all(type(token_id) is int for token_id in ids)


@dataclass(frozen=True)
class Entry:
    """What an entry of a `config.json` may be.

    Attributes:
        needed: whether it may be absent or null.
    """

    is_right: Callable[[Any], bool]
    expected: str
    needed: bool = False


# No model is as large; what is larger is a damaged file, and would be worked on for a long time.
_LARGEST = 2**24
_SIZE = Entry(_whole(1, _LARGEST), f"a whole number from 1 to {_LARGEST:,}", needed=True)
_OPTIONAL_SIZE = Entry(_SIZE.is_right, _SIZE.expected)
_TOKEN = Entry(_whole(0, _LARGEST), f"a token id from 0 to {_LARGEST:,}", needed=True)
_RATE = Entry(_positive, "a positive number")
_FLAG = Entry(lambda value: type(value) is bool, "true or false")
_TYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
_TYPE = Entry(lambda value: value in _TYPE_NAMES, f"one of {', '.join(_TYPE_NAMES)}")
_ROPE = Entry(_rope, f"an object whose type is {', '.join(_ROPE_TYPES)}")
_OF_BOTH = {
    **dict.fromkeys(("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"), _SIZE),
    **dict.fromkeys(
        ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings"), _OPTIONAL_SIZE
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range"), _RATE),
    **dict.fromkeys(("torch_dtype", "dtype"), _TYPE),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _ROPE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), Entry(lambda value: type(value) is int, "a token id")),
    "eos_token_id": Entry(_stop_ids, "a token id or a list of them"),
    "tie_word_embeddings": _FLAG,
    "hidden_act": Entry(lambda value: isinstance(value, str) and value in ACT2FN, "an activation transformers knows"),
}
_OF_MAIN = {
    "latent_token_len": _SIZE,
    **dict.fromkeys(("im_start_token", "im_end_token", "im_patch_token"), _TOKEN),
    "contexts_compression_llm_hidden_size": _OPTIONAL_SIZE,
}


def find_bad_entries(fields: dict, where: str, entries: dict[str, Entry]) -> list[str]:
    """List what in a configuration is absent or cannot be, one line each.

    Args:
        entries: what its entries may be, by name; others are not looked at.
    """
    problems = []
    for key, entry in entries.items():
        value = fields.get(key)
        if value is None and entry.needed:
            problems.append(f"`{key}` is absent from {where}, expected {entry.expected}")
        elif value is not None and not entry.is_right(value):
            problems.append(f"`{key}` in {where} is {repr(value)[:60]}, expected {entry.expected}")
    return problems


def find_contradictions(checkpoint: ReleasedCheckpoint) -> list[str]:
    """List where the two configurations and the tensors contradict each other, one line each."""
    main, encoder = checkpoint.main_config, checkpoint.encoder_config
    problems = [
        f"`{key}` is {main[key]}, outside the decoder's vocabulary of {main['vocab_size']}"
        for key in ("im_start_token", "im_end_token", "im_patch_token")
        if not 0 <= main[key] < main["vocab_size"]
    ]
    stated_width = main.get("contexts_compression_llm_hidden_size") or encoder["hidden_size"]
    if stated_width != encoder["hidden_size"]:
        problems.append(
            f"`contexts_compression_llm_hidden_size` is {stated_width}, but `hidden_size` of llm1 is "
            f"{encoder['hidden_size']}"
        )
    if not 0 <= main["im_start_token"] < encoder["vocab_size"]:
        problems.append(
            f"`im_start_token` is {main['im_start_token']}, outside the vocabulary of llm1 ({encoder['vocab_size']})"
        )
    halves = (
        ("config.json", main, checkpoint.decoder_weights()),
        (f"{ENCODER_FOLDER}/config.json", encoder, checkpoint.encoder_weights()),
    )
    for where, fields, tensors in halves:
        pad_id = fields.get("pad_token_id")
        if pad_id is not None and pad_id >= fields["vocab_size"]:
            problems.append(f"`pad_token_id` in {where} is {pad_id}, outside its vocabulary of {fields['vocab_size']}")
        problems += _find_odd_heads(fields, where) + find_absent_layers(fields["num_hidden_layers"], tensors, where)
    width, num_latents = encoder["hidden_size"], main["latent_token_len"]
    expected = {
        "model.Q.weight": ("latent_token_len x hidden_size of llm1", (num_latents, width)),
        "model.mm_projector.weight": ("hidden_size x hidden_size of llm1", (main["hidden_size"], width)),
    }
    for tensor in checkpoint.main_tensors:
        if tensor.name in expected and tensor.shape != expected[tensor.name][1]:
            meaning, shape = expected[tensor.name]
            problems.append(f"{tensor.name} is {list(tensor.shape)}, but the files say {list(shape)} ({meaning})")
    return problems


def _find_odd_heads(fields: dict, where: str) -> list[str]:
    width, heads, kv_heads = fields["hidden_size"], fields["num_attention_heads"], fields.get("num_key_value_heads")
    if fields.get("head_dim") is None and width % heads:
        return [f"`num_attention_heads` in {where} is {heads}, which does not divide `hidden_size` ({width})"]
    if kv_heads is not None and heads % kv_heads:
        return [f"`num_attention_heads` in {where} is {heads}, no multiple of `num_key_value_heads` ({kv_heads})"]
    return []


MARKERS = {
    "im_start_token": CONTEXT_START_TOKEN,
    "im_end_token": CONTEXT_END_TOKEN,
    "im_patch_token": CONTEXT_TOKEN,
}


@dataclass(frozen=True)
class Vocabulary:
    """What a conversion needs to know about tokens.

    Attributes:
        tokenizer: the tokenizer, or None if the checkpoint has none.
        end_of_text_id: `<|endoftext|>`, which also pads.
        stop_ids: ids at which generation stops, `<|endoftext|>` last.
        inline_ids: the tokens around a context written in line; None without them.
    """

    tokenizer: PreTrainedTokenizerFast | None
    end_of_text_id: int
    stop_ids: list[int]
    inline_ids: tuple[int, int] | None


def read_vocabulary(checkpoint: ReleasedCheckpoint) -> Vocabulary:
    """Read the tokenizer beside a checkpoint: `qwen.tiktoken`, else a `tokenizer.json`, in the main folder or `llm1`.

    Raises:
        ValueError: if the tokenizer's special tokens contradict the ids in `config.json`.
    """
    main = checkpoint.main_config
    max_length = main.get("max_position_embeddings", 32768)
    for folder in (checkpoint.folder, checkpoint.folder / ENCODER_FOLDER):
        if (folder / TIKTOKEN_FILE).is_file():
            tokenizer = load_qwen_tokenizer(folder / TIKTOKEN_FILE, max_length)
            return _vocabulary_of(tokenizer, checkpoint)
        if (folder / "tokenizer.json").is_file():
            tokenizer = load_fast_tokenizer(folder, max_length)
            return _vocabulary_of(tokenizer, checkpoint)
    return _vocabulary_by_rule(checkpoint)


def load_fast_tokenizer(folder: Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Load a `tokenizer.json` beside a descendant, and make it one a C3 processor takes."""
    for path in sorted(folder.glob("*token*.json")):
        read_json_object(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    install_escapes(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = model_max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def _vocabulary_of(tokenizer: PreTrainedTokenizerFast, checkpoint: ReleasedCheckpoint) -> Vocabulary:
    main = checkpoint.main_config
    ids = tokenizer.get_vocab()
    problems = [
        f"`{key}` is {main.get(key)}, but {text} has the id {ids.get(text)} in the tokenizer"
        for key, text in MARKERS.items()
        if ids.get(text) != main.get(key)
    ]
    if len(tokenizer) > main.get("vocab_size", 0):
        problems.append(f"`vocab_size` is {main.get('vocab_size')}, but the tokenizer has {len(tokenizer)} entries")
    problems += [f"the tokenizer has no {text}" for text in (END_OF_TEXT, STOP_TOKEN) if text not in ids]
    raise_problems(f"tokenizer and configuration in {checkpoint.folder} contradict each other", problems)
    inline = [ids.get(text) for text in (INLINE_CONTEXT_START_TOKEN, INLINE_CONTEXT_END_TOKEN)]
    return Vocabulary(
        tokenizer=tokenizer,
        end_of_text_id=ids[END_OF_TEXT],
        stop_ids=[ids[STOP_TOKEN], ids[END_OF_TEXT]],
        inline_ids=None if None in inline else (inline[0], inline[1]),
    )


def _vocabulary_by_rule(checkpoint: ReleasedCheckpoint) -> Vocabulary:
    """Without a tokenizer: Qwen's vocabularies have `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` in a row."""
    main = checkpoint.main_config
    size, eos = main.get("vocab_size", 0), main.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [eos]
    stop_ids = [stop_id for stop_id in listed if isinstance(stop_id, int) and 0 <= stop_id < size]
    if not stop_ids or len(stop_ids) < len(listed):
        raise ValueError(
            f"`eos_token_id` in {checkpoint.folder}/config.json is {eos!r}, expected ids below `vocab_size` "
            f"({size}). Without a tokenizer it is the only clue to where generation stops."
        )
    end_of_turn = stop_ids[0] + 2
    if len(stop_ids) == 1 and end_of_turn < size and end_of_turn not in {main.get(key) for key in MARKERS}:
        stop_ids = [end_of_turn, *stop_ids]
    logger.warning(
        f"{checkpoint.folder} has no tokenizer ({TIKTOKEN_FILE} or tokenizer.json): the converted model gets no "
        f"processor, and its stop ids {stop_ids} follow from Qwen's order of special tokens."
    )
    return Vocabulary(tokenizer=None, end_of_text_id=stop_ids[-1], stop_ids=stop_ids, inline_ids=None)
