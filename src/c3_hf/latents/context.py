"""The compressed context: latents of a text's segments with all that is known about them, in memory or in a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .fidelity import TINY_CALIBRATION, Calibration, SegmentFidelity, expected_precision
from .fingerprints import check_model
from .quantization import LATENT_DTYPES, dequantize, quantize
from .residual import Residual
from .storage import join_index, read_file, segment_checksums, tensor_bytes, write_file


@dataclass(frozen=True)
class ContextHeader:
    """What holds for all segments of a compressed context.

    Attributes:
        model: Fingerprint of the model's weights, see [`fingerprint_model`].
        tokenizer: Fingerprint of the tokenizer and restoring prompt, see [`fingerprint_processor`].
        num_latents: Latents of a segment.
        hidden_size: Width of a latent; the latents are the encoder's, from before the projector.
        segment_length: Most tokens a segment was allowed, in the encoder's vocabulary.
        target_fidelity: Token accuracy each segment was to reach, 0 to 1; `None` if none was asked for.
        exact_margin: Logit margin below which a right token is corrected too; `None` without byte-exact mode.
        min_segment_length: Tokens down to which segments were cut for `target_fidelity`; `None` without one.
        exact_check: Whether every segment was restored when it was compressed; `None` without byte-exact mode.
        model_dtype: The dtype it was computed in, such as "float32".
        text_sha256: SHA-256 of the whole source; `None` after slicing, concatenating or appending.
        source: Name of the source file, for people.
        passes: Tokens that went through encoder (and decoder, where fidelity was measured), for each token of the
            text; above 1 only with `target_fidelity`. `None` after slicing, concatenating or appending.
        writer: Package, torch version, device and dtype that computed it, for people.
    """

    model: str
    tokenizer: str
    num_latents: int
    hidden_size: int
    segment_length: int
    target_fidelity: float | None = None
    exact_margin: float | None = None
    min_segment_length: int | None = None
    exact_check: bool | None = None
    model_dtype: str | None = None
    text_sha256: str | None = None
    source: str | None = None
    passes: float | None = None
    writer: str | None = None


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

    def __post_init__(self):
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
        return cls.from_tensors(header, tensors)

    @classmethod
    def from_tensors(cls, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> CompressedContext:
        """The counterpart of [`tensors`].

        Raises:
            ValueError: If `header` lacks an entry or disagrees with the shape of the latents.
        """
        known = [field.name for field in dataclasses.fields(ContextHeader)]
        missing = [name for name in known[:5] if name not in header]
        if missing:
            raise ValueError(f"`header` lacks {missing}; the file was not written by c3_hf.")
        parsed = ContextHeader(**{name: header[name] for name in known if name in header})
        shape = tuple(tensors["latents"].shape[1:])
        if shape != (parsed.num_latents, parsed.hidden_size):
            raise ValueError(
                f"`header` says {parsed.num_latents} latents of width {parsed.hidden_size}, the tensor has {shape}."
            )
        return cls(parsed, **tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that are present, by name, as a file holds them."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
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
        return CompressedContext(dataclasses.replace(self.header, text_sha256=None, passes=None), **parts)

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
        return cls(joined_header([context.header for context in contexts]), **tensors)

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
                f"segment {wrong[0]} of this compressed context (and {len(wrong) - 1} more) is damaged: its checksum "
                "differs from the one it was written with. Compress the text again."
            )

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
        check_model(self.header.model, model)
        return self.project(model).unsqueeze(0)

    @torch.no_grad()
    def project(self, model: PreTrainedModel) -> torch.Tensor:
        """Latents through the model's projector, `(num_segments, num_latents, text_hidden_size)`.

        For many calls with a model that has been checked already; else use [`context_latents`].

        Raises:
            ValueError: If the context is damaged.
        """
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
        return [SegmentFidelity.from_margins(self.segment_margins(index)) for index in range(len(self))]

    def expected_precision(self, calibration: Calibration = TINY_CALIBRATION) -> list[float]:
        """Character precision, 0 to 1, to expect of each segment from free-running greedy decoding: an estimate.

        Args:
            calibration: How the model behaves after an error; that of the bundled model by default.

        Raises:
            ValueError: If the context was compressed without `verify`.
        """
        return [expected_precision(self.segment_margins(index), calibration) for index in range(len(self))]

    def segment_residual(self, index: int) -> Residual:
        """Corrections of one segment; only for a byte-exact context."""
        if self.residual is None or self.residual_offsets is None:
            raise ValueError("this context is not byte-exact: compress with `exact=True`.")
        start, end = (int(offset) for offset in self.residual_offsets[index : index + 2])
        return Residual.decode(bytes(tensor_bytes(self.residual[start:end])))

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
        return f"CompressedContext({', '.join(parts)})"


def joined_header(headers: list[ContextHeader]) -> ContextHeader:
    """One header for contexts put one behind the other: the first, less what holds for one source only."""
    first = headers[0]
    targets = [header.target_fidelity for header in headers]
    shortest = [header.min_segment_length for header in headers]
    checks = [header.exact_check for header in headers]
    return dataclasses.replace(
        first,
        segment_length=max(header.segment_length for header in headers),
        target_fidelity=None if None in targets else min(target for target in targets if target is not None),
        min_segment_length=None if None in shortest else min(length for length in shortest if length is not None),
        exact_check=None if None in checks else all(checks),
        model_dtype=first.model_dtype if len({header.model_dtype for header in headers}) == 1 else None,
        text_sha256=None,
        source=None,
        passes=None,
    )


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
