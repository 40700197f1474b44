"""A C3 model out again: in the original's layout, or one half as a stock causal language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from c3_hf.conversion import plan, weights
from c3_hf.conversion.chat_templates import TEMPLATE_FILE, give_back_own_template
from c3_hf.conversion.configs import stock_config, write_released_configs
from c3_hf.conversion.for_vllm import HEAD_SIZES, head_size_of, keeps_escapes, with_placeholder
from c3_hf.conversion.halves import find_body
from c3_hf.conversion.plan import HEAD, WeightPlan, compare_shapes, expected_shapes
from c3_hf.conversion.qwen_tiktoken import TIKTOKEN_FILE, ranks_of, write_ranks
from c3_hf.conversion.released import ENCODER_FOLDER, fetch_folder
from c3_hf.conversion.repository import check_layers, read_config
from c3_hf.conversion.weights import StoredTensor, list_tensors, raise_problems
from c3_hf.files import atomic_folder, read_json_object, write_json
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.prompt_c3 import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    build_chat_template,
    escape_characters,
)


logger = logging.get_logger(__name__)

LAYOUTS = ("original", "decoder", "encoder")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE)
ENCODER_TOKENIZER_FOLDER = "encoder_tokenizer"
# What the original's file says; the class is in its tokenization_qwen.py, which is not shipped here.
ORIGINAL_TOKENIZER_CONFIG = {
    "added_tokens_decoder": {},
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "clean_up_tokenization_spaces": True,
    "eos_token": END_OF_TEXT,
    "extra_special_tokens": {},
    "model_max_length": 8192,
    "pad_token": END_OF_TEXT,
    "padding_side": "right",
    "tokenizer_class": "QWenTokenizer",
}
ORIGINAL_MAX_NEW_TOKENS = 2048


def export(
    model: str | Path,
    output: str | Path,
    layout: str,
    *,
    max_shard_size: int | str = weights.DEFAULT_SHARD_SIZE,
    **hub: Any,
) -> list[str]:
    """Write a C3 model, or a half of it, in another layout. Tensors keep their bytes; memory stays small.

    Args:
        model: folder or Hub id of a C3 model.
        output: the folder to make; it appears complete or not at all.
        layout: "original" for the released layout (main folder and `llm1`), "decoder" or "encoder" for one half as a
            stock causal language model. The encoder has no head of its own; its folder has the head tied to the
            embeddings, as the original's encoder has.
        max_shard_size: largest weight file, in bytes or as "5GB".
        hub: how a Hub repository is fetched, see [`fetch_folder`].

    Returns:
        Paths of the weight files, below `output`.

    Raises:
        FileNotFoundError: if the model's files are absent.
        ValueError: if `layout` is unknown or cannot hold this model, `output` is taken, or tensors do not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    max_shard_size = weights.shard_size(max_shard_size)
    source, _ = fetch_folder(model, **hub)
    config = read_config(source)
    if config.latent_stride is not None and layout != "encoder":
        raise ValueError(
            f"`layout` {layout!r} cannot hold this model: its latents keep the positions of their text "
            f"(`latent_stride` {config.latent_stride}), and what reads the exported folder counts positions up by "
            "one. Serve the model itself."
        )
    tensors = {tensor.name: tensor for tensor in list_tensors(source)}
    check_layers(source, config, tensors)
    problems = compare_shapes(expected_shapes(config, source / "config.json"), WeightPlan(sources=tensors))
    raise_problems(f"the weights in {source} do not fit its config.json", problems)
    with atomic_folder(output) as folder:
        if layout == "original":
            return _export_original(source, folder, config, tensors, max_shard_size)
        return _export_half(layout, source, folder, config, tensors, max_shard_size)


