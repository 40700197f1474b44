"""Where a conversion reads from: a local folder or a Hub repository in the released layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from c3_hf.conversion.checkpoint import StoredTensor, list_tensors


ENCODER_FOLDER = "llm1"
# What a conversion reads. Optimizer states, pickles and the original's Python files stay where they are.
READ_PATTERNS = ("*.safetensors", "*.json", "*.tiktoken", "*.jinja", "merges.txt", "README.md")


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint in the released layout, headers only.

    Attributes:
        name: what the user gave: a path or a Hub id.
        revision: the commit that was downloaded; None for a local folder.
        folder: where the files are.
        main_config: contents of `config.json`.
        encoder_config: contents of `llm1/config.json`.
        main_tensors: tensors of the main folder.
        encoder_tensors: tensors of `llm1`; empty if the main folder holds the encoder too.
    """

    name: str
    revision: str | None
    folder: Path
    main_config: dict
    encoder_config: dict
    main_tensors: list[StoredTensor]
    encoder_tensors: list[StoredTensor]


def fetch_folder(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Find a folder, downloading it if `name` is a Hub id. An interrupted download resumes.

    Args:
        name: an existing folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.
        token: access token for private repositories.
        cache_dir: where downloads are kept; the Hub cache if None.
        local_files_only: take what is in the cache and never ask the Hub.

    Returns:
        The folder, and the commit it holds (None for a local folder).

    Raises:
        FileNotFoundError: if `name` is neither a folder nor shaped like a Hub id.
    """
    if Path(name).is_dir():
        return Path(name), None
    if Path(name).is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise FileNotFoundError(
            f"{name} is no folder, and no Hub id of the form 'owner/name' either. Check the path, or give the id."
        )
    folder = Path(
        snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[*READ_PATTERNS, *(f"{ENCODER_FOLDER}/{pattern}" for pattern in READ_PATTERNS)],
        )
    )
    return folder, folder.name


def open_released_checkpoint(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> ReleasedCheckpoint:
    """Open a checkpoint in the released layout; the arguments are those of [`fetch_folder`].

    Raises:
        FileNotFoundError: if the folder, one of its two `config.json` or its weights are absent.
        ValueError: if it is not in the released layout, or a weight file is damaged.
    """
    folder, commit = fetch_folder(name, revision, token, cache_dir, local_files_only)
    main_config = read_json(folder / "config.json")
    if "latent_token_len" not in main_config:
        raise ValueError(
            f"{folder}/config.json has no `latent_token_len` (model_type {main_config.get('model_type')!r}), so it is "
            "not a checkpoint in the released C3 layout. A folder that this package wrote needs no conversion."
        )
    encoder_folder = folder / ENCODER_FOLDER
    encoder_config = read_json(encoder_folder / "config.json")
    main_tensors = list_tensors(folder)
    whole = any(tensor.name.startswith(f"model.{ENCODER_FOLDER}.") for tensor in main_tensors)
    encoder_tensors = [] if whole else list_tensors(encoder_folder)
    return ReleasedCheckpoint(str(name), commit, folder, main_config, encoder_config, main_tensors, encoder_tensors)


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: if the file is absent.
        ValueError: if it holds no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent. The folder is incomplete, or not in the layout expected here.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object. Download it again.")
    return content
