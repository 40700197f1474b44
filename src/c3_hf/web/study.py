"""What the page does with a text: compress it, restore it, try it at several ratios; within a time, step by step."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.samples import cut_to_tokens
from ..evaluation.metrics.characters import char_precision
from ..evaluation.metrics.tokens import accuracy_by_position
from ..latents import CompressedContext
from ..options import MIN_SEGMENT_LENGTH
from ..pipeline import C3Pipeline


# Segments restored together: what is shown grows by so many, and after each the time is looked at.
BATCH = 4
# Characters that compressing reads at once, so that it can end in time.
_PIECE = 4096


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        characters: Most characters of a text.
        seconds: Time of one click; what is done by then is shown.
        file_bytes: Most bytes of an uploaded file.
    """

    characters: int = 400_000
    seconds: float = 60.0
    file_bytes: int = 8_000_000

    def check(self, text: str) -> str:
        """The text as it is compressed: a lone surrogate, which no file can hold, becomes a question mark.

        Raises:
            ValueError: If there is none, or too much.
        """
        if not text.strip():
            raise ValueError("There is no text yet. Write or paste one, upload a file, or choose a sample.")
        if len(text) > self.characters:
            raise ValueError(
                f"The text has {len(text):,} characters; this page takes up to {self.characters:,}. Give a part of "
                "it, or use `c3-hf compress` on your own machine, which has no limit."
            )
        return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Study:
    """A text, its latents, and as much as has come back of it.

    Attributes:
        context: The latents.
        text: What was compressed; `None` for an uploaded context, whose text only its latents know.
        num_given: Characters that were given; more than `text` has where the time was up.
        restored: The text of each segment restored so far, and whether it is exact.
        compress_seconds, restore_seconds: What that took; compressing with the pass that measures.
    """

    context: CompressedContext
    text: str | None = None
    num_given: int = 0
    restored: tuple[tuple[str, bool], ...] = ()
    compress_seconds: float = 0.0
    restore_seconds: float = 0.0

    @property
    def segments(self) -> list[str]:
        """The segments' texts, where the text is known."""
        if self.text is None:
            return [piece for piece, _ in self.restored]
        ends = (self.context.char_offsets - self.context.char_offsets[0]).tolist()
        return [self.text[start:end] for start, end in pairwise(ends)]

    @property
    def precision(self) -> float:
        """Character precision of what was restored, 0 to 1; segment by segment, weighted by their lengths."""
        pairs = [(got, want, max(len(got), len(want))) for (got, _), want in zip(self.restored, self.segments)]
        total = sum(size for _, _, size in pairs)
        return sum(char_precision(got, want) * size for got, want, size in pairs) / total if total else 1.0

    @property
    def num_exact(self) -> int:
        """Segments that came back to the letter."""
        return sum(is_exact for _, is_exact in self.restored)


def ratio_range(pipe: C3Pipeline) -> tuple[int, int, int]:
    """Tokens for each latent: the least and the most that a checkpoint takes, and what it was made for."""
    config = pipe.model.config
    least = -(-MIN_SEGMENT_LENGTH // config.num_latents)
    most = max(least, pipe.segment_room // config.num_latents)
    usual = config.longest_segment // config.num_latents
    return least, most, min(max(usual, least), most)


def compress_within(pipe: C3Pipeline, text: str, seconds: float, **options: Any) -> Study:
    """Compress as much of a text as the time allows."""
    started = time.monotonic()

    def pieces() -> Iterator[str]:
        for start in range(0, len(text), _PIECE):
            if start and time.monotonic() - started > seconds:
                return
            yield text[start : start + _PIECE]

    context = pipe.compress(pieces(), batch_size=BATCH, **options)
    read = int(context.char_offsets[-1])
    return Study(context, text[:read], len(text), compress_seconds=time.monotonic() - started)


def restore_within(pipe: C3Pipeline, study: Study, seconds: float) -> Iterator[Study]:
    """The study with more and more restored, until all is or the time is up."""
    started = time.monotonic()
    for start in range(0, len(study.context), BATCH):
        if start and time.monotonic() - started > seconds:
            return
        pieces = pipe.iter_restored(study.context[start : start + BATCH], batch_size=BATCH)
        restored = [(data.decode("utf-8", "replace"), is_exact) for data, is_exact in pieces]
        study = dataclasses.replace(
            study, restored=(*study.restored, *restored), restore_seconds=time.monotonic() - started
        )
        yield study


@dataclass(frozen=True)
class Trial:
    """One block of latents at one ratio.

    Attributes:
        ratio: Tokens for each latent that the block has.
        precision: Character precision of what came back, 0 to 1.
        by_position: Share of tokens that came back, 0 to 1, for ten equal parts of the block; `None` without tokens.
        what: What was tried, and how often.
    """

    ratio: float
    precision: float
    by_position: tuple[float | None, ...]
    what: str = ""


def ratios_to_try(pipe: C3Pipeline) -> list[int]:
    """From the least to the most that a checkpoint takes, by doubling, and what it was made for."""
    least, most, usual = ratio_range(pipe)
    doubled = {2**power for power in range(1, most.bit_length())}
    return sorted({ratio for ratio in doubled if least <= ratio <= most} | {usual, most})


def forget(pipe: C3Pipeline, text: str, seconds: float) -> Iterator[Trial]:
    """The beginning of a text as one block of latents, at ratio after ratio, until the text or the time is out."""
    started, longest = time.monotonic(), 0
    num_latents, read = pipe.model.config.num_latents, pipe.processor.tokenize_context
    for ratio in ratios_to_try(pipe):
        if longest and time.monotonic() - started > seconds:
            return
        head = cut_to_tokens(pipe.processor.encoder_reader, text, ratio * num_latents)
        if len(head) <= longest:
            continue
        # One block: a text that is cut may have a token more than it had as a part.
        block = pipe.compress(head.encode(), ratio=ratio)[0]
        longest, wanted = len(head), head[: int(block.char_offsets[-1])]
        got = pipe.restore(block).text
        shares = accuracy_by_position(read(got), read(wanted))
        yield Trial(block.compression_ratio, char_precision(got, wanted), tuple(shares))


def recorded_trials(pipe: C3Pipeline) -> list[Trial]:
    """What `curve.json` beside a checkpoint's weights says of the same on held-out texts, of the first kind in it.

    The file is the part `restoring` of what `benchmarks/restoring_by_ratio.py` measures, with the fingerprint of the
    weights; one of other weights does not count.
    """
    path = Path(pipe.model.name_or_path) / "curve.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("weights") != pipe.restorer.fingerprints.model:
        return []
    kind = record["restoring"][0]["kind"]
    rows = [row for row in record["restoring"] if row["kind"] == kind]
    numbers = [row["num_items"] for row in rows]
    texts = f"{numbers[0]}" if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
    what = f"{kind}, mean of {texts} texts"
    return [Trial(row["ratio"], row["char_precision"], tuple(row["accuracy_by_position"]), what) for row in rows]


def to_file(context: CompressedContext) -> bytes:
    """The bytes of the context's `.c3` file; nothing stays on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.c3"
        context.save(path)
        return path.read_bytes()


def from_file(path: Path) -> Study:
    """An uploaded `.c3` file, all of it in memory.

    Raises:
        ValueError: If it is none, or damaged.
    """
    context = CompressedContext.load(path)
    context.check()
    # Latents are mapped from the file, which is about to go.
    tensors = {name: tensor.clone() for name, tensor in context.tensors().items()}
    return Study(dataclasses.replace(context, **tensors, files=(None,), places=()))
