"""Checkpoints that are whole or not there: written beside their place and moved into it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


STAGING_FOLDER = ".saving"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; one that was being written when the run died is not here."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def publish_checkpoint(output_dir: str | Path, name: str, keep: int | None) -> Path:
    """Move checkpoint `name` from the staging folder into `output_dir`, then delete all but the newest `keep`."""
    target = Path(output_dir) / name
    staged = Path(output_dir) / STAGING_FOLDER / name
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)
    if keep is not None:
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return target
