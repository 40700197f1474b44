"""Compress a text of any length: segments, their latents, what is known about them, safely into a file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers.utils import logging

from .. import __version__
from ..files import JOURNAL_SUFFIX, LOCK_SUFFIX, claimed
from ..modeling.positions_c3 import pad_rows
from ..options import MIN_SEGMENT_LENGTH, CompressionOptions
from .context import CompressedContext, as_latent_dtype, check_at_least_1, check_joinable, project, quantize
from .decoding import Restorer, batches_by_length, context_room
from .exact import EXACT_MARGINS, ExactCounts, Residual, build_residual, keep_what_restores
from .file import ContextHeader, Journal, joined_header, segment_checksums, write_file
from .measure import (
    MARGIN_DTYPE,
    Calibration,
    MeasuredSegment,
    count_lost,
    fit_segments,
    measure_margins,
    to_margin_dtype,
)
from .segments import (
    Segment,
    Source,
    TextReader,
    iter_segments,
    name_of,
    read_segment,
    refuse_source_as_output,
    refuse_undecoded,
    size_of,
    warn_of_file_name,
)


logger = logging.get_logger(__name__)

# Batches of segments that are sorted by length together and reach the disk together.
_GROUP_BATCHES = 4
# What an option may be, by its annotation.
_KINDS = {"bool": (bool, "a bool"), "int": (Integral, "an int"), "float": (Real, "a number")}


def resolved(options: CompressionOptions, restorer: Restorer) -> CompressionOptions:
    """Options with everything filled in for a model; what changes nothing is `None`, so that it does not make two
    calls differ.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If it is of another type.
    """
    for option in dataclasses.fields(options):
        value, kind = getattr(options, option.name), str(option.type).removesuffix(" | None")
        kinds, words = _KINDS.get(kind, (object, ""))
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and words[2:] != "bool")):
            raise TypeError(f"`{option.name}` must be {words}, got {value!r}.")
    widest = max(EXACT_MARGINS.values())
    margin = EXACT_MARGINS.get(restorer.model.dtype, widest) if options.exact_margin is None else options.exact_margin
    latent_dtype = as_latent_dtype("latent_dtype", options.latent_dtype)
    if options.target_fidelity is not None and not 0 < options.target_fidelity <= 1:
        raise ValueError(f"`target_fidelity` is a token accuracy above 0 and up to 1, got {options.target_fidelity}.")
    if options.min_segment_length is None or options.min_segment_length < MIN_SEGMENT_LENGTH:
        raise ValueError(
            f"`min_segment_length` must be at least {MIN_SEGMENT_LENGTH} tokens, got {options.min_segment_length}."
        )
    if not 0 <= margin < float("inf"):
        raise ValueError(f"`exact_margin` must not be negative, got {margin}; it is a finite margin of logits.")
    check_at_least_1("batch_size", options.batch_size)
    return dataclasses.replace(
        options,
        ratio=None,
        segment_length=_length(options, restorer),
        latent_dtype=latent_dtype,
        verify=options.verify or options.target_fidelity is not None,
        min_segment_length=None if options.target_fidelity is None else options.min_segment_length,
        exact_margin=margin if options.exact else None,
        exact_check=options.exact_check if options.exact else None,
    )


def _length(options: CompressionOptions, restorer: Restorer) -> int:
    """Most tokens of a segment; the stride of each follows from its length."""
    model, config = restorer.model, restorer.model.config
    stride, num_latents = config.latent_stride, config.num_latents
    length = config.longest_segment
    most = None if stride is None else stride * num_latents
    if options.ratio is not None:
        check_at_least_1("ratio", options.ratio)
        if stride is not None and options.ratio > stride:
            raise ValueError(f"`ratio` must be at most {stride}, the model's `latent_stride`, got {options.ratio}.")
        most = length = options.ratio * num_latents
    length = length if options.segment_length is None else options.segment_length
    named = "`segment_length`"
    if options.segment_length is None and options.ratio is not None:
        named = f"`ratio` {options.ratio} gives a segment of {length} tokens, it"
    if length < MIN_SEGMENT_LENGTH:
        raise ValueError(f"{named} must be at least {MIN_SEGMENT_LENGTH} tokens, got {length}.")
    if most is not None and length > most:
        raise ValueError(
            f"`segment_length` must be at most {most}, {most // num_latents} tokens for each of {num_latents} "
            f"latents, got {length}."
        )
    if length > context_room(model):
        raise ValueError(
            f"{named} must be at most {context_room(model)}, which is what the encoder has positions for beside "
            f"{num_latents} latents, got {length}."
        )
    if length >= restorer.room:
        raise ValueError(
            f"{named} must be below {restorer.room}, which is what the decoder has positions for behind the "
            f"restoring prompt, got {length}."
        )
    return length


def compress_text(
    source: Source,
    restorer: Restorer,
    options: CompressionOptions,
    *,
    output: str | os.PathLike | None = None,
    append: bool = False,
    progress: bool = False,
) -> CompressedContext:
    """Compress a text of any length into latents, segment by segment; see [`C3Pipeline.compress`]."""
    if append and output is None:
        raise ValueError("`append` goes with `output`, the file to add to.")
    warn_of_file_name(source)
    reader, name = TextReader(source), name_of(source)
    with tqdm(total=size_of(source), unit="B", unit_scale=True, disable=None if progress else True) as bar:
        compressor = Compressor(restorer, options, bar)
        if output is not None:
            refuse_source_as_output(source, output, JOURNAL_SUFFIX, LOCK_SUFFIX)
            with claimed(output, JOURNAL_SUFFIX) as path:
                context = _compress_to_file(compressor, reader, path, append, name)
        else:
            parts = list(compressor.groups(reader)) or [compressor.empty()]
            joined = CompressedContext.concatenate([CompressedContext(compressor.header, **part) for part in parts])
            context = dataclasses.replace(joined, header=compressor.final_header(name))
    lost = context.num_lost_characters
    if lost and not context.is_exact:
        logger.warning(
            f"{context.name}: the tokenizer does not keep {lost:,} of {context.num_characters:,} characters (Unicode "
            "is normalised, for one), so that restoring gives others. `exact=True` keeps them."
        )
    return context


@dataclass
class _State:
    """How far a [`Compressor`] is in the text, and what it did for it."""

    bar: tqdm
    num_bytes: int = 0
    # Tokens, in the decoder's vocabulary, of the segments made here, and of what went through the encoder for them.
    tokens: int = 0
    encoded: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    exact: ExactCounts = field(default_factory=ExactCounts)

    def take(self, data: bytes) -> None:
        """Count a segment as done."""
        self.digest.update(data)
        self.bar.update(len(data))
        self.num_bytes += len(data)


class Compressor:
    """One text on its way into latents.

    Attributes:
        header: What the result says of itself, but for the text's digest and name.
        state: How far it is.
    """

    def __init__(self, restorer: Restorer, options: CompressionOptions, bar: tqdm | None = None):
        self.restorer, self.model, self.processor = restorer, restorer.model, restorer.processor
        self.options = options = resolved(options, restorer)
        self.state = _State(tqdm(disable=True) if bar is None else bar)
        config, fingerprints = self.model.config, restorer.fingerprints
        calibration = vars(Calibration.of(self.processor)) if self.processor.calibration else {}
        shared = {each.name for each in dataclasses.fields(ContextHeader)}
        self.header = ContextHeader(
            model=fingerprints.model,
            tokenizer=cast("str", fingerprints.tokenizer),  # the restorer has a processor
            num_latents=config.num_latents,
            hidden_size=config.encoder_config.hidden_size,
            model_dtype=str(self.model.dtype).removeprefix("torch."),
            **{name: value for name, value in vars(options).items() if name in shared},
            **calibration,
            writer=f"c3_hf {__version__}, torch {torch.__version__}, {self.model.device.type}, {self.model.dtype}",
        )

    def groups(self, reader: TextReader) -> Iterator[dict[str, torch.Tensor]]:
        """Tensors of a [`CompressedContext`] for the rest of the text, group of segments after group.

        Raises:
            ValueError: At bytes that are not UTF-8, unless the mode is byte-exact; if latents are not finite.
        """
        segments = self.cut(reader, self.header.segment_length)
        while group := list(islice(segments, _GROUP_BATCHES * self.options.batch_size)):
            if not self.options.exact:
                refuse_undecoded(group, self.state.num_bytes)
            yield self.compress_group(group)
            for segment in group:
                self.state.take(segment.data)

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
        options, config = self.options, self.model.config
        if options.target_fidelity is None:
            measured = self.measure(group)
        else:
            measured = fit_segments(
                group,
                self.measure,
                self.cut,
                target=options.target_fidelity,
                shortest=cast("int", options.min_segment_length),  # there with a target
                num_latents=None if config.latent_stride is None else config.num_latents,
            )
        return self._tensors(measured, self._residuals(measured) if options.exact else None)

    def measure(self, segments: Sequence[Segment]) -> list[MeasuredSegment]:
        """Latents of segments as they will be stored, and what those bring back if fidelity or exactness asks for it.

        Raises:
            ValueError: If latents are not finite.
        """
        measured: dict[int, MeasuredSegment] = {}
        for rows in batches_by_length([len(segment.token_ids) for segment in segments], self.options.batch_size):
            batch = [segments[row] for row in rows]
            ids = [torch.tensor(segment.encoder_ids, dtype=torch.long) for segment in batch]
            ids, mask = (tensor.unsqueeze(1).to(self.model.device) for tensor in pad_rows(ids, left=False))
            strides = self._strides(batch)
            latents = self.model.get_encoder_latents(ids, mask, None if strides is None else strides[:, None])[:, 0]
            if not latents.isfinite().all():
                raise ValueError(
                    f"`model` gives latents that are not finite for the text {batch[0].text[:40]!r}…: its weights are "
                    "damaged, or it overflows in this dtype. Try float32."
                )
            stored, scales = quantize(latents, self.options.latent_dtype)
            margins: list[torch.Tensor | None] = [None] * len(batch)
            if self.options.verify or self.options.exact:
                sequences = [segment.token_ids for segment in batch]
                margins = list(measure_margins(self.restorer, project(self.model, stored, scales), sequences, strides))
            stored, scales = stored.cpu(), None if scales is None else scales.cpu()
            for place, row in enumerate(rows):
                scale = None if scales is None else scales[place]
                stride = None if strides is None else int(strides[place])
                measured[row] = MeasuredSegment(segments[row], stored[place], scale, stride, margins[place])
            self.state.encoded += sum(len(segment.token_ids) for segment in batch)
        return [measured[row] for row in range(len(segments))]

    def _strides(self, segments: Sequence[Segment]) -> torch.LongTensor | None:
        """The least stride that covers each segment, `(num_segments,)`; `None` for a model without."""
        if self.model.config.latent_stride is None:
            return None
        lengths = torch.tensor([len(segment.encoder_ids) for segment in segments], device=self.model.device)
        return -(-lengths // self.model.config.num_latents)

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

    def final_header(self, source: str | None) -> ContextHeader:
        """The header of the finished context, which was made from a file called `source`."""
        state = self.state
        if self.options.exact:
            logger.info(f"byte-exact mode: {state.exact}")
        passes = state.encoded / state.tokens if state.tokens else None
        return dataclasses.replace(self.header, text_sha256=state.digest.hexdigest(), source=source, passes=passes)

    def _residuals(self, measured: Sequence[MeasuredSegment]) -> list[Residual]:
        """Corrections for each segment, confirmed by an actual restore if `exact_check` asks for it."""
        threshold, counts = cast("float", self.options.exact_margin), self.state.exact  # filled in by `resolved`
        residuals = [build_residual(self.restorer, item.segment, item.margins, threshold, counts) for item in measured]
        counts.segments += len(measured)
        if not self.options.exact_check:
            return residuals
        for rows in batches_by_length([len(item.segment.token_ids) for item in measured], self.options.batch_size):
            batch = [measured[row] for row in rows]
            segments = [item.segment for item in batch]
            scales = None if batch[0].scales is None else torch.stack([item.scales for item in batch])
            latents = project(self.model, torch.stack([item.latents for item in batch]), scales)
            confirmed = [residuals[row] for row in rows]
            keep_what_restores(self.restorer, latents, self._strides(segments), segments, confirmed, counts)
            for row, residual in zip(rows, confirmed):
                residuals[row] = residual
        return residuals

    def _tensors(
        self, measured: Sequence[MeasuredSegment], residuals: Sequence[Residual] | None
    ) -> dict[str, torch.Tensor]:
        """Put segments together; offsets count from the first of them."""
        segments = [item.segment for item in measured]
        shape, dtype = (0, self.header.num_latents, self.header.hidden_size), self.options.latent_dtype
        tensors = {
            "latents": _stack([item.latents for item in measured], torch.empty(shape, dtype=dtype)),
            "char_offsets": _offsets([len(segment.text) for segment in segments]),
            "byte_offsets": _offsets([len(segment.data) for segment in segments]),
            "token_offsets": _offsets([len(segment.token_ids) for segment in segments]),
            "lost_characters": count_lost(self.processor, segments),
            "digests": _stack(
                [torch.tensor(list(segment.digest), dtype=torch.uint8) for segment in segments],
                torch.empty((0, 32), dtype=torch.uint8),
            ),
        }
        if dtype == torch.int8:
            tensors["latent_scales"] = _stack([item.scales for item in measured], torch.empty((0, shape[1])))
        if self.model.config.latent_stride is not None:
            tensors["strides"] = torch.tensor([item.stride for item in measured], dtype=torch.int64)
        if self.options.verify:
            margins = [to_margin_dtype(item.margins) for item in measured]
            tensors["margins"] = torch.cat([torch.empty(0, dtype=MARGIN_DTYPE), *margins])
        if residuals is not None:
            records = [residual.encode() for residual in residuals]
            self.state.exact.residual_bytes += sum(len(record) for record in records)
            tensors["residual"] = torch.tensor(list(b"".join(records)), dtype=torch.uint8)
            tensors["residual_offsets"] = _offsets([len(record) for record in records])
        self.state.tokens += int(tensors["token_offsets"][-1])
        tensors["checksums"] = segment_checksums(tensors)
        return tensors


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _stack(rows: Sequence[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(rows)) if rows else empty


def _compress_to_file(
    compressor: Compressor, reader: TextReader, path: Path, append: bool, name: str | None
) -> CompressedContext:
    base = CompressedContext.load(path) if append and path.exists() else None
    if base is not None:
        check_joinable(base, CompressedContext(compressor.header, **compressor.empty()))
    wanted = dataclasses.asdict(compressor.header)
    # The header does not say these, the finished file shows them by its tensors.
    wanted |= {"latent_dtype": str(compressor.options.latent_dtype), "verify": compressor.options.verify}
    wanted["appends_to"] = None if base is None else hashlib.sha256(base.digests.numpy().tobytes()).hexdigest()
    journal = Journal(path.with_name(path.name + JOURNAL_SUFFIX))
    journal.go_on(wanted)
    for data in journal.read_past(reader):
        compressor.state.take(data)
    for group in compressor.groups(reader):
        journal.append(group)
    if not journal.num_records:
        journal.append(compressor.empty())
    header = compressor.final_header(name)
    if base is not None:
        header = joined_header([base.header, header])

    def pieces() -> Iterator[dict[str, torch.Tensor]]:
        if base is not None:
            yield base.tensors()
        yield from journal.pieces()

    write_file(path, dataclasses.asdict(header), pieces)
    journal.path.unlink(missing_ok=True)
    return CompressedContext.load(path)
