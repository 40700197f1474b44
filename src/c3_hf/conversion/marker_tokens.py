"""The special tokens a C3 model needs, on tokenizers that were made for other models."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from c3_hf.modeling.prompt_c3 import (
    CONTEXT_END_TOKEN,
    CONTEXT_START_TOKEN,
    CONTEXT_TOKEN,
    INLINE_CONTEXT_END_TOKEN,
    INLINE_CONTEXT_START_TOKEN,
    STOP_TOKEN,
    TURN_TOKEN,
    TokenReader,
)


MARKERS = (TURN_TOKEN, STOP_TOKEN, CONTEXT_START_TOKEN, CONTEXT_END_TOKEN, CONTEXT_TOKEN)
INLINE_MARKERS = (INLINE_CONTEXT_START_TOKEN, INLINE_CONTEXT_END_TOKEN)

# Ordinary text on which two tokenizers must give the same ids to count as one: scripts, code, white space, digits,
# emoji, combining marks, rare words.
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Antidisestablishmentarianism; floccinaucinihilipilification!",
    "def f(x):\n\treturn {'a': x ** 2}  # 0x1F\n\n\n",
    "1234567890 3.14159 1,000,000 2024-02-29T12:00:00Z",
    "  leading,   inner   and trailing   ",
    "春眠不觉晓，处处闻啼鸟。",
    "Привет, мир! Γειά σου Κόσμε. مرحبا بالعالم. こんにちは世界。안녕하세요.",
    "cafe\u0301 naïve Ærøskøbing ﬁne ½ ①",
    "😀👩‍👩‍👧‍👦 🇨🇳",
    '<p class="x">&nbsp;</p> {"k": [null, true]} \\frac{1}{2}',
    "\r\nline\r\n",
    "a\u00a0b\u2003c\u200bd",
)


def tokenizers_agree(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids for ordinary text, so that both halves can read one vocabulary."""
    first_ids, second_ids = (
        [ids for ids, _ in TokenReader(tokenizer).read_plain(list(PROBES))] for tokenizer in (first, second)
    )
    return first_ids == second_ids


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


def add_markers(tokenizer: PreTrainedTokenizerBase, inline: bool) -> None:
    """Add the tokens of prompt format and contexts that are not there yet.

    Args:
        tokenizer: the decoder's; changed in place.
        inline: whether to add the two tokens around contexts written in line, which need one vocabulary.

    Raises:
        ValueError: if the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`decoder`: its tokenizer ({type(tokenizer).__name__}) has no `eos_token`, so generation could not stop. "
            "Set one in its tokenizer_config.json."
        )
    vocabulary = tokenizer.get_vocab()
    wanted = MARKERS + (INLINE_MARKERS if inline else ())
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in wanted if text not in vocabulary],
        special_tokens=True,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
