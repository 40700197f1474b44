"""The compressed context: latents of a text's segments with all that is known about them, in memory or in a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .fidelity import TINY_CALIBRATION, Calibration, SegmentFidelity, expected_precision
from .fingerprints import check_model
from .header import ContextHeader, joined_header
from .quantization import LATENT_DTYPES, dequantize, quantize
from .residual import Residual
from .storage import ORDER, join_index, read_file, segment_checksums, tensor_bytes, write_file


class Run(NamedTuple):
    """Consecutive segments of one file, for messages: the file, its first such segment, how many.

    In a context that is from no file the first is a place in that context.
    """

    file: str | None
    first: int
    size: int


@dataclass(eq=False)
class CompressedContext:
    """Latents of one or more segments of a text. A sequence: index, slice, iterate, add; each gives contexts again.

    `num_segments` S, tokens T (without stop tokens), residual bytes R:

    Attributes:
        header: What holds for all segments.
        latents: `(S, num_latents, hidden_size)` float32, bfloat16 or int8; mapped from the file after [`load`].
        char_offsets: `(S + 1,)` int64, where the segments start in the text, in characters; the last is the end.
            A slice keeps the offsets of the text it was cut from.
        byte_offsets: `(S + 1,)` int64, the same in bytes of the source.
        token_offsets: `(S + 1,)` int64, the same in tokens of the decoder, each segment tokenised by itself.
        digests: `(S, 32)` uint8, SHA-256 of each segment's bytes.
        checksums: `(S,)` int64, CRC-32 of each segment's rows here; computed when not given.
        latent_scales: `(S, num_latents)` float32 with int8 latents: value = int8 * scale.
        margins: `(T + S,)` float16, teacher-forced margins of the tokens and the stop token, segment after segment.
        residual: `(R,)` uint8, what byte-exact restoring needs beside the latents, see [`Residual`].
        residual_offsets: `(S + 1,)` int64, where each segment's record starts in it.
        lost_characters: `(S,)` int64, characters of each segment that its own tokens do not give when decoded; -1
            where nobody counted, as in files of c3_hf 0.1.
        runs: Which files the segments are from.
    """

    header: ContextHeader
    latents: torch.Tensor
    char_offsets: torch.Tensor
    byte_offsets: torch.Tensor
    token_offsets: torch.Tensor
    digests: torch.Tensor
    checksums: torch.Tensor | None = None
    latent_scales: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    residual_offsets: torch.Tensor | None = None
    lost_characters: torch.Tensor | None = None
    runs: tuple[Run, ...] = ()

    def __post_init__(self):
        self.runs = self.runs or (Run(None, 0, len(self.latents)),)
        if self.lost_characters is None:
            self.lost_characters = torch.full((len(self.latents),), -1)
        if self.checksums is None:
            self.checksums = segment_checksums(self.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike) -> CompressedContext:
        """Open a file. Latents are mapped: what is not used is not read.

        Raises:
            ValueError: If the file is truncated, damaged or no compressed context.
            FileNotFoundError: If there is none.
        """
        header, tensors = read_file(path)
        return cls.from_tensors(header, tensors, os.fspath(path))

    @classmethod
    def from_tensors(
        cls, header: dict[str, Any], tensors: dict[str, torch.Tensor], file: str | None = None
    ) -> CompressedContext:
        """The counterpart of [`tensors`].

        Args:
            header: Entries of a [`ContextHeader`].
            tensors: What [`tensors`] gave.
            file: Where they are from, for messages.

        Raises:
            ValueError: If `header` lacks an entry, has one of another type, or disagrees with the latents' shape.
        """
        name = file or "this compressed context"
        parsed = ContextHeader.from_entries(header, name)
        shape = tuple(tensors["latents"].shape[1:])
        if shape != (parsed.num_latents, parsed.hidden_size):
            raise ValueError(
                f"`header` says {parsed.num_latents} latents of width {parsed.hidden_size}, the tensor has {shape}: "
                f"{name} is damaged."
            )
        return cls(parsed, **tensors, runs=(Run(file, 0, len(tensors["latents"])),))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that are present, by name, as a file holds them."""
        named = {name: getattr(self, name) for name in ORDER}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def save(self, path: str | os.PathLike) -> None:
        """Write a file; it appears whole or not at all."""
        write_file(path, dataclasses.asdict(self.header), lambda: [self.to(device="cpu").tensors()])

    def __len__(self) -> int:
        return len(self.latents)

    def __iter__(self) -> Iterator[CompressedContext]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> CompressedContext:
        """The segment, or segments, at `index`. Slices have step 1.

        Raises:
            IndexError: If a segment is out of range.
            ValueError: If the slice has another step.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"`index` must be a slice of step 1, because segments are in text order; got {step}.")
            stop = max(start, stop)
        else:
            start = range(len(self))[index]
            stop = start + 1
        if (start, stop) == (0, len(self)):
            return self
        tokens = self.token_offsets - self.token_offsets[0]
        parts: dict[str, torch.Tensor] = {}
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if name == "margins":
                parts[name] = tensor[int(tokens[start]) + start : int(tokens[stop]) + stop]
            elif name == "residual":
                parts[name] = tensor[slice(*tensors["residual_offsets"][[start, stop]].tolist())]
            elif name == "residual_offsets":
                parts[name] = tensor[start : stop + 1] - tensor[start]
            else:
                parts[name] = tensor[start : stop + 1 if name.endswith("_offsets") else stop]
        header = dataclasses.replace(self.header, text_sha256=None, passes=None)
        return CompressedContext(header, **parts, runs=_cut_runs(self.runs, start, stop))

    def __add__(self, other: CompressedContext) -> CompressedContext:
        """This context followed by `other`, see [`concatenate`]."""
        return self.concatenate([self, other])

    @classmethod
    def concatenate(cls, contexts: Iterable[CompressedContext]) -> CompressedContext:
        """Join contexts in the given order; each one's offsets go on where the one before ends.

        Raises:
            ValueError: If there are none, or they come from different models, tokenizers or dtypes, or only some of
                them carry margins or a residual.
        """
        contexts = list(contexts)
        if not contexts:
            raise ValueError("`contexts` is empty; expected at least one CompressedContext.")
        first = contexts[0]
        if len(contexts) == 1:
            return first
        for other in contexts[1:]:
            check_joinable(first, other)
        parts = [context.tensors() for context in contexts]
        tensors = join_index(parts)
        for name in parts[0].keys() - tensors.keys():
            tensors[name] = torch.cat([part[name] for part in parts])
        runs = _joined_runs([run for context in contexts for run in context.runs])
        return cls(joined_header([context.header for context in contexts]), **tensors, runs=runs)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> CompressedContext:
        """The same context with latents in another dtype (float32, bfloat16, int8) or on another device.

        Margins describe the latents they were measured with, so a change of dtype drops them.

        Raises:
            ValueError: If `dtype` is none of the three, or the context is byte-exact: its residual fits these latents.
        """
        changed = self
        if dtype is not None and dtype != self.latents.dtype:
            if dtype not in LATENT_DTYPES:
                raise ValueError(f"`dtype` must be one of {LATENT_DTYPES}, got {dtype}.")
            if self.residual is not None:
                raise ValueError(
                    f"`dtype`: a byte-exact context stays {self.latents.dtype}, because its corrections belong to "
                    f"these latents; got {dtype}. Compress the text again with this dtype."
                )
            latents, scales = quantize(self.dense_latents(), dtype)
            changed = dataclasses.replace(self, latents=latents, latent_scales=scales, margins=None, checksums=None)
        if device is not None:
            moved = {name: getattr(changed, name) for name in ("latents", "latent_scales")}
            moved = {name: tensor.to(device) for name, tensor in moved.items() if tensor is not None}
            changed = dataclasses.replace(changed, **moved)
        return changed

    def check(self) -> None:
        """Compare every segment with its checksum.

        Raises:
            ValueError: If one differs: the file is damaged there.
        """
        wrong = (segment_checksums(self.to(device="cpu").tensors()) != self.checksums).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{self.place(wrong[0])} (and {len(wrong) - 1} more) is damaged: its checksum differs from the one it "
                "was written with. Compress the text again."
            )

    def check_whole(self, text_sha256: str) -> None:
        """Compare the digest of all segments' right text with the one of the source, where the header has it.

        Args:
            text_sha256: SHA-256 in hexadecimal.

        Raises:
            ValueError: If they differ: segments are missing, or the header is damaged.
        """
        expected = self.header.text_sha256
        if expected not in (None, text_sha256):
            raise ValueError(
                f"the text of {self.name} has SHA-256 {text_sha256}, its header says {expected} (`text_sha256`), "
                "although each segment is right: segments are missing, or the header is damaged."
            )

    @property
    def name(self) -> str:
        """The file or files it is from, for messages."""
        return ", ".join(dict.fromkeys(run.file or "this compressed context" for run in self.runs))

    def place(self, index: int) -> str:
        """The segment at `index` as a message names it: its number in its file, and the file."""
        run = _cut_runs(self.runs, index, index + 1)[0]
        return f"segment {run.first} of {run.file or 'this compressed context'}"

    def dense_latents(self) -> torch.Tensor:
        """Latents `(num_segments, num_latents, hidden_size)`, float32 or bfloat16; checked for damage."""
        self.check()
        return dequantize(self.latents, self.latent_scales)

    def context_latents(self, model: PreTrainedModel) -> torch.Tensor:
        """What `model.generate(context_latents=...)` takes: one row with one context a segment.

        Returns:
            `(1, num_segments, num_latents, text_hidden_size)` in the model's dtype and on its device.

        Raises:
            ValueError: If the context is damaged or was made by another model.
        """
        check_model(self.header.model, model, self.name)
        return self.project(model).unsqueeze(0)

    @torch.no_grad()
    def project(self, model: PreTrainedModel) -> torch.Tensor:
        """Latents through the model's projector, `(num_segments, num_latents, text_hidden_size)`.

        For many calls with a model that has been checked already; else use [`context_latents`].

        Raises:
            ValueError: If the context is damaged.
        """
        shape, wanted = self.latents.shape[1:], (model.config.num_latents, model.config.encoder_config.hidden_size)
        if tuple(shape) != wanted:
            raise ValueError(
                f"`latents` of {self.name} are {shape[0]} of width {shape[1]} for each segment, the model makes "
                f"{wanted[0]} of width {wanted[1]}: the file is damaged."
            )
        weight = model.model.projector.weight
        return model.model.projector(self.dense_latents().to(weight.device, weight.dtype))

    def content_parts(self, model: PreTrainedModel | None = None) -> list[dict[str, Any]]:
        """Parts of a chat message that stand for the text.

        Args:
            model: With it the parts hold the latents, so that several contexts can stand in one chat. Without, they
                only keep the place of this context, which goes to `generate` or a pipeline as `context_latents`.

        Raises:
            ValueError: As [`context_latents`].
        """
        if not len(self):
            return []
        if model is None:
            return [{"type": "context", "num_blocks": len(self), "num_latents": self.header.num_latents}]
        return [{"type": "context", "latents": self.context_latents(model)[0]}]

    def segment_margins(self, index: int) -> torch.Tensor:
        """Margins of one segment, `(num_tokens + 1,)`.

        Raises:
            ValueError: If the context was compressed without `verify`.
        """
        if self.margins is None:
            raise ValueError("this context holds no fidelity: compress with `verify=True`, or call `verify`.")
        tokens = self.token_offsets - self.token_offsets[0]
        return self.margins[int(tokens[index]) + index : int(tokens[index + 1]) + index + 1]

    @property
    def fidelity(self) -> list[SegmentFidelity] | None:
        """What is known about each segment; `None` if it was compressed without `verify`."""
        if self.margins is None:
            return None
        lost = [None if count < 0 else count for count in self._lost()]
        return [SegmentFidelity.from_margins(self.segment_margins(index), lost[index]) for index in range(len(self))]

    def expected_precision(self, calibration: Calibration = TINY_CALIBRATION) -> list[float]:
        """Character precision, 0 to 1, to expect of each segment from free-running greedy decoding: an estimate.

        Args:
            calibration: How the model behaves after an error; that of the bundled model by default.

        Raises:
            ValueError: If the context was compressed without `verify`.
        """
        lengths, lost = self.char_offsets.diff().tolist(), self._lost()
        return [
            expected_precision(self.segment_margins(index), calibration)
            * (1 - max(0, lost[index]) / max(1, lengths[index]))
            for index in range(len(self))
        ]

    def _lost(self) -> list[int]:
        return [] if self.lost_characters is None else self.lost_characters.tolist()

    @property
    def num_lost_characters(self) -> int | None:
        """Characters of the text that the tokenizer does not keep, so that no model could bring them back.

        Unicode normalisation changes them, for one. Only byte-exact mode restores them. `None` where a segment was not
        counted.
        """
        lost = self._lost()
        return None if min(lost, default=0) < 0 else sum(lost)

    def segment_residual(self, index: int) -> Residual:
        """Corrections of one segment; only for a byte-exact context.

        Raises:
            ValueError: If the context is not byte-exact, or the record is none of this segment.
        """
        if self.residual is None or self.residual_offsets is None:
            raise ValueError("this context is not byte-exact: compress with `exact=True`.")
        start, end = self.residual_offsets[index : index + 2].tolist()
        tokens, size = (int(offsets[index : index + 2].diff()) for offsets in (self.token_offsets, self.byte_offsets))
        try:
            return Residual.decode(bytes(tensor_bytes(self.residual[start:end])), tokens, size)
        except ValueError as error:
            raise ValueError(f"the `residual` of {self.place(index)} is damaged: {error}") from error

    @property
    def is_exact(self) -> bool:
        """Whether it restores to the very bytes of its source."""
        return self.residual is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, each segment tokenised by itself."""
        return int(self.token_offsets[-1] - self.token_offsets[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def compression_ratio(self) -> float:
        """Tokens of the text for each latent; larger is denser."""
        return self.num_tokens / max(1, len(self) * self.header.num_latents)

    def __repr__(self) -> str:
        dtype = str(self.latents.dtype).removeprefix("torch.")
        parts = [
            f"{len(self)} segments",
            f"{self.num_tokens:,} tokens in {len(self) * self.header.num_latents:,} latents "
            f"({self.compression_ratio:.1f}×)",
            f"{dtype} × {self.header.hidden_size}",
            f"{self.nbytes:,} bytes",
        ]
        if self.margins is not None:
            right = float((self.margins > 0).float().mean()) if len(self.margins) else 1.0
            parts.append(f"token accuracy {right:.4f}")
        if self.is_exact:
            parts.append("byte-exact")
        if self.num_lost_characters:
            parts.append(f"{self.num_lost_characters:,} characters not kept by the tokenizer")
        return f"CompressedContext({', '.join(parts)})"


def _cut_runs(runs: tuple[Run, ...], start: int, stop: int) -> tuple[Run, ...]:
    """The runs of the segments from `start` to `stop`."""
    cut, position = [], 0
    for run in runs:
        first, last = max(start - position, 0), min(stop - position, run.size)
        if first < last:
            cut.append(Run(run.file, run.first + first, last - first))
        position += run.size
    return tuple(cut)


def _joined_runs(runs: list[Run]) -> tuple[Run, ...]:
    """As few runs as say the same; segments from no file are counted anew."""
    joined: list[Run] = []
    position = 0
    for run in runs:
        run = run if run.file else run._replace(first=position)
        position += run.size
        if joined and joined[-1].file == run.file and joined[-1].first + joined[-1].size == run.first:
            joined[-1] = joined[-1]._replace(size=joined[-1].size + run.size)
        else:
            joined.append(run)
    return tuple(joined)


def check_joinable(first: CompressedContext, other: CompressedContext) -> None:
    """Raise ValueError unless both come from the same model and hold the same kinds of tensors."""
    for name in ("model", "tokenizer", "num_latents", "hidden_size", "exact_margin"):
        left, right = getattr(first.header, name), getattr(other.header, name)
        if left != right:
            raise ValueError(f"`contexts` differ in `{name}`: {left!r} and {right!r}. Compress both the same way.")
    if first.latents.dtype != other.latents.dtype:
        raise ValueError(
            f"`contexts` differ in dtype: {first.latents.dtype} and {other.latents.dtype}. Convert one with `.to()`."
        )
    differing = sorted(first.tensors().keys() ^ other.tensors().keys())
    if differing:
        raise ValueError(f"`contexts`: only one of them has {differing}. Compress both the same way.")
