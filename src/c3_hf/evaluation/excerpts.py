"""Excerpts of a given number of tokens from a long text."""

from __future__ import annotations

from c3_hf.evaluation.tokens import TokenMeter


# No tokenizer of this family averages more characters a token on prose or code.
_CHARACTERS_PER_TOKEN = 8


def excerpts(text: str, num_tokens: int, count: int, meter: TokenMeter) -> list[str]:
    """`count` excerpts of `num_tokens` tokens, evenly spaced over `text`, each beginning at the start of a line.

    Args:
        text: A long text.
        num_tokens: Tokens of one excerpt; one that reaches the end of the text may be shorter.
        count: Number of excerpts.
        meter: Counts the tokens.

    Returns:
        The excerpts in order of their place, none empty.
    """
    starts = (_line_start(text, len(text) * number // count) for number in range(count))
    pieces = (meter.cut(text[start : start + _CHARACTERS_PER_TOKEN * num_tokens], num_tokens) for start in starts)
    return [piece[0] for piece in pieces if piece]


def _line_start(text: str, position: int) -> int:
    if position == 0:
        return 0
    newline = text.find("\n", position)
    return position if newline < 0 else newline + 1
