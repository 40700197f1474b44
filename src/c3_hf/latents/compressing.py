"""Compress a text of any length: segments, their latents, what is known about them, safely into a file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .compressor import CompressionOptions, Compressor
from .context import CompressedContext, check_joinable
from .header import joined_header
from .journal import Journal
from .output import JOURNAL_SUFFIX, claimed
from .segmentation import Segment, Source, TextReader
from .storage import write_file


logger = logging.get_logger(__name__)


def compress(
    source: Source,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    output: str | os.PathLike | None = None,
    append: bool = False,
    segment_length: int | None = CompressionOptions.segment_length,
    dtype: torch.dtype = CompressionOptions.dtype,
    verify: bool = CompressionOptions.verify,
    exact: bool = CompressionOptions.exact,
    target_fidelity: float | None = CompressionOptions.target_fidelity,
    min_segment_length: int | None = CompressionOptions.min_segment_length,
    exact_margin: float | None = CompressionOptions.exact_margin,
    exact_check: bool | None = CompressionOptions.exact_check,
    batch_size: int = CompressionOptions.batch_size,
    progress: bool = False,
) -> CompressedContext:
    """Compress a text of any length into latents, segment by segment.

    With `output`, finished segments are on the disk at once: after a crash the same call goes on where it was, and
    memory does not grow with the text. Without, the result is in memory only.

    Args:
        source: The text (`str`, or UTF-8 `bytes`), a `pathlib.Path` to it, an open file, or an iterable of pieces.
        model: A `C3ForConditionalGeneration`.
        processor: Its processor.
        output: File to write, by custom `*.c3`. An existing one is replaced when the new one is complete. One run
            at a time writes a file; a second one is an error.
        append: Put the segments behind those of the existing `output`.
        segment_length: Most tokens of a segment; by default what the model was made for (`config.segment_length`),
            where that is None 20 for each latent.
        dtype: How latents are stored: `torch.float32`, `torch.bfloat16`, or `torch.int8` with a scale a latent.
        verify: Measure each segment's fidelity.
        exact: Byte-exact mode: store what the latents do not bring back.
        target_fidelity: Token accuracy, 0 to 1, that every segment shall reach: segments are cut shorter where needed,
            down to `min_segment_length`. Implies `verify`.
        min_segment_length: Tokens, at least 16; only with `target_fidelity`.
        exact_margin: Logit margin below which a right token is corrected too; by default 0.01 in float32, 0.5 in
            bfloat16, 0.1 in float16. Only with `exact`.
        exact_check: Restore every segment now, and store one that fails as bytes. Without, in half the time or less,
            such a segment is an error when it is restored. Only with `exact`.
        batch_size: Segments in one batch.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The compressed context; with `output`, opened from that file.

    Raises:
        ValueError: If the text is not UTF-8 and `exact` is off, an option is out of range, the model gives latents
            that are not finite, `output` cannot become a file or is being written by another run, or the journal or
            file there does not belong to this call.
        TypeError: If `source` is of another type.

    Warns:
        UserWarning: If `source` is a `str` that names an existing file.
    """
    _warn_of_file_name(source)
    options = CompressionOptions(
        segment_length=segment_length,
        dtype=dtype,
        verify=verify,
        exact=exact,
        target_fidelity=target_fidelity,
        min_segment_length=min_segment_length,
        exact_margin=exact_margin,
        exact_check=exact_check,
        batch_size=batch_size,
    )
    compressor = Compressor(model, processor, options.resolved(model))
    with tqdm(total=_size(source), unit="B", unit_scale=True, disable=None if progress else True) as bar:
        reader = TextReader(source)
        if output is not None:
            _refuse_source_as_output(source, output)
            with claimed(output) as path:
                return _warned(_compress_to_file(compressor, reader, path, append, _name(source), bar))
        digest = hashlib.sha256()
        parts = [compressor.empty()]
        for group in compressor.groups(reader):
            for segment in group:
                digest.update(segment.data)
                bar.update(len(segment.data))
            parts.append(compressor.compress_group(group))
        joined = CompressedContext.concatenate([CompressedContext(compressor.header, **part) for part in parts])
    header = compressor.final_header(digest.hexdigest(), _name(source))
    return _warned(dataclasses.replace(joined, header=header))


def _warned(context: CompressedContext) -> CompressedContext:
    """`context`; a log line says if restoring it must change the text."""
    lost = context.num_lost_characters
    if lost and not context.is_exact:
        total = int(context.char_offsets[-1] - context.char_offsets[0])
        logger.warning(
            f"{context.name}: the tokenizer does not keep {lost:,} of {total:,} characters (Unicode is normalised, "
            "for one), so that restoring gives others. `exact=True` keeps them."
        )
    return context


def _size(source: Source) -> int | None:
    """Bytes of the source, where they are known before it is read."""
    if isinstance(source, os.PathLike):
        return Path(source).stat().st_size
    if isinstance(source, str):
        return len(source.encode("utf-8", "surrogatepass"))
    return len(source) if isinstance(source, bytes) else None


def _name(source: Source) -> str | None:
    """The source file's name for people: bytes of it that are not UTF-8 are U+FFFD."""
    return os.fsencode(Path(source).name).decode(errors="replace") if isinstance(source, os.PathLike) else None


