"""The compressed context: latents of a text's segments with all that is known about them, in memory or in a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..options import LATENT_DTYPES
from .exact import Residual
from .file import (
    ORDER,
    ContextHeader,
    join_index,
    joined_header,
    read_file,
    rows_of,
    segment_checksums,
    tensor_bytes,
    write_file,
)
from .fingerprints import Fingerprints
from .measure import Calibration, SegmentFidelity, expected_precision


# A segment for messages: the file it is from, and its number there; in a context from no file, its number in that.
Place = tuple[str | None, int]


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
        strides: `(S,)` int64, tokens that a latent of each segment stands for, in a model with `latent_stride`.
        files, places: Which files the segments are from, and where in them each is.
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
    strides: torch.Tensor | None = None
    files: tuple[str | None, ...] = (None,)
    places: tuple[Place, ...] = ()

    def __post_init__(self):
        self.places = self.places or tuple((self.files[0], number) for number in range(len(self.latents)))
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
        entries, tensors = read_file(path)
        header = ContextHeader.from_entries(entries, os.fspath(path))
        shape = tuple(tensors["latents"].shape[1:])
        if shape != (header.num_latents, header.hidden_size):
            raise ValueError(
                f"`header` says {header.num_latents} latents of width {header.hidden_size}, the tensor has {shape}: "
                f"{os.fspath(path)} is damaged."
            )
        return cls(header, **tensors, files=(os.fspath(path),))

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
        tensors = self.tensors()
        parts = {name: tensor[rows_of(name, tensors, start, stop)] for name, tensor in tensors.items()}
        if "residual_offsets" in parts:
            parts["residual_offsets"] = parts["residual_offsets"] - parts["residual_offsets"][0]
        header = dataclasses.replace(self.header, text_sha256=None, passes=None)
        return CompressedContext(header, **parts, files=self.files, places=self.places[start:stop])

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
        tensors, _ = join_index(parts)
        for name in parts[0].keys() - tensors.keys():
            tensors[name] = torch.cat([part[name] for part in parts])
        files = tuple(dict.fromkeys(file for context in contexts for file in context.files))
        places = enumerate(place for context in contexts for place in context.places)
        counted = tuple((file, number if file else position) for position, (file, number) in places)
        header = joined_header([context.header for context in contexts])
        return cls(header, **tensors, files=files, places=counted)

    def to(
        self, dtype: str | torch.dtype | None = None, device: torch.device | str | None = None
    ) -> CompressedContext:
        """The same context with latents in another dtype (float32, bfloat16, int8) or on another device.

        Margins describe the latents they were measured with, so a change of dtype drops them.

        Raises:
            ValueError: If `dtype` is none of the three, or the context is byte-exact: its residual fits these latents.
        """
        changed = self
        if dtype is not None:
            dtype = as_latent_dtype("dtype", dtype)
        if dtype is not None and dtype != self.latents.dtype:
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

    def missing_text(self, text_sha256: str) -> ValueError:
        """The error for a text whose segments are all right, and whose SHA-256 is not the header's."""
        return ValueError(
            f"the text of {self.name} has SHA-256 {text_sha256}, its header says {self.header.text_sha256} "
            "(`text_sha256`), although each segment is right: segments are missing, or the header is damaged."
        )

    @property
    def name(self) -> str:
        """The file or files it is from, for messages."""
        files = dict.fromkeys(file for file, _ in self.places) or self.files
        return ", ".join(file or "this compressed context" for file in files)

    def place(self, index: int) -> str:
        """The segment at `index` as a message names it: its number in its file, and the file."""
        file, number = self.places[index]
        return f"segment {number} of {file or 'this compressed context'}"

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
        Fingerprints(model).check(self)
        return self.project(model).unsqueeze(0)

    def context_strides(self, model: PreTrainedModel) -> torch.Tensor | None:
        """What `model.generate(context_strides=...)` takes beside the latents.

        Returns:
            `(1, num_segments)` int64 on the model's device; `None` for a model whose latents have no stride.

        Raises:
            ValueError: If the strides are none of this model.
        """
        most = model.config.latent_stride
        if self.strides is None and most is None:
            return None
        if self.strides is None or most is None or (self.strides > most).any():
            found = None if self.strides is None else self.strides.tolist()
            raise ValueError(f"`strides` of {self.name} are {found}, the model has {most}: the file is damaged.")
        return self.strides.unsqueeze(0).to(model.device)

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
        self.check()
        return project(model, self.latents, self.latent_scales)

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
        return self.margins[rows_of("margins", self.tensors(), index, index + 1)]

    @property
    def fidelity(self) -> list[SegmentFidelity] | None:
        """What is known about each segment; `None` if it was compressed without `verify`."""
        if self.margins is None:
            return None
        lost = [None if count < 0 else count for count in self._lost().tolist()]
        return [SegmentFidelity.from_margins(self.segment_margins(index), lost[index]) for index in range(len(self))]

    def expected_precision(self, calibration: Calibration | None = None) -> list[float]:
        """Character precision, 0 to 1, to expect of each segment from free-running greedy decoding: an estimate.

        Args:
            calibration: How the model behaves after an error; by default what the header says of it, and where it does
                not, that nothing counts behind an error.

        Raises:
            ValueError: If the context was compressed without `verify`.
        """
        if calibration is None:
            derail, floor = self.header.derail, self.header.floor
            calibration = Calibration() if derail is None or floor is None else Calibration(derail, floor)
        kept = 1 - self._lost().clamp(min=0) / self.char_offsets.diff().clamp(min=1)
        margins = map(self.segment_margins, range(len(self)))
        return [expected_precision(each, calibration) * share for each, share in zip(margins, kept.tolist())]

    @property
    def num_lost_characters(self) -> int | None:
        """Characters of the text that the tokenizer does not keep, so that no model could bring them back.

        Unicode normalisation changes them, for one. Only byte-exact mode restores them. `None` where a segment was not
        counted.
        """
        lost = self._lost()
        return None if (lost < 0).any() else int(lost.sum())

    def _lost(self) -> torch.Tensor:
        return cast("torch.Tensor", self.lost_characters)  # given, or filled in by `__post_init__`

    def segment_residual(self, index: int) -> Residual:
        """Corrections of one segment; only for a byte-exact context.

        Raises:
            ValueError: If the context is not byte-exact, or the record is none of this segment.
        """
        if self.residual is None or self.residual_offsets is None:
            raise ValueError("this context is not byte-exact: compress with `exact=True`.")
        record = self.residual[rows_of("residual", self.tensors(), index, index + 1)]
        tokens, size = (int(offsets[index : index + 2].diff()) for offsets in (self.token_offsets, self.byte_offsets))
        try:
            return Residual.decode(bytes(tensor_bytes(record)), tokens, size)
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
    def num_characters(self) -> int:
        """Characters of the text."""
        return int(self.char_offsets[-1] - self.char_offsets[0])

    @property
    def total_latents(self) -> int:
        """Latents of all segments together."""
        return len(self) * self.header.num_latents

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def compression_ratio(self) -> float:
        """Tokens of the text for each latent; larger is denser."""
        return self.num_tokens / max(1, self.total_latents)

    @property
    def token_accuracy(self) -> float | None:
        """That of all segments together, see [`SegmentFidelity`]; `None` if it was compressed without `verify`."""
        if self.margins is None:
            return None
        return 1 - int((~(self.margins > 0)).sum()) / max(1, len(self.margins))

    def __repr__(self) -> str:
        dtype = str(self.latents.dtype).removeprefix("torch.")
        parts = [
            f"{len(self)} segments",
            f"{self.num_tokens:,} tokens in {self.total_latents:,} latents ({self.compression_ratio:.1f}×)",
            f"{dtype} × {self.header.hidden_size}",
            f"{self.nbytes:,} bytes",
        ]
        if self.margins is not None:
            parts.append(f"token accuracy {self.token_accuracy:.4f}")
        if self.is_exact:
            parts.append("byte-exact")
        if self.num_lost_characters:
            parts.append(f"{self.num_lost_characters:,} characters not kept by the tokenizer")
        return f"CompressedContext({', '.join(parts)})"


