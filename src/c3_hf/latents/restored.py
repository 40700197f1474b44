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
from .restoring import Restorer, batches_by_length, decode_tokens, generation_budget


# Batches of segments sorted by length together; also how far ahead of what is given out is restored.
_GROUP_BATCHES = 8


@dataclass(frozen=True)
class RestoredText:
    """What came back from a compressed context.

    Attributes:
        data: The bytes.
        exact_segments: For each segment whether its digest is that of the source.
    """

    data: bytes
    exact_segments: tuple[bool, ...]

    @property
    def text(self) -> str:
        """`data` as UTF-8; bytes that are not come out as U+FFFD."""
        return self.data.decode("utf-8", "replace")

    @property
    def is_exact(self) -> bool:
        """Whether these are the very bytes that were compressed."""
        return all(self.exact_segments)


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
            or a byte-exact context does not come out right on this machine.
    """
    pieces = list(iter_restored(context, model, processor, batch_size=batch_size, progress=progress))
    return RestoredText(b"".join(data for data, _ in pieces), tuple(is_exact for _, is_exact in pieces))


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
    """
    check_processor(context.header.tokenizer, processor)
    restorer = Restorer(model, processor)
    whole = hashlib.sha256()
    check_model(context.header.model, model)
    with tqdm(total=len(context), unit="segment", disable=None if progress else True) as bar:
        for start in range(0, len(context), _GROUP_BATCHES * batch_size):
            group = context[start : start + _GROUP_BATCHES * batch_size]
            for index, data in enumerate(_restore_group(group, restorer, batch_size)):
                is_exact = matches(data, group.digests[index])
                if context.is_exact and not is_exact:
                    raise ValueError(_not_exact(context, start + index, model))
                whole.update(data)
                bar.update()
                yield data, is_exact
    expected = context.header.text_sha256
    if context.is_exact and expected is not None and whole.hexdigest() != expected:
        raise ValueError(
            f"the restored text has SHA-256 {whole.hexdigest()}, the source had {expected}, although each segment is "
            "right: the file's header is damaged."
        )


@torch.no_grad()
def _restore_group(context: CompressedContext, restorer: Restorer, batch_size: int) -> list[bytes]:
    lengths = context.token_offsets.diff().tolist()
    residuals = [context.segment_residual(index) for index in range(len(context))] if context.is_exact else None
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


def _not_exact(context: CompressedContext, segment: int, model: PreTrainedModel) -> str:
    return (
        f"segment {segment} of this byte-exact context did not come back right (its digest differs), so nothing is "
        f"given out. It was computed with {context.header.writer}; this is {model.device.type}, {model.dtype}. Load "
        "the model in the same dtype, or compress with a larger `exact_margin`."
    )
