"""Give the text of compressed contexts back, segment by segment, with the word on each whether it is exact."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .context import CompressedContext, check_at_least_1
from .decoding import Restorer, batches_by_length, decode_tokens, generation_budget
from .exact import Residual, restore_bytes
from .measure import count_lost, measure_margins, to_margin_dtype
from .segments import Segment, Source, TextReader, read_segment


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

    def __str__(self) -> str:
        return self.text

    @property
    def is_exact(self) -> bool:
        """Whether these are the very bytes that were compressed; nothing is not, unless the source was empty."""
        if self.text_sha256 is not None:
            return hashlib.sha256(self.data).hexdigest() == self.text_sha256
        return bool(self.exact_segments) and all(self.exact_segments)


def restore_all(contexts: Sequence[CompressedContext], restorer: Restorer, **options: Any) -> list[RestoredText]:
    """All of what [`iter_restored`] gives, one text for each context."""
    pieces = iter_restored(contexts, restorer, **options)
    sizes = list(map(len, contexts))
    texts = []
    for context, size in zip(contexts, sizes):
        own = list(islice(pieces, size))
        exact = tuple(is_exact for _, is_exact in own)
        texts.append(RestoredText(b"".join(data for data, _ in own), exact, context.header.text_sha256))
    # What is checked behind the last segment.
    next(pieces, None)
    return texts


def iter_restored(
    contexts: Sequence[CompressedContext],
    restorer: Restorer,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[bytes, bool]]:
    """Generate the text of contexts back, segment after segment: the bytes, and whether their digest is the source's.

    A byte-exact context gives the bytes of its source or an error. Any other gives what greedy decoding makes of it.
    Memory does not grow with the number of segments.

    Args:
        contexts: What to restore; a slice gives that part of the text. Their segments share batches.
        restorer: The model that compressed them, and its processor.
        batch_size: Segments in one batch.
        max_new_tokens: Most tokens of a segment that is not byte-exact; by default those of its text, an eighth more,
            and 16.
        progress: Whether to show a progress bar on a terminal.

    Raises:
        ValueError: If the model or processor is another one than a context was made with, a context is damaged, a
            byte-exact context does not come out right on this machine, or a number is not positive. What can be seen
            beforehand is raised by the call, the rest on the way.
    """
    for context in contexts:
        restorer.fingerprints.check(context)
    check_at_least_1("batch_size", batch_size)
    if max_new_tokens is not None:
        check_at_least_1("max_new_tokens", max_new_tokens)
    for context in contexts:
        lengths = context.token_offsets.diff()
        if len(lengths) and int(lengths.max()) >= restorer.room:
            raise ValueError(
                f"{context.place(int(lengths.argmax()))} is damaged: `token_offsets` give it {int(lengths.max()):,} "
                f"tokens, the decoder has positions for fewer than {restorer.room:,}."
            )
    sizes, promised = list(map(len, contexts)), [context.is_exact for context in contexts]
    restored = _restored(contexts, restorer, batch_size, max_new_tokens)

    def pieces() -> Iterator[tuple[bytes, bool]]:
        with tqdm(total=sum(sizes), unit="segment", disable=None if progress else True) as bar:
            for context, size, must_be_exact in zip(contexts, sizes, promised):
                whole, all_exact = hashlib.sha256(), True
                for index in range(size):
                    data = next(restored)
                    is_exact = hashlib.sha256(data).digest() == bytes(context.digests[index].tolist())
                    if must_be_exact and not is_exact:
                        raise ValueError(_not_exact(context, index, restorer.model))
                    all_exact &= is_exact
                    whole.update(data)
                    bar.update()
                    yield data, is_exact
                if all_exact and context.header.text_sha256 not in (None, whole.hexdigest()):
                    raise context.missing_text(whole.hexdigest())

    return pieces()


def _restored(
    contexts: Sequence[CompressedContext], restorer: Restorer, batch_size: int, max_new_tokens: int | None
) -> Iterator[bytes]:
    """The bytes of each segment of each context."""
    places = [(context, index) for context in contexts for index in range(len(context))]
    size = _GROUP_BATCHES * batch_size
    for start in range(0, len(places), size):
        group = [context[index] for context, index in places[start : start + size]]
        yield from _restore_group(group, restorer, batch_size, max_new_tokens)


@torch.no_grad()
def _restore_group(
    segments: Sequence[CompressedContext], restorer: Restorer, batch_size: int, max_new_tokens: int | None
) -> list[bytes]:
    model, processor = restorer.model, restorer.processor
    residuals = [_residual(segment, model) for segment in segments]
    lengths = [segment.num_tokens for segment in segments]
    strides = None
    if model.config.latent_stride is not None:
        strides = torch.cat([segment.context_strides(model) for segment in segments], dim=1)[0]
    latents = torch.cat([segment.project(model) for segment in segments])
    restored = [b"" if residual is None else residual.stored or b"" for residual in residuals]
    plain = [row for row, residual in enumerate(residuals) if residual is None]
    corrected = [row for row, residual in enumerate(residuals) if residual is not None and residual.stored is None]
    for wanted in (plain, corrected):
        for places in batches_by_length([lengths[row] for row in wanted], batch_size):
            rows = [wanted[place] for place in places]
            sizes = [lengths[row] for row in rows]
            inputs = latents[rows], None if strides is None else strides[rows]
            if wanted is corrected:
                own = [residual for residual in (residuals[row] for row in rows) if residual is not None]
                texts = restore_bytes(restorer, *inputs, own, sizes)
            else:
                # Each row stops at its own budget, so that what comes back does not depend on its neighbours.
                budgets = [max_new_tokens or generation_budget(size) for size in sizes]
                found = restorer.generate(inputs[0], max(budgets), inputs[1])
                cut = [decode_tokens(processor, ids[:budget]) for ids, budget in zip(found, budgets)]
                texts = [text.encode("utf-8", "replace") for text in cut]
            for row, data in zip(rows, texts):
                restored[row] = data
    return restored


def _residual(segment: CompressedContext, model: PreTrainedModel) -> Residual | None:
    """Corrections of a segment; `None` if its context is not byte-exact."""
    if not segment.is_exact:
        return None
    residual, size = segment.segment_residual(0), model.config.text_config.vocab_size
    largest = max((token_id for _, token_id in residual.corrections), default=0)
    if largest >= size:
        raise ValueError(
            f"the `residual` of {segment.place(0)} is damaged: it has the token id {largest}, the model has {size}."
        )
    return residual


def _not_exact(context: CompressedContext, index: int, model: PreTrainedModel) -> str:
    return (
        f"{context.place(index)} (byte-exact) did not come back right (its digest differs), so nothing is given out. "
        f"It was computed with {context.header.writer}; this is {model.device.type}, {model.dtype}. Load the model in "
        "the same dtype, or compress with a larger `exact_margin`."
    )


def verify_context(
    context: CompressedContext, source: Source, restorer: Restorer, *, batch_size: int = 16, progress: bool = False
) -> CompressedContext:
    """Measure the fidelity of a compressed context against the text it was made from.

    Args:
        context: The whole compressed text, not a slice of it.
        source: That text; see [`iter_text`].
        restorer: The model that compressed it, and its processor.
        batch_size: Segments in one batch.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The same context with margins, so that `context.fidelity` tells what comes back.

    Raises:
        ValueError: If the model, the processor or the text is another one than the context was made from.
    """
    check_at_least_1("batch_size", batch_size)
    restorer.fingerprints.check(context)
    latents, strides = context.project(restorer.model), context.context_strides(restorer.model)
    segments = read_segments(context, source, restorer.processor)
    margins = [torch.empty(0)] * len(segments)
    groups = batches_by_length([len(segment.token_ids) for segment in segments], batch_size)
    for group in tqdm(groups, unit="batch", disable=None if progress else True):
        sequences = [segments[index].token_ids for index in group]
        own = None if strides is None else strides[0, group]
        for index, values in zip(group, measure_margins(restorer, latents[group], sequences, own)):
            margins[index] = values
    joined = to_margin_dtype(torch.cat([torch.empty(0), *margins]))
    lost = count_lost(restorer.processor, segments)
    return dataclasses.replace(context, margins=joined, lost_characters=lost, checksums=None)


def read_segments(context: CompressedContext, source: Source, processor: ProcessorMixin) -> list[Segment]:
    """The segments of `context`, read from the text it was made from.

    Raises:
        ValueError: If the text differs from the one that was compressed, or the segments are not all of it.
    """
    reader = TextReader(source)
    segments = []
    whole = hashlib.sha256()
    for index, length in enumerate(context.char_offsets.diff().tolist()):
        text = reader.take(length)
        segment = Segment(text, tuple(read_segment(processor.reader, text)[0]))
        if segment.digest != bytes(context.digests[index].tolist()):
            raise ValueError(
                f"`source` differs from the text that was compressed, in {context.place(index)} (characters "
                f"{int(context.char_offsets[index]):,} to {int(context.char_offsets[index + 1]):,}). Give the same "
                "text, or compress this one."
            )
        whole.update(segment.data)
        segments.append(segment)
    if reader.peek(1):
        raise ValueError(
            f"`source` goes on behind the {len(segments)} segments of {context.name}, which ends at character "
            f"{int(context.char_offsets[-1]):,}. Give the same text, or append the rest."
        )
    if context.header.text_sha256 not in (None, whole.hexdigest()):
        raise context.missing_text(whole.hexdigest())
    return segments
