"""The original's tokenizer file, `qwen.tiktoken`, as a tokenizer of the `tokenizers` library, and back.

The file lists byte strings with their ranks. A rank is at once the token's id and its merge priority, and no merge
list is stored; the merges are recovered by asking which two lower-ranked tokens each token is joined from. The
tokenizer gives the ids of tiktoken, with two differences. Special strings are matched before text is normalised: one
that is followed by a combining mark which NFC would fuse with its ">" stays special. And the NFC of the `tokenizers`
library knows an older Unicode than Python's: combining marks added since (U+09FE, U+0D3B, U+0D3C and the like) keep
their place among other marks on the same letter.

transformers' own TikTokenConverter is not used: it groups digits by three, leaves NFC out and lists merges twice.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from c3_hf.modeling.prompt_c3 import END_OF_TEXT, SPECIAL_TOKENS, SPLIT_PATTERN, install_escapes


TIKTOKEN_FILE = "qwen.tiktoken"


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a tiktoken vocabulary file.

    Args:
        path: a text file, one token a line: its bytes in base64, a space, its rank. Copies with CRLF line ends exist
            and are read alike.

    Returns:
        Token bytes to rank; ranks are 0, 1, … without gaps.

    Raises:
        ValueError: if a line cannot be read, a token or rank comes twice, ranks have gaps, or a byte is missing.
    """
    ranks: dict[bytes, int] = {}
    # Bytes outside ASCII become characters that base64 refuses below, with the number of their line.
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"`path` {path}, line {number}: expected '<base64> <rank>', got {line[:60]!r}. Download it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"`path` {path}: the {len(ranks)} tokens read do not have the ranks 0 to {len(ranks) - 1}, each once. The "
            "file is incomplete or damaged; download it again."
        )
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ValueError(
            f"`path` {path}: {len(missing)} of the 256 single bytes have no rank (first: {missing[0]:#04x}), so some "
            "text could not be tokenised. Download the file again."
        )
    return ranks


def write_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Write `ranks` in the format [`read_ranks`] reads, in rank order with LF line ends, as the original's file is."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=_by_rank))
    Path(path).write_bytes("".join(lines).encode("ascii"))


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover the merge list of a byte-level BPE from its ranks.

    A token of two bytes or more was made by merging two tokens of lower rank: the two parts that remain when its bytes
    are merged greedily with all lower ranks.

    Args:
        ranks: token bytes to rank, single bytes included.

    Returns:
        The pairs in the order of the ranks of what they make (151,387 for the released vocabulary).

    Raises:
        ValueError: if a token does not come down to two parts, so that no merge can make it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=_by_rank):
        if len(token) == 1:
            continue
        parts = _merge_below(ranks, token, rank)
        if len(parts) != 2:
            raise ValueError(
                f"`ranks`: token {token!r} (rank {rank}) is no merge of two tokens of lower rank, its parts are "
                f"{parts}. Not the vocabulary of a byte-level BPE."
            )
        merges.append((parts[0], parts[1]))
    return merges


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Build the fast tokenizer.

    Args:
        ranks: token bytes to id, ids 0 to `len(ranks) - 1`; the special strings take those behind, in their order.

    Returns:
        A byte-level BPE with NFC and Qwen's split pattern.
    """
    letters = bytes_to_unicode()
    vocabulary = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spell(left, letters), _spell(right, letters)) for left, right in recover_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def load_qwen_tokenizer(path: str | Path, model_max_length: int) -> PreTrainedTokenizerFast:
    """Read `qwen.tiktoken` as a transformers tokenizer.

    Args:
        model_max_length: longest sequence the model takes, in tokens; truncation uses it.

    Returns:
        A fast tokenizer with the original's 217 special tokens; `<|endoftext|>` ends and pads, as in the original, and
        padding is on the left, which generation needs (the original pads on the right and generates at batch 1). It
        reads the processor's escapes, so that user text can be kept from becoming special tokens.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(read_ranks(path)),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    install_escapes(tokenizer)
    return tokenizer


def ranks_of(tokenizer: PreTrainedTokenizerFast) -> dict[bytes, int]:
    """The ranks a byte-level BPE tokenizer was built from: the inverse of [`build_tokenizer`].

    Raises:
        ValueError: if an entry that is not an added token is spelled with characters outside the byte alphabet.
    """
    values = {letter: value for value, letter in bytes_to_unicode().items()}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ranks = {}
    for text, token_id in tokenizer.get_vocab().items():
        if text in added:
            continue
        if not all(letter in values for letter in text):
            raise ValueError(
                f"`tokenizer`: entry {text!r} is not spelled in the byte-level alphabet, so the vocabulary cannot be "
                f"written as {TIKTOKEN_FILE}."
            )
        ranks[bytes(values[letter] for letter in text)] = token_id
    return ranks


def _by_rank(item: tuple[bytes, int]) -> int:
    return item[1]


def _spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[value] for value in token)


def _merge_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """Byte-pair merging of `token` with the merges whose rank is below `limit`, lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = ((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        rank, i = min(candidates)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
