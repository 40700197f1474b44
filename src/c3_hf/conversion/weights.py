"""The two passes over the weights: read and check every value, then write the shards."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from c3_hf.conversion.checkpoint import INDEX_FILE, PIECE_BYTES, StoredTensor, as_bytes, write_file
from c3_hf.conversion.plan import raise_problems


# transformers 4.57's own default; engines and file systems cope with it.
DEFAULT_SHARD_SIZE = "5GB"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
        sources: target name to stored tensor.
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
        folder: an existing folder.
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
    split = split_torch_state_dict_into_shards(meta, max_shard_size=parse_size(max_shard_size))
    with _byte_bar("writing weights", sources) as bar:
        for file_name, targets in split.filename_to_tensors.items():
            write_file(
                folder / file_name,
                [(target, meta[target].dtype, sources[target]) for target in targets],
                on_bytes=bar.update,
            )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(split.filename_to_tensors)


def parse_size(size: int | str) -> int:
    """A number of bytes from an int or from text such as "5GB", "500MB", "1GiB".

    Raises:
        ValueError: if it is not a positive size in that form.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", size, flags=re.IGNORECASE)
        value = int(float(match[1]) * _SIZE_UNITS[match[2].upper()]) if match else 0
    else:
        value = int(size)
    if value < 1:
        raise ValueError(f"`max_shard_size` must be a number of bytes or text such as '5GB' or '500MB', got {size!r}.")
    return value


def hash_files(paths: list[Path], root: Path) -> dict[str, str]:
    """SHA-256 of whole files, by their paths below `root`."""
    digests = {}
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc="hashing files", unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(PIECE_BYTES):
                    digest.update(block)
                    bar.update(len(block))
            digests[path.relative_to(root).as_posix()] = digest.hexdigest()
    return digests


def _count_non_finite(values: torch.Tensor) -> int:
    finite = torch.isfinite(values)
    # The sum makes a copy of eight bytes a value: only where there is something to count.
    return 0 if bool(finite.all()) else values.numel() - int(finite.sum())


def _byte_bar(title: str, sources: dict[str, StoredTensor]) -> tqdm:
    total = sum(source.num_bytes for source in sources.values())
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None)