def _export_original(
    source: Path, folder: Path, config: C3Config, tensors: dict[str, StoredTensor], max_shard_size: int
) -> list[str]:
    main_config, encoder_config = write_released_configs(config)
    halves = (
        (folder, main_config, plan.ORIGINAL_MAIN_RENAMES),
        (folder / ENCODER_FOLDER, encoder_config, plan.ORIGINAL_ENCODER_RENAMES),
    )
    files = []
    for half, half_config, renames in halves:
        half.mkdir(exist_ok=True)
        names = {name: plan.find_target(name, renames) for name in tensors}
        sources = {target: tensors[name] for name, target in names.items() if target is not None}
        written = weights.write_shards(half, sources, max_shard_size=max_shard_size)
        files += [(half / name).relative_to(folder).as_posix() for name in written]
        write_json(half / "config.json", half_config)
        generation = {
            "bos_token_id": half_config["bos_token_id"],
            "eos_token_id": half_config["eos_token_id"],
            "max_new_tokens": ORIGINAL_MAX_NEW_TOKENS,
            "transformers_version": half_config["transformers_version"],
        }
        write_json(half / "generation_config.json", generation)
    _export_original_tokenizer(source, folder)
    return files


def _export_original_tokenizer(source: Path, folder: Path) -> None:
    """Write `qwen.tiktoken` where the vocabulary is one of that kind; else copy the tokenizer as it is."""
    if not (source / "tokenizer.json").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    if added != {first + index: text for index, text in enumerate(SPECIAL_TOKENS)}:
        _copy_tokenizer(source, folder)
        return
    write_ranks(ranks_of(tokenizer), folder / TIKTOKEN_FILE)
    write_json(folder / "tokenizer_config.json", ORIGINAL_TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})


def _export_half(
    layout: str,
    source: Path,
    folder: Path,
    config: C3Config,
    tensors: dict[str, StoredTensor],
    max_shard_size: int,
) -> list[str]:
    half_config = config.text_config if layout == "decoder" else config.encoder_config
    ours = "model.language_model." if layout == "decoder" else "model.encoder."
    if layout == "encoder":
        # A copy: the head is written as tied, which the encoder inside the C3 model need not be.
        half_config = type(half_config).from_dict({**half_config.to_dict(), "tie_word_embeddings": True})
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(half_config)
    prefix = f"{find_body(stock)[0]}."
    sources = {prefix + name.removeprefix(ours): t for name, t in tensors.items() if name.startswith(ours)}
    if layout == "decoder" and HEAD in tensors:
        sources[HEAD] = tensors[HEAD]
    shapes = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    if half_config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    problems = compare_shapes(shapes, WeightPlan(sources=sources))
    raise_problems(f"the {layout} does not fit {type(stock).__name__}", problems)
    files = weights.write_shards(folder, sources, max_shard_size=max_shard_size)
    dtype = next(iter(sources.values())).dtype
    write_json(folder / "config.json", stock_config(half_config, type(stock).__name__, dtype))
    if layout == "decoder":
        if head_size_of(half_config) not in HEAD_SIZES:
            logger.warning(
                f"vLLM cannot run this decoder: its attention heads have {head_size_of(half_config)} dimensions, and "
                f"vLLM's on CPUs {', '.join(map(str, HEAD_SIZES))}. Serve the model itself."
            )
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(folder)
        _copy_tokenizer(source, folder)
        give_back_own_template(source, folder)
    else:
        own = source / ENCODER_TOKENIZER_FOLDER
        _copy_tokenizer(own if own.is_dir() else source, folder)
    return files


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer files, without what ties them to the processor.

    The escapes stay in the chat template where the tokenizer that is read back takes them out again. A class that
    rebuilds its normalizer does not, and U+FDD0 would reach the model.
    """
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        if name == "tokenizer_config.json":
            fields = read_json_object(source / name)
            kept = {key: value for key, value in fields.items() if key not in ("auto_map", "processor_class")}
            (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name != TEMPLATE_FILE:
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATE_FILE).is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        template = (source / TEMPLATE_FILE).read_text(encoding="utf-8")
        if template == build_chat_template(escape_characters(tokenizer)) and not keeps_escapes(tokenizer, folder):
            template = build_chat_template([])
            logger.warning(
                f"the exported tokenizer is a {type(tokenizer).__name__}, which cannot keep special strings of "
                "users apart from special tokens: text such as '<|im_end|>' ends the turn in its chat template."
            )
        (folder / TEMPLATE_FILE).write_text(with_placeholder(template), encoding="utf-8")
