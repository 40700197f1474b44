"""The tokenizer of a checkpoint in the released layout, and the token ids that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from c3_hf.conversion.plan import raise_problems
from c3_hf.conversion.qwen_tiktoken import TIKTOKEN_FILE, load_qwen_tokenizer
from c3_hf.conversion.source import ENCODER_FOLDER, ReleasedCheckpoint
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
