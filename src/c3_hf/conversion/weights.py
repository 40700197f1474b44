"""Weights on disk, read and written piece by piece, so that memory does not grow with the size of a tensor.

`safetensors.torch.load_file` maps whole files and `save_file` wants all tensors of a shard at once. Here a tensor is a
place in a file, read through a small buffer; a written file is byte for byte what `save_file` writes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from c3_hf.files import parse_size, read_json_object, safetensors_header, write_json


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A multiple of every item size, so that no number is split between two pieces.
PIECE_BYTES = 4 * 2**20

# In the order in which the safetensors library lays tensors of different types into a file.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# transformers 4.57's own default; engines and file systems cope with it.
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: where its bytes are and how to read them.

    Attributes:
        start: offset of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def read_pieces(self) -> Iterator[torch.Tensor]:
        """Yield the values as 1-D tensors of at most 4 MiB, in storage order. A piece is overwritten by the next."""
        buffer = bytearray(min(self.num_bytes, PIECE_BYTES))
        with self.path.open("rb") as file:
            file.seek(self.start)
            remaining = self.num_bytes
            while remaining:
                size = min(remaining, PIECE_BYTES)
                view = memoryview(buffer)[:size]
                if file.readinto(view) < size:
                    raise ValueError(
                        f"{self.path} ended early while it was read; it changed after the conversion began."
                    )
                yield torch.frombuffer(view, dtype=self.dtype)
                remaining -= size


def read_header(path: str | Path) -> list[StoredTensor]:
    """List the tensors of one safetensors file, in storage order.

    Raises:
        ValueError: if the file is damaged or cut short, or holds a tensor of a type that models do not use.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}). Its download was probably cut short; delete it and "
            "download it again."
        ) from error
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has type {entry['dtype']}, expected one of {', '.join(DTYPES)}. Quantised "
                "checkpoints cannot be converted; convert the unquantised one and quantise on loading."
            )
        start = 8 + header_bytes + entry["data_offsets"][0]
        tensors.append(StoredTensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, start))
    return sorted(tensors, key=lambda tensor: tensor.start)


def list_tensors(folder: str | Path) -> list[StoredTensor]:
    """List the tensors of a checkpoint folder: `model.safetensors`, else the files of its index, else all there are.

    Raises:
        FileNotFoundError: if there is no safetensors file, or the index names one that is absent.
        ValueError: if the index is damaged, files and index disagree, or a tensor is in two files.
    """
    folder = Path(folder)
    index_path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not index_path.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no *.safetensors file. Give a folder with safetensors weights; other formats (.bin, "
                ".pt) are not read."
            )
        return _without_twins([tensor for path in paths for tensor in read_header(path)])
    weight_map = _read_weight_map(index_path)
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index_path} names files that are absent: {', '.join(absent)}. The download is incomplete; resume it."
        )
    tensors = _without_twins([tensor for name in files for tensor in read_header(folder / name)])
    found = {tensor.name: tensor.path.name for tensor in tensors}
    wrong = sorted(name for name in weight_map.keys() | found.keys() if weight_map.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{index_path} and its files disagree about {len(wrong)} tensors: {', '.join(wrong[:10])}. Files of two "
            "different checkpoints are mixed; download the folder again."
        )
    return tensors


