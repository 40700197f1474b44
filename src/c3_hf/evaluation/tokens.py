"""Counting and cutting text in the tokens of the measured checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from c3_hf.latents.segments import iter_segments
from c3_hf.modeling.prompt_c3 import TokenReader


@dataclass(frozen=True)
class TokenMeter:
    """The checkpoint's tokenizer with the two sizes that tasks cut by.

    Args:
        tokenizer: A fast tokenizer. Text is read as text: special tokens spelled out in it do not count as such.
        num_latents: Latents of one segment.
        segment_tokens: Most tokens of one segment of a long text.
    """

    tokenizer: PreTrainedTokenizerBase
    num_latents: int
    segment_tokens: int

    @cached_property
    def reader(self) -> TokenReader:
        """Reads text with the tokenizer, and leaves it as it is."""
        return TokenReader(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.reader.read_plain([text])[0][0]

    def count(self, text: str) -> int:
        """Number of tokens of `text`."""
        return len(self.encode(text))

    def segments(self, text: str) -> list[str]:
        """`text` in segments of at most `segment_tokens` tokens, cut at sentence ends where possible, as users get."""
        return [segment.text for segment in iter_segments(text, self.reader, self.segment_tokens)]

    def cut(self, text: str, num_tokens: int) -> list[str]:
        """`text` in pieces of exactly `num_tokens` tokens (the last may be shorter), wherever that falls.

        The concatenation is `text`. A character that spans two tokens is not cut, so a piece can be a token off.

        Args:
            text: Any text; an empty one gives no pieces.
            num_tokens: Tokens of a piece, at least 1.

        Raises:
            ValueError: If `num_tokens` is smaller than 1.
        """
        if num_tokens < 1:
            raise ValueError(f"`num_tokens` is {num_tokens}, expected at least 1 token for each piece.")
        if not text:
            return []
        offsets = self.reader.read_plain([text])[0][1]
        starts = sorted({0, *(start for start, _ in offsets[::num_tokens])})
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]
