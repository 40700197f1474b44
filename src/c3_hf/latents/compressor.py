"""What [`compress`] does to a group of segments: latents, fidelity, corrections."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .. import __version__
from ..modeling.configuration_c3 import C3Config
from .context import CompressedContext
from .exactness import EXACT_MARGINS, ExactCounts, build_residual, keep_what_restores
from .fidelity import MARGIN_DTYPE, to_margin_dtype
from .fingerprints import fingerprint_model, fingerprint_processor
from .fitting import MeasuredSegment, fit_segments
from .header import ContextHeader
from .quantization import LATENT_DTYPES, dequantize, quantize
from .residual import Residual
from .restoring import (
    Restorer,
    batches_by_length,
    check_at_least_1,
    context_batch,
    context_room,
)
from .segmentation import MIN_SEGMENT_LENGTH, Segment, Source, TextReader, iter_segments, read_segment
from .storage import segment_checksums
from .verification import count_lost, measure_margins


logger = logging.get_logger(__name__)

# Tokens for each latent where the model's configuration does not say: 98.4 to 99.7 % come back (paper, Fig. 1).
DEFAULT_RATIO = 20
# Batches of segments that are sorted by length together and reach the disk together.
_GROUP_BATCHES = 4


@dataclass(frozen=True)
class CompressionOptions:
    """The arguments of [`compress`] of the same names, with its defaults; `resolved` fills in the rest and checks.

    What the finished file says of them are the fields that [`ContextHeader`] has too. `dtype`, `verify` and `exact`
    show in its tensors. `batch_size` changes nothing in the result.
    """

    segment_length: int | None = None
    dtype: torch.dtype = torch.bfloat16
    verify: bool = False
    exact: bool = False
    target_fidelity: float | None = None
    min_segment_length: int | None = MIN_SEGMENT_LENGTH
    exact_margin: float | None = None
    exact_check: bool | None = True
    batch_size: int = 16

    def resolved(self, model: PreTrainedModel) -> CompressionOptions:
        length = default_segment_length(model.config) if self.segment_length is None else self.segment_length
        widest = max(EXACT_MARGINS.values())
        margin = EXACT_MARGINS.get(model.dtype, widest) if self.exact_margin is None else self.exact_margin
        if length < MIN_SEGMENT_LENGTH:
            raise ValueError(f"`segment_length` must be at least {MIN_SEGMENT_LENGTH} tokens, got {length}.")
        if length > context_room(model):
            raise ValueError(
                f"`segment_length` must be at most {context_room(model)}, which is what the encoder has positions for "
                f"beside {model.config.num_latents} latents, got {length}."
            )
        if self.dtype not in LATENT_DTYPES:
            raise ValueError(f"`dtype` must be one of {LATENT_DTYPES}, got {self.dtype!r}.")
        if self.target_fidelity is not None and not 0 < self.target_fidelity <= 1:
            raise ValueError(f"`target_fidelity` is a token accuracy above 0 and up to 1, got {self.target_fidelity}.")
        if self.min_segment_length is None or self.min_segment_length < MIN_SEGMENT_LENGTH:
            raise ValueError(
                f"`min_segment_length` must be at least {MIN_SEGMENT_LENGTH} tokens, got {self.min_segment_length}."
            )
        if not 0 <= margin < float("inf"):
            raise ValueError(f"`exact_margin` must not be negative, got {margin}; it is a finite margin of logits.")
        check_at_least_1("batch_size", self.batch_size)
        return dataclasses.replace(
            self,
            segment_length=length,
            verify=self.verify or self.target_fidelity is not None,
            # What changes nothing is not recorded, so that it does not make two calls differ.
            min_segment_length=None if self.target_fidelity is None else self.min_segment_length,
            exact_margin=margin if self.exact else None,
            exact_check=self.exact_check if self.exact else None,
        )

    def recorded(self) -> dict[str, Any]:
        """The options that the header of the finished file says."""
        names = {field.name for field in dataclasses.fields(ContextHeader)}
        return {name: value for name, value in vars(self).items() if name in names}


def default_segment_length(config: C3Config) -> int:
    """Most tokens of a segment: `segment_length` of the model's configuration, where it is None 20 for each latent."""
    return config.segment_length or DEFAULT_RATIO * config.num_latents


