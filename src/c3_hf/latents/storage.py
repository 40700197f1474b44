"""The file of a compressed context: plain safetensors with a versioned header; see docs/latent_format.md.

Everything here works on a header (a dictionary that JSON can hold) and a dictionary of tensors. What the tensors mean
is [`CompressedContext`]'s business; how they lie in the file, and how damage is noticed, is decided here.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .output import atomic_file


FORMAT = "c3-context"
FORMAT_VERSION = 1

# Tensors in the order of the file: wide numbers first, so that each starts at a multiple of its item size.
OFFSETS = ("char_offsets", "byte_offsets", "token_offsets")
OPTIONAL = ("residual_offsets", "latent_scales", "margins", "residual")
# Small, read whole and covered by the checksum in the header; the rest is mapped and covered by `checksums`.
INDEX = (*OFFSETS, "residual_offsets", "checksums")
ORDER = (*INDEX, "latent_scales", "latents", "margins", "digests", "residual")
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(INDEX, (torch.int64,)),
    "latent_scales": (torch.float32,),
    "latents": (torch.float32, torch.bfloat16, torch.int8),
    "margins": (torch.float16,),
    "digests": (torch.uint8,),
    "residual": (torch.uint8,),
}
_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}

Tensors = Mapping[str, torch.Tensor]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a CPU tensor, little-endian as safetensors wants it, row by row."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def write_file(path: str | os.PathLike, header: dict[str, Any], pieces: Callable[[], Iterable[Tensors]]) -> None:
    """Write the pieces of a context, one after the other, as one file; the file appears whole or not at all.

    Args:
        path: Where to.
        header: What the metadata entry `context` shall hold.
        pieces: Gives the pieces, anew at each call: they are gone through once for the small tensors and once for
            each large one, so that no more than one piece is in memory.

    Raises:
        ValueError: If there is no piece.
    """
    index, shapes = _join_index(pieces())
    metadata = _metadata(header, index)
    with atomic_file(path) as file:
        file.write(_safetensors_header(metadata, shapes))
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
    """
    try:
        with _readable_name(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
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


def parse(
    metadata: Mapping[str, str], tensors: dict[str, torch.Tensor], name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Check what a file (or a record of a journal) holds, and give its header and tensors.

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
    _check_tensors(tensors, name)
    index = {key: tensors[key] for key in INDEX if key in tensors}
    if metadata.get("crc32") != _index_checksum(metadata.get("context", ""), index):
        raise ValueError(f"`path`: the header of {name} is damaged (its checksum differs). Compress the text again.")
    return json.loads(metadata["context"]), tensors


def segment_checksums(tensors: Tensors) -> torch.Tensor:
    """CRC-32 of each segment's rows of `latents`, `latent_scales`, `margins`, `residual` and `digests`, in this order.

    Returns:
        `(num_segments,)` int64.
    """
    sums = []
    tokens = tensors["token_offsets"] - tensors["token_offsets"][0]
    for segment in range(len(tensors["latents"])):
        checksum = zlib.crc32(tensor_bytes(tensors["latents"][segment]))
        if "latent_scales" in tensors:
            checksum = zlib.crc32(tensor_bytes(tensors["latent_scales"][segment]), checksum)
        if "margins" in tensors:
            start, end = int(tokens[segment]) + segment, int(tokens[segment + 1]) + segment + 1
            checksum = zlib.crc32(tensor_bytes(tensors["margins"][start:end]), checksum)
        if "residual" in tensors:
            start, end = (int(offset) for offset in tensors["residual_offsets"][segment : segment + 2])
            checksum = zlib.crc32(tensor_bytes(tensors["residual"][start:end]), checksum)
        sums.append(zlib.crc32(tensor_bytes(tensors["digests"][segment]), checksum))
    return torch.tensor(sums, dtype=torch.int64)


def join_index(pieces: Iterable[Tensors]) -> dict[str, torch.Tensor]:
    """The small tensors of pieces put one behind the other; offsets go on where the piece before ends."""
    return _join_index(pieces)[0]


def metadata_of(header: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """The metadata entries of a file that holds `tensors`."""
    return _metadata(header, {name: tensors[name] for name in INDEX if name in tensors})


def _join_index(pieces: Iterable[Tensors]) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, list[int]]]]:
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


def _metadata(header: dict[str, Any], index: Tensors) -> dict[str, str]:
    context = json.dumps(header, sort_keys=True, ensure_ascii=False)
    return {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "context": context,
        "crc32": _index_checksum(context, index),
    }


def _index_checksum(context: str, index: Tensors) -> str:
    checksum = zlib.crc32(context.encode())
    for name in INDEX:
        if name in index:
            checksum = zlib.crc32(tensor_bytes(index[name]), checksum)
    return f"{checksum:08x}"


def _safetensors_header(metadata: dict[str, str], shapes: dict[str, tuple[str, list[int]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    sizes = {name: dtype.itemsize for dtype, name in _NAMES.items()}
    for name, (kind, shape) in shapes.items():
        size = sizes[kind]
        for length in shape:
            size *= length
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _check_tensors(tensors: Tensors, name: str) -> None:
    """Refuse tensors that are missing, unknown, of another type, or do not fit together."""
    unknown = sorted(set(tensors) - set(ORDER))
    missing = [key for key in ORDER if key not in tensors and key not in OPTIONAL]
    if unknown or missing:
        raise ValueError(f"`path`: {name} is damaged: it lacks tensors {missing} or has unknown ones {unknown}.")
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES[key]:
            raise ValueError(f"`path`: tensor `{key}` of {name} has dtype {tensor.dtype}: the file is damaged.")
    for reason in _contradictions(tensors):
        raise ValueError(f"`path`: {name} contradicts itself ({reason}): it is damaged.")


def _contradictions(tensors: Tensors) -> Iterator[str]:
    latents = tensors["latents"]
    if latents.dim() != 3:
        yield f"`latents` has {latents.dim()} dimensions instead of 3"
        return
    count = len(latents)
    lengths = {**dict.fromkeys(OFFSETS, count + 1), "checksums": count, "digests": count, "latent_scales": count}
    lengths["residual_offsets"] = count + 1
    for key, length in lengths.items():
        if key in tensors and len(tensors[key]) != length:
            yield f"`{key}` has {len(tensors[key])} rows for {count} segments"
            return
    if ("latent_scales" in tensors) != (latents.dtype == torch.int8):
        yield "`latent_scales` goes with int8 latents and with nothing else"
    if ("residual" in tensors) != ("residual_offsets" in tensors):
        yield "`residual` and `residual_offsets` come together"
        return
    if any((tensors[key].diff() < 0).any() for key in (*OFFSETS, "residual_offsets") if key in tensors):
        yield "offsets go backwards"
    tokens = int(tensors["token_offsets"][-1] - tensors["token_offsets"][0])
    if "margins" in tensors and len(tensors["margins"]) != tokens + count:
        yield f"`margins` has {len(tensors['margins'])} entries for {tokens} tokens in {count} segments"
    if "residual" in tensors and len(tensors["residual"]) != int(tensors["residual_offsets"][-1]):
        yield f"`residual` has {len(tensors['residual'])} bytes, its offsets end elsewhere"
