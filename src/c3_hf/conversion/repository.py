"""The files of a C3 repository beside its weights: code, configuration, and the folder that appears all at once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from c3_hf import modeling


MODEL_CLASS = "C3ForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_c3.C3Config",
    "AutoModel": f"modeling_c3.{MODEL_CLASS}",
    "AutoModelForCausalLM": f"modeling_c3.{MODEL_CLASS}",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_c3.C3Processor"}


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written.

    Yields a temporary folder beside `output`. At the end of the block it is renamed to `output`; if the block fails it
    is removed. A process that is killed leaves only the temporary folder, whose name begins with a dot.

    Args:
        output: the folder to make; it must not exist, or be empty.

    Raises:
        ValueError: if `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` {output} exists and is not an empty folder. Remove it, or give another name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"))
    try:
        yield temporary
        _make_readable(temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def code_files() -> list[Path]:
    """The remote-code files: the modules of `c3_hf.modeling` whose names end in `_c3.py`."""
    return sorted(Path(modeling.__file__).parent.glob("*_c3.py"))


def copy_code(folder: Path) -> None:
    """Copy the remote-code files, byte for byte."""
    for path in code_files():
        shutil.copyfile(path, folder / path.name)


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON, all at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _make_readable(folder: Path) -> None:
    """Give a folder and its files the modes that new ones get; temporary folders begin as the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
