"""Train the tokenizer of a small C3: byte-level BPE with the Qwen split and the released model's special strings.

The result differs from the released vocabulary in its words only: pre-tokenisation, normalisation, decoding and the
217 special strings with their order are the same, so every prompt and every processor setting carries over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..files import read_jsonl
from ..modeling.prompt_c3 import END_OF_TEXT, SPECIAL_TOKENS, SPLIT_PATTERN, install_escapes


MAX_WORD_LENGTH = 24


def read_texts(path: str | Path, share: float = 1.0, seed: int = 0) -> Iterator[str]:
    """Yield the "text" fields of a JSONL file (plain or gzip), each record kept with probability `share` (0 to 1)."""
    rng = np.random.default_rng(seed)
    for record in read_jsonl(path):
        if share >= 1 or rng.random() < share:
            yield record["text"]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with `vocab_size` entries, special tokens included, on `texts`.

    Args:
        texts: documents; the result is a function of their contents and order.
        vocab_size: all entries; at least 256 bytes + 217 special tokens.

    Returns:
        A fast tokenizer that reads escapes, with the chat template; left padding, `<|endoftext|>` ends and pads.

    Raises:
        ValueError: if `vocab_size` leaves no room for the bytes and the special tokens.
    """
    num_words = vocab_size - len(SPECIAL_TOKENS)
    if num_words < 256:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but the 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at least "
            f"{256 + len(SPECIAL_TOKENS)}. Give a larger `vocab_size`."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_words,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_WORD_LENGTH,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    install_escapes(fast)
    return fast


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse `FOLDER VOCAB_SIZE FILE[:SHARE] ...`, train on the files in that order and save into the folder."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) < 3:
        raise SystemExit("usage: python -m c3_hf.training.tokenizer FOLDER VOCAB_SIZE FILE[:SHARE] ...")
    folder, vocab_size, *files = arguments
    named = [(path, float(share or 1)) for path, _, share in (file.partition(":") for file in files)]
    tokenizer = train_tokenizer(chain.from_iterable(read_texts(*entry) for entry in named), int(vocab_size))
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
