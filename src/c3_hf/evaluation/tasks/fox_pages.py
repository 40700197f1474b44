"""Pages of the Fox benchmark (official `*_page_ocr.json`), and look-alike pages in its schema."""

from __future__ import annotations

import json
from pathlib import Path

from c3_hf.evaluation.items import RestoreItem
from c3_hf.evaluation.reading import length_bin
from c3_hf.evaluation.tokens import TokenMeter


SUFFIX = "_page_ocr.json"


def load(data_dir: Path, meter: TokenMeter) -> list[RestoreItem]:
    """One item for each page of every file `*_page_ocr.json` in `data_dir` or below, kind = the name before that.

    A page's bin is its length in tokens of the checkpoint, or the look-alikes' own `len`, which counts Qwen tokens;
    the official files' `len` counts words and is not used.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    paths = sorted(Path(data_dir).rglob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"`data_dir` {str(data_dir)!r} holds no file '*{SUFFIX}', which this task reads.")
    return [item for path in paths for item in _pages(path, meter)]


def _pages(path: Path, meter: TokenMeter) -> list[RestoreItem]:
    stem = path.name.removesuffix(SUFFIX)
    kind, _, lang = stem.rpartition("_")
    return [
        RestoreItem(
            id=f"{stem}/{page['image']}",
            kind=f"{kind or 'fox'}_{lang}",
            lang={"cn": "zh"}.get(lang, lang),
            source=path.name,
            bin=length_bin(page["len"] if kind else meter.count(page["conversations"][1]["value"])),
            segments=(page["conversations"][1]["value"],),
        )
        for page in json.loads(path.read_text(encoding="utf-8"))
    ]
