"""How a text is compressed: the options that signatures, commands and files take theirs from.

Without torch, so that the help of a command that has them answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# NFC can expand one character to three of four bytes (U+1D160), each byte a token of its own in the worst vocabulary.
MIN_SEGMENT_LENGTH = 16
# Fewer bytes: bfloat16, or int8 with one float32 scale a latent.
LATENT_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class CompressionOptions:
    """How a text is compressed.

    A file says of it the fields that [`ContextHeader`] has too; `latent_dtype`, `verify` and `exact` show in its
    tensors; `batch_size` changes nothing in the result.

    Attributes:
        ratio: Tokens of the text for each latent, at most: a segment has `ratio * num_latents` tokens. For a model
            whose latents have a stride (`config.latent_stride`) at most that, which is the default.
        segment_length: Most tokens of a segment; by default what `ratio` gives, else `config.longest_segment`: what
            the model was made for, or 20 for each latent.
        latent_dtype: How latents are stored: `float32`, `bfloat16`, or `int8` with a scale a latent.
        verify: Measure each segment's fidelity.
        exact: Byte-exact mode: store what the latents do not bring back.
        target_fidelity: Token accuracy, 0 to 1, that every segment shall reach. Where a segment does not, latents with
            a stride get a smaller one, and other segments are cut shorter, down to `min_segment_length`. Implies
            `verify`.
        min_segment_length: Tokens, at least 16; only with `target_fidelity`.
        exact_margin: Logit margin below which a right token is corrected too; by default 0.01 in float32, 0.5 in
            bfloat16, 0.1 in float16. Only with `exact`.
        exact_check: Restore every segment now, and store one that fails as bytes. Without, which saves that time, such
            a segment is an error when it is restored. Only with `exact`.
        batch_size: Segments in one batch.
    """

    ratio: int | None = None
    segment_length: int | None = None
    latent_dtype: str | torch.dtype = "bfloat16"
    verify: bool = False
    exact: bool = False
    target_fidelity: float | None = None
    min_segment_length: int | None = MIN_SEGMENT_LENGTH
    exact_margin: float | None = None
    exact_check: bool | None = True
    batch_size: int = 16