def quantize(latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents `(num_segments, num_latents, hidden_size)` as `dtype`; for int8 with the scales, float32 magnitude / 127
    of each latent `(num_segments, num_latents)`."""
    if dtype != torch.int8:
        return latents.to(dtype), None
    latents = latents.float()
    scales = latents.abs().amax(dim=-1) / 127
    steps = latents / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantize(latents: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The inverse of [`quantize`]: float32 for int8, otherwise the latents as they are."""
    return latents if scales is None else latents.float() * scales.unsqueeze(-1)


def project(model: PreTrainedModel, latents: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Stored latents `(num_segments, num_latents, hidden_size)` through the projector, as the decoder takes them."""
    weight = model.model.projector.weight
    return model.model.projector(dequantize(latents, scales).to(weight.device, weight.dtype))


def as_latent_dtype(name: str, value: object) -> torch.dtype:
    """The dtype that the argument called `name` says, as a word or as torch's; ValueError if latents have no such."""
    word = str(value).removeprefix("torch.")
    if word not in LATENT_DTYPES:
        raise ValueError(f"`{name}` must be one of {', '.join(LATENT_DTYPES)}, got {value!r}.")
    return getattr(torch, word)


def check_at_least_1(name: str, value: object) -> None:
    """Raise ValueError or TypeError unless the argument called `name` is a number of things."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int of at least 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


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