def _refuse_source_as_output(source: Source, output: str | os.PathLike) -> None:
    file = source if isinstance(source, os.PathLike) else getattr(source, "name", None)
    if not isinstance(file, (str, os.PathLike)) or not os.path.exists(file) or not os.path.exists(output):
        return
    if os.path.samefile(file, output):
        raise ValueError(
            f"`output` {os.fspath(output)!r} and `source` are one file, whose text would be lost. Give another "
            "`output`."
        )


def _warn_of_file_name(source: Source) -> None:
    # Longer than any path, or no path at all: the question need not reach the file system.
    if not isinstance(source, str) or not 0 < len(source) < 1024 or "\n" in source or "\0" in source:
        return
    if os.path.isfile(source):
        warnings.warn(
            f"`source` {source!r} is compressed as the text it is, and a file of that name exists. To compress the "
            f"file's content write `Path({source!r})`.",
            stacklevel=3,
        )


def _compress_to_file(
    compressor: Compressor, reader: TextReader, path: Path, append: bool, name: str | None, bar: tqdm
) -> CompressedContext:
    base = CompressedContext.load(path) if append and path.exists() else None
    if base is not None:
        check_joinable(base, CompressedContext(compressor.header, **compressor.empty()))
    journal = Journal(path.with_name(path.name + JOURNAL_SUFFIX))
    _open_journal(journal, compressor, base)
    digest = hashlib.sha256()
    for data in _finished_segments(journal, reader):
        digest.update(data)
        bar.update(len(data))
    for group in compressor.groups(reader):
        journal.append(compressor.compress_group(group))
        for segment in group:
            digest.update(segment.data)
            bar.update(len(segment.data))
    if not journal.num_records:
        journal.append(compressor.empty())
    header = compressor.final_header(digest.hexdigest(), name)
    if base is not None:
        header = joined_header([base.header, header])

    def pieces() -> Iterator[dict[str, torch.Tensor]]:
        if base is not None:
            yield base.tensors()
        yield from journal.pieces()

    write_file(path, dataclasses.asdict(header), pieces)
    journal.remove()
    return CompressedContext.load(path)


def _open_journal(journal: Journal, compressor: Compressor, base: CompressedContext | None) -> None:
    """Start a journal, or make sure that the one that is there was begun by the same call.

    Raises:
        ValueError: If it was not.
    """
    wanted = dataclasses.asdict(compressor.header)
    # The header does not say these, the finished file shows them by its tensors.
    wanted |= {"dtype": str(compressor.options.dtype), "verify": compressor.options.verify}
    wanted["appends_to"] = None if base is None else hashlib.sha256(base.digests.numpy().tobytes()).hexdigest()
    if journal.header is None:
        journal.start(wanted)
        return
    differing = sorted(key for key in wanted if wanted[key] != journal.header.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"`output`: {journal.path} holds an unfinished run with other settings ({key}: "
            f"{journal.header.get(key)!r}, now {wanted[key]!r}). Repeat the call it was begun with, or delete it."
        )
    logger.info(f"{journal.path}: going on behind {journal.num_records} finished groups of segments.")


def _finished_segments(journal: Journal, reader: TextReader) -> Iterator[bytes]:
    """Read past the text of the journal's segments, making sure that it is the same text."""
    for piece in journal.pieces():
        for index, length in enumerate(piece["char_offsets"].diff().tolist()):
            segment = Segment(reader.take(length), ())
            if segment.digest != bytes(piece["digests"][index].tolist()):
                raise ValueError(
                    f"`source` differs from the text that {journal.path} was begun with, before character "
                    f"{int(piece['char_offsets'][index + 1]):,}. Give the same text, or delete the journal."
                )
            yield segment.data
