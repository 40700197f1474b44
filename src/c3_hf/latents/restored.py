"""Restore a compressed context: the text of all its segments, joined, with the word on each whether it is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .context import CompressedContext
from .exactness import matches, restore_bytes
from .fingerprints import check_model, check_processor
from .residual import Residual
from .restoring import Restorer, batches_by_length, check_at_least_1, decode_tokens, generation_budget


# Batches of segments sorted by length together; also how far ahead of what is given out is restored.
_GROUP_BATCHES = 8


@dataclass(frozen=True)
class RestoredText:
    """What came back from a compressed context.

    Attributes:
        data: The bytes.
        exact_segments: For each segment whether its digest is that of the source.
        text_sha256: SHA-256 of the source in hexadecimal, where the context knows it: a slice does not.
    """

    data: bytes
    exact_segments: tuple[bool, ...]
    text_sha256: str | None = None

    @property
    def text(self) -> str:
        """`data` as UTF-8; bytes that are not come out as U+FFFD."""
        return self.data.decode("utf-8", "replace")

    @property
    def is_exact(self) -> bool:
        """Whether these are the very bytes that were compressed; nothing is not, unless the source was empty."""
        if self.text_sha256 is not None:
            return hashlib.sha256(self.data).hexdigest() == self.text_sha256
        return bool(self.exact_segments) and all(self.exact_segments)


def restore(
    context: CompressedContext,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> RestoredText:
    """Generate the text of a compressed context back.

    A byte-exact context gives the bytes of its source or an error. Any other gives what greedy decoding makes of it.

    Args:
        context: What to restore; a slice gives that part of the text.
        model: The model that compressed it.
        processor: Its processor.
        batch_size: Segments in one batch.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: If the model or processor is another one than the context was made with, the context is damaged,
            a byte-exact context does not come out right on this machine, or `batch_size` is not positive.
    """
    pieces = list(iter_restored(context, model, processor, batch_size=batch_size, progress=progress))
    data = b"".join(data for data, _ in pieces)
    return RestoredText(data, tuple(is_exact for _, is_exact in pieces), context.header.text_sha256)


def iter_restored(
    context: CompressedContext,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> Iterator[tuple[bytes, bool]]:
    """As [`restore`], segment after segment: the bytes, and whether their digest is that of the source.

    Memory does not grow with the number of segments.

    Raises:
        ValueError: As [`restore`]; what can be seen beforehand is raised by the call, the rest on the way.
    """
    check_at_least_1("batch_size", batch_size)
    check_processor(context.header.tokenizer, processor, context.name)
    check_model(context.header.model, model, context.name)
    restorer = Restorer(model, processor)
    lengths = context.token_offsets.diff()
    if len(lengths) and int(lengths.max()) >= restorer.room:
        raise ValueError(
            f"{context.place(int(lengths.argmax()))} is damaged: `token_offsets` give it {int(lengths.max()):,} "
            f"tokens, the decoder has positions for fewer than {restorer.room:,}."
        )
    return _iter_restored(context, restorer, batch_size, progress)


def _iter_restored(
    context: CompressedContext, restorer: Restorer, batch_size: int, progress: bool
) -> Iterator[tuple[bytes, bool]]:
    whole, all_exact = hashlib.sha256(), True
    with tqdm(total=len(context), unit="segment", disable=None if progress else True) as bar:
        for start in range(0, len(context), _GROUP_BATCHES * batch_size):
            group = context[start : start + _GROUP_BATCHES * batch_size]
            for index, data in enumerate(_restore_group(group, restorer, batch_size)):
                is_exact = matches(data, group.digests[index])
                if context.is_exact and not is_exact:
                    raise ValueError(_not_exact(group, index, restorer.model))
                all_exact &= is_exact
                whole.update(data)
                bar.update()
                yield data, is_exact
    if all_exact:
        context.check_whole(whole.hexdigest())


@torch.no_grad()
def _restore_group(context: CompressedContext, restorer: Restorer, batch_size: int) -> list[bytes]:
    lengths = context.token_offsets.diff().tolist()
    residuals = _residuals(context, restorer) if context.is_exact else None
    restored: list[bytes] = [b""] * len(context)
    wanted = list(range(len(context)))
    if residuals is not None:
        for index, residual in enumerate(residuals):
            restored[index] = residual.stored or b""
        wanted = [index for index in wanted if residuals[index].stored is None]
    latents = context.project(restorer.model)
    for places in batches_by_length([lengths[index] for index in wanted], batch_size):
        rows = [wanted[place] for place in places]
        sizes = [lengths[row] for row in rows]
        if residuals is not None:
            texts = restore_bytes(restorer, latents[rows], [residuals[row] for row in rows], sizes)
        else:
            sequences = restorer.generate(latents[rows].unsqueeze(1), generation_budget(max(sizes)))
            texts = [decode_tokens(restorer.processor, sequence).encode("utf-8", "replace") for sequence in sequences]
        for row, data in zip(rows, texts):
            restored[row] = data
    return restored


def _residuals(context: CompressedContext, restorer: Restorer) -> list[Residual]:
    size = restorer.model.config.text_config.vocab_size
    residuals = []
    for index in range(len(context)):
        residual = context.segment_residual(index)
        largest = max((token_id for _, token_id in residual.corrections), default=0)
        if largest >= size:
            raise ValueError(
                f"the `residual` of {context.place(index)} is damaged: it has the token id {largest}, the model has "
                f"{size}."
            )
        residuals.append(residual)
    return residuals


def _not_exact(context: CompressedContext, index: int, model: PreTrainedModel) -> str:
    return (
        f"{context.place(index)} (byte-exact) did not come back right (its digest differs), so nothing is given out. "
        f"It was computed with {context.header.writer}; this is {model.device.type}, {model.dtype}. Load the model in "
        "the same dtype, or compress with a larger `exact_margin`."
    )
