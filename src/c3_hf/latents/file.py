"""The file of a compressed context, and the journal of one that is being made; see docs/latent_format.md.

Everything here works on a header and a dictionary of tensors. What the tensors mean is [`CompressedContext`]'s
business; how they lie in the file, plain safetensors with a versioned header, and how damage is noticed, is decided
here.

While FILE.c3 is being made, the finished segments are appended to FILE.c3.journal: a line that says what the file is,
then records of `<u32 length> <u32 CRC-32> <payload>`, little-endian. The first payload is the header as JSON, each
further one a group of segments as a small safetensors file of the same layout as the finished one. A record counts
once its checksum is right, and it is on the disk before the next group is begun. At the end the records are copied
into the finished file, which appears in one step, and the journal goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from transformers.utils import logging

from ..files import atomic_file, safetensors_header
from .segments import Segment, TextReader


logger = logging.get_logger(__name__)

FORMAT = "c3-context"
FORMAT_VERSION = 1

# Tensors in the order of the file: wide numbers first, so that each starts at a multiple of its item size.
OFFSETS = ("char_offsets", "byte_offsets", "token_offsets")
OPTIONAL = ("residual_offsets", "lost_characters", "strides", "latent_scales", "margins", "residual")
# Small, read whole and covered by the checksum in the header; the rest is mapped and covered by `checksums`.
INDEX = (*OFFSETS, "residual_offsets", "lost_characters", "strides", "checksums")
ORDER = (*INDEX, "latent_scales", "latents", "margins", "digests", "residual")
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(INDEX, (torch.int64,)),
    "latent_scales": (torch.float32,),
    "latents": (torch.float32, torch.bfloat16, torch.int8),
    "margins": (torch.float16,),
    "digests": (torch.uint8,),
    "residual": (torch.uint8,),
}
_DIMENSIONS = {"latents": 3, "latent_scales": 2, "digests": 2}
_LARGEST_SIZE = 1 << 40
_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

MAGIC = b"c3-context journal 1\n"
_RECORD = struct.Struct("<II")

Tensors = Mapping[str, torch.Tensor]


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
        derail, floor: How the model behaves after an error, see [`Calibration`]; `None` where its checkpoint does not
            say.
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
    derail: float | None = None
    floor: float | None = None
    writer: str | None = None

    @classmethod
    def from_entries(cls, entries: dict[str, Any], name: str) -> ContextHeader:
        """The header that a file called `name` holds; entries that are not known are passed over.

        Raises:
            ValueError: If an entry is missing or is not what it can be.
        """
        fields, hints = dataclasses.fields(cls), get_type_hints(cls)
        known = {field.name: entries.get(field.name, field.default) for field in fields}
        missing = [entry for entry, value in known.items() if value is dataclasses.MISSING]
        if missing:
            raise ValueError(f"`header` lacks {missing}; {name} was not written by c3_hf.")
        for field in fields:
            value, kinds = known[field.name], get_args(hints[field.name]) or (hints[field.name],)
            # A bool is an int to Python, and a float without a fraction may be one in JSON.
            right = isinstance(value, (*kinds, int) if float in kinds else kinds)
            right = right and (bool in kinds or not isinstance(value, bool))
            if right and isinstance(value, (int, float)) and bool not in kinds:
                # 2^40 of anything is more than a file can hold, and its square more than a tensor can.
                right = 0 <= value < math.inf if float in kinds else 0 < value < 1 << 40
            if not right:
                shown = f"{value!r:.40}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
                raise ValueError(
                    f"`header`: the entry `{field.name}` of {name} is {shown}, expected {field.type}"
                    f"{' from 1 up' if kinds[0] is int else ''}: it is damaged."
                )
        return cls(**known)


def joined_header(headers: list[ContextHeader]) -> ContextHeader:
    """One header for contexts put one behind the other: the first, less what holds for one source only."""
    changed: dict[str, Any] = dict.fromkeys(("text_sha256", "source", "passes"))
    changed["segment_length"] = max(header.segment_length for header in headers)
    # The least holds for all, and `False` is less than `True`; `None` where one has none.
    for name in ("target_fidelity", "min_segment_length", "exact_check"):
        values = [getattr(header, name) for header in headers]
        changed[name] = None if None in values else min(values)
    if len({header.model_dtype for header in headers}) > 1:
        changed["model_dtype"] = None
    return dataclasses.replace(headers[0], **changed)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a CPU tensor, little-endian as safetensors wants it, row by row."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def write_file(path: str | os.PathLike, header: dict[str, Any], pieces: Callable[[], Iterable[Tensors]]) -> None:
    """Write the pieces of a context, one after the other, as one file; the file appears whole or not at all.

    Args:
        header: What the metadata entry `context` shall hold.
        pieces: Gives the pieces, anew at each call: they are gone through once for the small tensors and once for
            each large one, so that no more than one piece is in memory.

    Raises:
        ValueError: If there is no piece.
    """
    index, shapes = join_index(pieces())
    metadata = metadata_of(header, index)
    with atomic_file(path) as file:
        file.write(safetensors_header(metadata, shapes))
        for name in shapes:
            if name in index:
                file.write(tensor_bytes(index[name]))
            else:
                for piece in pieces():
                    file.write(tensor_bytes(piece[name]))


def read_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Open a file: its header and tensors. The large ones are mapped into memory, not read.

    Raises:
        ValueError: If the file is truncated, damaged, of a later version or not a compressed context at all.
        IsADirectoryError: If it is a folder.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    try:
        with _readable_name(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            declared = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
            check_declared(metadata, declared, str(path))
            tensors = {name: file.get_tensor(name) for name in declared}
    except SafetensorError as error:
        raise ValueError(
            f"`path`: {path} is no whole safetensors file ({error}); expected a compressed context written by "
            "`c3-hf compress`. It may be truncated: compress the text again."
        ) from error
    return parse(metadata, tensors, str(path))


@contextlib.contextmanager
def _readable_name(path: str | os.PathLike) -> Iterator[str]:
    """A name that safetensors opens `path` by: where its own is not UTF-8, that of a link which goes again."""
    name = os.fsdecode(path)
    if name.encode("utf-8", "replace") == os.fsencode(path):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "context")
        os.symlink(os.path.abspath(path), link)
        yield link


def check_declared(metadata: Mapping[str, str], declared: Mapping[str, tuple[str, list[int]]], name: str) -> None:
    """Check what a file (or a record of a journal) says it holds, before any of it is read.

    Args:
        declared: Dtype, as safetensors calls it, and shape of each tensor.

    Raises:
        ValueError: See [`read_file`].
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"`path`: {name} is not a compressed context: its metadata entry `format` is "
            f"{metadata.get('format')!r}, expected {FORMAT!r}."
        )
    version = metadata.get("version")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"`path`: {name} has format version {version!r}, this reader knows {FORMAT_VERSION}. Update c3_hf."
        )
    unknown = sorted(set(declared) - set(ORDER))
    missing = [key for key in ORDER if key not in declared and key not in OPTIONAL]
    if unknown or missing:
        raise ValueError(f"`path`: {name} is damaged: it lacks tensors {missing} or has unknown ones {unknown}.")
    known = {kind: dtype for dtype, kind in _NAMES.items()}
    for key, (kind, shape) in declared.items():
        if known.get(kind) not in _DTYPES[key]:
            raise ValueError(
                f"`path`: tensor `{key}` of {name} has dtype {known.get(kind, kind)}: the file is damaged."
            )
        dimensions = _DIMENSIONS.get(key, 1)
        if len(shape) != dimensions:
            raise ValueError(
                f"`path`: {name} contradicts itself (`{key}` has {len(shape)} dimensions instead of {dimensions}): it "
                "is damaged."
            )
        # A shape without elements costs no bytes, so that it can claim anything.
        if max(shape) > _LARGEST_SIZE:
            raise ValueError(f"`path`: tensor `{key}` of {name} has the shape {shape}: the file is damaged.")