class Compressor:
    """What [`compress`] does to a group of segments.

    Attributes:
        header: What the result says of itself, but for the text's digest and name.
        counts: What byte-exact mode had to do so far.
        tokens_encoded: Tokens, in the decoder's vocabulary, of what went through the encoder so far.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, options: CompressionOptions):
        self.model, self.processor, self.options = model, processor, options
        self.restorer = Restorer(model, processor)
        segment_length = cast("int", options.segment_length)  # filled in by `resolved`
        if segment_length >= self.restorer.room:
            raise ValueError(
                f"`segment_length` must be below {self.restorer.room}, which is what the decoder has positions for "
                f"behind the restoring prompt, got {segment_length}."
            )
        self.counts = ExactCounts()
        self.tokens_encoded = self.tokens = self.chars = self.bytes = 0
        self.header = ContextHeader(
            model=fingerprint_model(model),
            tokenizer=fingerprint_processor(processor),
            num_latents=model.config.num_latents,
            hidden_size=model.config.encoder_config.hidden_size,
            model_dtype=str(model.dtype).removeprefix("torch."),
            **options.recorded(),
            writer=f"c3_hf {__version__}, torch {torch.__version__}, {model.device.type}, {model.dtype}",
        )

    def groups(self, reader: TextReader) -> Iterator[list[Segment]]:
        """The rest of the text in groups of segments.

        Raises:
            ValueError: At bytes that are not UTF-8, unless the mode is byte-exact.
        """
        segments = self.cut(reader, self.header.segment_length)
        while group := list(islice(segments, _GROUP_BATCHES * self.options.batch_size)):
            if not self.options.exact:
                _refuse_undecoded(group, self.bytes)
            yield group

    def cut(self, source: Source | TextReader, length: int) -> Iterator[Segment]:
        """Segments of at most `length` tokens as the encoder reads them, with the ids that the decoder writes.

        Raises:
            ValueError: If a segment takes more tokens in the decoder's vocabulary than it has positions for.
        """
        reads, writes = self.processor.encoder_reader, self.processor.reader
        for segment in iter_segments(source, reads, length):
            if writes is not reads:
                segment = dataclasses.replace(segment, token_ids=tuple(read_segment(writes, segment.text)[0]))
                if len(segment.token_ids) >= self.restorer.room:
                    raise ValueError(
                        f"`segment_length` {length} gives a segment of {len(segment.token_ids)} tokens in the "
                        f"decoder's vocabulary; it has positions for fewer than {self.restorer.room}. Give a smaller "
                        "one."
                    )
            yield segment

    @torch.no_grad()
    def compress_group(self, group: Sequence[Segment]) -> dict[str, torch.Tensor]:
        """Tensors of a [`CompressedContext`] for consecutive segments, with `target_fidelity` cut anew."""
        options = self.options
        if options.target_fidelity is None:
            measured = self.measure(group)
        else:
            measured = fit_segments(
                group,
                self.measure,
                self.cut,
                target=options.target_fidelity,
                shortest=cast("int", options.min_segment_length),  # there with a target
            )
        residuals = self._residuals(measured) if options.exact else None
        return self._tensors(measured, residuals)

    def measure(self, segments: Sequence[Segment]) -> list[MeasuredSegment]:
        """Latents of segments as they will be stored, and what those bring back if fidelity or exactness asks for it.

        Raises:
            ValueError: If latents are not finite.
        """
        measured: dict[int, MeasuredSegment] = {}
        for rows in batches_by_length([len(segment.token_ids) for segment in segments], self.options.batch_size):
            batch = [segments[row] for row in rows]
            ids, mask = context_batch([segment.encoder_ids for segment in batch], self.model.device)
            latents = self.model.get_encoder_latents(ids, mask)[:, 0]
            if not latents.isfinite().all():
                raise ValueError(
                    f"`model` gives latents that are not finite for the text {batch[0].text[:40]!r}…: its weights are "
                    "damaged, or it overflows in this dtype. Try float32."
                )
            stored, scales = quantize(latents, self.options.dtype)
            margins: list[torch.Tensor | None] = [None] * len(batch)
            if self.options.verify or self.options.exact:
                sequences = [segment.token_ids for segment in batch]
                features = self._features(stored, scales).unsqueeze(1)
                margins = list(measure_margins(self.restorer, features, sequences))
            stored, scales = stored.cpu(), None if scales is None else scales.cpu()
            for place, row in enumerate(rows):
                scale = None if scales is None else scales[place]
                measured[row] = MeasuredSegment(segments[row], stored[place], scale, margins[place])
            self.tokens_encoded += sum(len(segment.token_ids) for segment in batch)
        return [measured[row] for row in range(len(segments))]

    def empty(self) -> dict[str, torch.Tensor]:
        """Tensors for no segment at all."""
        return self._tensors([], [] if self.options.exact else None)

    def would_make(self, context: CompressedContext, text_sha256: str) -> bool:
        """Whether `context` is what a text of this SHA-256 becomes: every option that changes the result counts."""
        found = dataclasses.replace(
            context.header, text_sha256=None, source=None, passes=None, writer=self.header.writer
        )
        kinds = self.empty()
        return (
            (found, context.header.text_sha256) == (self.header, text_sha256)
            and context.latents.dtype == kinds["latents"].dtype
            and context.tensors().keys() == kinds.keys()
        )

    def final_header(self, text_sha256: str, source: str | None) -> ContextHeader:
        """The header of the finished context."""
        if self.options.exact:
            logger.info(f"byte-exact mode: {self.counts}")
        passes = self.tokens_encoded / self.tokens if self.tokens else None
        return dataclasses.replace(self.header, text_sha256=text_sha256, source=source, passes=passes)

    def _features(self, latents: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        projector = self.model.model.projector
        return projector(dequantize(latents, scales).to(projector.weight.device, projector.weight.dtype))

    def _residuals(self, measured: Sequence[MeasuredSegment]) -> list[Residual]:
        """Corrections for each segment, confirmed by an actual restore if `exact_check` asks for it."""
        threshold = cast("float", self.options.exact_margin)  # filled in by `resolved`
        residuals = [
            build_residual(self.restorer, item.segment, item.margins, threshold, self.counts) for item in measured
        ]
        self.counts.segments += len(measured)
        if not self.options.exact_check:
            return residuals
        lengths = [len(item.segment.token_ids) for item in measured]
        for rows in batches_by_length(lengths, self.options.batch_size):
            batch = [measured[row] for row in rows]
            scales = None if batch[0].scales is None else torch.stack([item.scales for item in batch])
            features = self._features(torch.stack([item.latents for item in batch]), scales)
            confirmed = [residuals[row] for row in rows]
            keep_what_restores(self.restorer, features, [item.segment for item in batch], confirmed, self.counts)
            for row, residual in zip(rows, confirmed):
                residuals[row] = residual
        return residuals

    def _tensors(
        self, measured: Sequence[MeasuredSegment], residuals: Sequence[Residual] | None
    ) -> dict[str, torch.Tensor]:
        """Put segments together; offsets go on where the last group ended."""
        segments = [item.segment for item in measured]
        chars = _offsets(self.chars, [len(segment.text) for segment in segments])
        sizes = _offsets(self.bytes, [len(segment.data) for segment in segments])
        tokens = _offsets(self.tokens, [len(segment.token_ids) for segment in segments])
        self.chars, self.bytes, self.tokens = int(chars[-1]), int(sizes[-1]), int(tokens[-1])
        shape = (0, self.header.num_latents, self.header.hidden_size)
        tensors = {
            "latents": _stack([item.latents for item in measured], torch.empty(shape, dtype=self.options.dtype)),
            "char_offsets": chars,
            "byte_offsets": sizes,
            "token_offsets": tokens,
            "lost_characters": count_lost(self.processor, segments),
            "digests": _stack(
                [torch.tensor(list(segment.digest), dtype=torch.uint8) for segment in segments],
                torch.empty((0, 32), dtype=torch.uint8),
            ),
        }
        if self.options.dtype == torch.int8:
            tensors["latent_scales"] = _stack([item.scales for item in measured], torch.empty((0, shape[1])))
        if self.options.verify:
            margins = [to_margin_dtype(item.margins) for item in measured]
            tensors["margins"] = torch.cat([torch.empty(0, dtype=MARGIN_DTYPE), *margins])
        if residuals is not None:
            records = [residual.encode() for residual in residuals]
            self.counts.residual_bytes += sum(len(record) for record in records)
            tensors["residual"] = torch.tensor(list(b"".join(records)), dtype=torch.uint8)
            tensors["residual_offsets"] = _offsets(0, [len(record) for record in records])
        tensors["checksums"] = segment_checksums(tensors)
        return tensors


def _refuse_undecoded(segments: Sequence[Segment], position: int) -> None:
    for segment in segments:
        try:
            segment.data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`source` is not UTF-8 at byte {position + error.start:,}. Convert it first, or use `exact=True`, "
                "which keeps any bytes."
            ) from error
        position += len(segment.data)


def _offsets(start: int, lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([start, *lengths], dtype=torch.int64).cumsum(0)


def _stack(rows: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(rows)) if rows else empty