def write_file(
    path: str | Path,
    tensors: Iterable[tuple[str, torch.dtype, StoredTensor]],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write one safetensors file from stored tensors, casting on the way.

    Args:
        tensors: new name, new dtype and source of each tensor.
        on_bytes: called with the number of bytes read, after each piece.
    """
    layout_order = list(DTYPES.values())
    order = sorted(tensors, key=lambda item: (layout_order.index(item[1]), item[0]))
    names = {dtype: kind for kind, dtype in DTYPES.items()}
    shapes = {name: (names[dtype], source.shape) for name, dtype, source in order}
    with Path(path).open("wb") as file:
        file.write(safetensors_header({"format": "pt"}, shapes))
        for _, dtype, source in order:
            for piece in source.read_pieces():
                file.write(as_bytes(piece.to(dtype)))
                if on_bytes is not None:
                    on_bytes(len(as_bytes(piece)))


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of shape (n,), without a copy."""
    return memoryview(values.view(torch.uint8).numpy())


def load_tensor(tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor whole."""
    with safe_open(tensor.path, framework="pt") as file:
        return file.get_tensor(tensor.name)


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: `weight_map` is {repr(weight_map)[:60]}, expected an object with the file of each tensor. "
            "Download the index again."
        )
    for name, file in weight_map.items():
        # A name that leads out of the folder is no shard of this checkpoint.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: `weight_map` gives {repr(file)[:60]} for {name}, expected the name of a .safetensors file "
                "in the same folder. Download the index again."
            )
    return weight_map


def _without_twins(tensors: list[StoredTensor]) -> list[StoredTensor]:
    files: dict[str, Path] = {}
    for tensor in tensors:
        if tensor.name in files:
            raise ValueError(
                f"tensor {tensor.name} is in two files, {files[tensor.name]} and {tensor.path}. Remove the files that "
                f"do not belong to the checkpoint, or restore its {INDEX_FILE}."
            )
        files[tensor.name] = tensor.path
    return tensors


@dataclass(frozen=True)
class Digest:
    """SHA-256 of a tensor's bytes, as stored (`stored`) and as written after a cast (`written`)."""

    stored: str
    written: str


def output_dtype(stored: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """The type a tensor is written in: the requested one for floating-point tensors, else its own."""
    return requested if requested is not None and stored.is_floating_point else stored


def scan_weights(sources: dict[str, StoredTensor], dtype: torch.dtype | None = None) -> dict[str, Digest]:
    """Read every value once: find what is not finite, and hash the rest.

    Args:
        dtype: the type the tensors will be cast to; None keeps each one's own.

    Returns:
        Target name to digest.

    Raises:
        ValueError: if a tensor holds NaN or infinite values, as stored or after the cast; all are named, with counts.
    """
    problems: list[str] = []
    digests = {}
    with _byte_bar("checking weights", sources) as bar:
        for target, source in sources.items():
            written_dtype = output_dtype(source.dtype, dtype)
            stored_hash, written_hash = hashlib.sha256(), hashlib.sha256()
            bad_stored = bad_written = 0
            for piece in source.read_pieces():
                stored_hash.update(as_bytes(piece))
                bad_stored += _count_non_finite(piece)
                if written_dtype != source.dtype:
                    cast = piece.to(written_dtype)
                    written_hash.update(as_bytes(cast))
                    bad_written += _count_non_finite(cast)
                bar.update(len(as_bytes(piece)))
            where = f"{source.name} ({source.path.name})"
            if bad_stored:
                problems.append(f"non-finite: {where}, {bad_stored} of {source.num_elements} values NaN or infinite")
            elif bad_written:
                problems.append(f"overflow: {where}, {bad_written} values do not fit into {written_dtype}")
            stored = stored_hash.hexdigest()
            digests[target] = Digest(stored, stored if written_dtype == source.dtype else written_hash.hexdigest())
    raise_problems("the weights are damaged or do not fit the requested type", problems)
    return digests


def write_shards(
    folder: Path,
    sources: dict[str, StoredTensor],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> list[str]:
    """Write `sources` as `model.safetensors`, or as numbered shards with their index, piece by piece.

    Args:
        sources: target name to stored tensor, written in this order.
        dtype: type to cast floating-point tensors to; None keeps each one's own.
        max_shard_size: largest file, in bytes or as "5GB" (10**9), "500MB" (10**6), "1GiB" (2**30). A tensor that is
            larger gets a file of its own.

    Returns:
        The names of the files.
    """
    meta = {
        target: torch.empty(source.shape, dtype=output_dtype(source.dtype, dtype), device="meta")
        for target, source in sources.items()
    }
    split = split_torch_state_dict_into_shards(meta, max_shard_size=shard_size(max_shard_size))
    with _byte_bar("writing weights", sources) as bar:
        for file_name, targets in split.filename_to_tensors.items():
            write_file(
                folder / file_name,
                [(target, meta[target].dtype, sources[target]) for target in targets],
                on_bytes=bar.update,
            )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / INDEX_FILE, index)
    return list(split.filename_to_tensors)


def shard_size(size: int | str) -> int:
    """A number of bytes from an int or from text, see [`parse_size`].

    Raises:
        ValueError: if it is not a positive size.
    """
    value = parse_size(size) if isinstance(size, str) else int(size)
    if value < 1:
        raise ValueError(f"`max_shard_size` must be a number of bytes or text such as '5GB' or '500MB', got {size!r}.")
    return value


def _count_non_finite(values: torch.Tensor) -> int:
    finite = torch.isfinite(values)
    # The sum makes a copy of eight bytes a value: only where there is something to count.
    return 0 if bool(finite.all()) else values.numel() - int(finite.sum())


def _byte_bar(title: str, sources: dict[str, StoredTensor]) -> tqdm:
    total = sum(source.num_bytes for source in sources.values())
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None)


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise a ValueError that lists `problems`, if there are any."""
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{what}; nothing was written:\n  {lines}")