def parse(
    metadata: Mapping[str, str], tensors: dict[str, torch.Tensor], name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Check that what has passed [`check_declared`] fits together, and give header and tensors.

    Raises:
        ValueError: See [`read_file`].
    """
    for reason in _contradictions(tensors):
        raise ValueError(f"`path`: {name} contradicts itself ({reason}): it is damaged.")
    context = metadata.get("context", "")
    if metadata.get("crc32") != _index_checksum(context, tensors):
        raise ValueError(f"`path`: the header of {name} is damaged (its checksum differs). Compress the text again.")
    # Files of c3_hf 0.1 do not say.
    tensors.setdefault("lost_characters", torch.full((len(tensors["latents"]),), -1))
    return read_header(context, name), tensors


def read_header(text: str | bytes, name: str) -> dict[str, Any]:
    """A header as JSON holds it, of a file or journal called `name`.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`path`: the header `context` of {name} is no JSON ({error}): it is damaged.") from error
    if not isinstance(header, dict):
        raise ValueError(
            f"`path`: the header `context` of {name} is a JSON {type(header).__name__}, expected an object: it is "
            "damaged."
        )
    return header


def segment_checksums(tensors: Tensors) -> torch.Tensor:
    """CRC-32 of each segment's rows of `latents`, `latent_scales`, `margins`, `residual` and `digests`, in this order.

    Returns:
        `(num_segments,)` int64.
    """
    sums = []
    for segment in range(len(tensors["latents"])):
        checksum = 0
        for name in ("latents", "latent_scales", "margins", "residual", "digests"):
            if name in tensors:
                rows = rows_of(name, tensors, segment, segment + 1)
                checksum = zlib.crc32(tensor_bytes(tensors[name][rows]), checksum)
        sums.append(checksum)
    return torch.tensor(sums, dtype=torch.int64)


def rows_of(name: str, tensors: Tensors, start: int, stop: int) -> slice:
    """The rows of the tensor called `name` that belong to the segments from `start` to before `stop`."""
    if name == "margins":
        # One for each token, and one for the stop token behind each segment.
        offsets = tensors["token_offsets"]
        return slice(*(int(offsets[place] - offsets[0]) + place for place in (start, stop)))
    if name == "residual":
        return slice(*tensors["residual_offsets"][[start, stop]].tolist())
    return slice(start, stop + 1 if name.endswith("_offsets") else stop)


def join_index(pieces: Iterable[Tensors]) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, list[int]]]]:
    """Put pieces one behind the other.

    Returns:
        The small tensors, offsets going on where the piece before ends; dtype and shape of all tensors of the whole.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    ends: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[str, list[int]]] = {}
    for piece in pieces:
        for name in (name for name in ORDER if name in piece):
            tensor = piece[name]
            kind, shape = shapes.setdefault(name, (_NAMES[tensor.dtype], [0, *tensor.shape[1:]]))
            if (_NAMES[tensor.dtype], list(tensor.shape[1:])) != (kind, shape[1:]):
                raise ValueError(f"`pieces` differ in dtype or width of `{name}`; they do not belong together.")
            shape[0] += len(tensor)
            if name in INDEX:
                if name.endswith("_offsets"):
                    start = ends.get(name)
                    tensor = tensor if start is None else tensor - tensor[0] + start
                    ends[name] = tensor[-1]
                    tensor = tensor if start is None else tensor[1:]
                parts.setdefault(name, []).append(tensor)
    if not shapes:
        raise ValueError("`pieces` is empty; a context needs at least one (it may have no segments).")
    index = {name: torch.cat(tensors) for name, tensors in parts.items()}
    for name, tensor in index.items():
        shapes[name][1][0] = len(tensor)
    return index, {name: shapes[name] for name in ORDER if name in shapes}


def metadata_of(header: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """The metadata entries of a file that holds `tensors`."""
    context = json.dumps(header, sort_keys=True, ensure_ascii=False)
    return {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "context": context,
        "crc32": _index_checksum(context, tensors),
    }


def _index_checksum(context: str, index: Tensors) -> str:
    checksum = zlib.crc32(context.encode())
    for name in INDEX:
        if name in index:
            checksum = zlib.crc32(tensor_bytes(index[name]), checksum)
    return f"{checksum:08x}"


def _contradictions(tensors: Tensors) -> Iterator[str]:
    """Reasons why tensors cannot belong to one context; the first one is reliable."""
    latents = tensors["latents"]
    count = len(latents)
    lengths = dict.fromkeys((*OFFSETS, "residual_offsets"), count + 1)
    lengths |= dict.fromkeys(("lost_characters", "strides", "checksums", "digests", "latent_scales"), count)
    for key, length in lengths.items():
        if key in tensors and len(tensors[key]) != length:
            yield f"`{key}` has {len(tensors[key])} rows for {count} segments"
            return
    for key, width in (("digests", 32), ("latent_scales", latents.shape[1])):
        if key in tensors and tensors[key].shape[1] != width:
            yield f"`{key}` has rows of {tensors[key].shape[1]} instead of {width}"
    if ("latent_scales" in tensors) != (latents.dtype == torch.int8):
        yield "`latent_scales` goes with int8 latents and with nothing else"
    if ("residual" in tensors) != ("residual_offsets" in tensors):
        yield "`residual` and `residual_offsets` come together"
        return
    for key in (*OFFSETS, "residual_offsets"):
        # Differences of numbers from 0 up do not overflow.
        if key in tensors and (int(tensors[key][0]) < 0 or (tensors[key].diff() < 0).any()):
            yield f"offsets go backwards in `{key}`"
            return
    chars, sizes = tensors["char_offsets"].diff(), tensors["byte_offsets"].diff()
    if (sizes < chars).any() or (sizes // 4 > chars).any():
        yield "`byte_offsets` are not 1 to 4 bytes for each character of `char_offsets`"
    lost = tensors.get("lost_characters", torch.zeros_like(chars))
    if (lost < -1).any() or (lost > chars).any():
        yield "`lost_characters` are more than the characters of `char_offsets`"
    if "strides" in tensors and (tensors["strides"] < 1).any():
        yield "`strides` are not positive"
    tokens = int(tensors["token_offsets"][-1] - tensors["token_offsets"][0])
    if "margins" in tensors and len(tensors["margins"]) != tokens + count:
        yield f"`margins` has {len(tensors['margins'])} entries for {tokens} tokens in {count} segments"
    if "residual" in tensors:
        if int(tensors["residual_offsets"][0]) != 0:
            yield f"`residual_offsets` start at {int(tensors['residual_offsets'][0])} instead of 0"
        if len(tensors["residual"]) != int(tensors["residual_offsets"][-1]):
            yield f"`residual` has {len(tensors['residual'])} bytes, its offsets end elsewhere"


class Journal:
    """An open journal.

    Attributes:
        header: What the file shall say of itself; `None` before [`go_on`] where there was no journal to go on with.
        num_records: Groups of segments that are safely written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header: dict[str, Any] | None = None
        self.num_records = 0
        self._end = 0
        if self.path.exists():
            self._recover()

    def go_on(self, wanted: dict[str, Any]) -> None:
        """Begin a journal with this header, or make sure that the one that is there was begun by the same call.

        The file comes into being with the first segments.

        Raises:
            ValueError: If it was not.
        """
        if self.header is None:
            self.header = wanted
            return
        differing = sorted(key for key in wanted if wanted[key] != self.header.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"`output`: {self.path} holds an unfinished run with other settings ({key}: "
                f"{self.header.get(key)!r}, now {wanted[key]!r}). Repeat the call it was begun with, or delete it."
            )
        logger.info(f"{self.path}: going on behind {self.num_records} finished groups of segments.")

    def read_past(self, reader: TextReader) -> Iterator[bytes]:
        """Read past the text of the finished segments, making sure that it is the same text; the bytes of each.

        Raises:
            ValueError: If it is another text.
        """
        end = 0
        for piece in self.pieces():
            for length, digest in zip(piece["char_offsets"].diff().tolist(), piece["digests"].tolist()):
                segment = Segment(reader.take(length), ())
                end += length
                if segment.digest != bytes(digest):
                    raise ValueError(
                        f"`source` differs from the text that {self.path} was begun with, before character {end:,}. "
                        "Give the same text, or delete the journal."
                    )
                yield segment.data

    def append(self, tensors: Tensors) -> None:
        """Write a group of segments; when this returns, it is on the disk."""
        header = self.header or {}
        if not self.num_records:
            self._end = len(MAGIC)
            with self.path.open("wb") as file:
                file.write(MAGIC)
            self._append(json.dumps(header, sort_keys=True, ensure_ascii=False).encode())
        metadata = metadata_of(header, tensors)
        self._append(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
        self.num_records += 1

    def pieces(self) -> Iterator[dict[str, torch.Tensor]]:
        """The groups of segments in order, one in memory at a time.

        Raises:
            ValueError: If a group does not read back.
        """
        if not self.num_records:
            return
        with self.path.open("rb") as file:
            file.seek(len(MAGIC))
            _read_record(file)
            for _ in range(self.num_records):
                payload = _read_record(file)
                if payload is None:
                    raise ValueError(f"`path`: {self.path} changed while it was read.")
                yield _parse_piece(payload, str(self.path))

    def _append(self, payload: bytes) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()

    def _recover(self) -> None:
        """Find the end of the last whole record; what lies behind it is overwritten by the next."""
        with self.path.open("rb") as file:
            start = file.read(len(MAGIC))
            # A crash can leave a file at its length before its content reached the disk: zeros.
            if not MAGIC.startswith(start.rstrip(b"\0")):
                raise ValueError(
                    f"`path`: {self.path} is no journal of `c3-hf compress`, it starts with {start!r}. Move it away."
                )
            header = _read_record(file) if start == MAGIC else None
            while header is not None and _read_record(file) is not None:
                self.header = read_header(header, str(self.path))
                self.num_records += 1
                self._end = file.tell()


def _read_record(file: IO[bytes]) -> bytes | None:
    head = file.read(_RECORD.size)
    if len(head) < _RECORD.size:
        return None
    size, checksum = _RECORD.unpack(head)
    # No payload is empty, but eight zero bytes, as a crash leaves them, would read as such a record.
    if not 0 < size <= os.fstat(file.fileno()).st_size - file.tell():
        return None
    payload = file.read(size)
    return payload if zlib.crc32(payload) == checksum else None


def _parse_piece(payload: bytes, name: str) -> dict[str, torch.Tensor]:
    # safetensors gives tensors only: the metadata stands in the JSON header at the front.
    size = struct.unpack_from("<Q", payload.ljust(8, b"\0"))[0]
    header = read_header(payload[8 : 8 + size], name)
    try:
        metadata = header.pop("__metadata__")
        check_declared(metadata, {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}, name)
        tensors = load(payload)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"`path`: {name} holds a group of segments that cannot be read ({error}).") from error
    return parse(metadata, tensors, name)[1]
