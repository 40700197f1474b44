"""Pages of the Fox benchmark (official `*_page_ocr.json`), and look-alike pages in its schema."""

from __future__ import annotations

from pathlib import Path

from c3_hf.evaluation.items import DataLine, RestoreItem, TokenMeter
from c3_hf.files import read_json


SUFFIX = "_page_ocr.json"


def load(data: Path, meter: TokenMeter) -> list[RestoreItem]:
    """One item for each page of every file `*_page_ocr.json` in `data` or below, kind = the name before that.

    A page's bin is its length in tokens of the checkpoint, or the look-alikes' own `len`, which counts Qwen tokens;
    the official files' `len` counts words and is not used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file or a page is not as the benchmark has it.
    """
    paths = sorted(Path(data).rglob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"`data_dir` {str(data)!r} holds no file '*{SUFFIX}', which this task reads.")
    return [item for path in paths for item in _pages(path, meter)]


def _pages(path: Path, meter: TokenMeter) -> list[RestoreItem]:
    stem = path.name.removesuffix(SUFFIX)
    kind, _, lang = stem.rpartition("_")
    items = []
    for number, page in enumerate(_read(path), 1):
        line = DataLine(page if isinstance(page, dict) else {}, f"{path} page {number}")
        turns = line.get("conversations", list)
        reply = turns[1] if len(turns) > 1 and isinstance(turns[1], dict) else {}
        text = DataLine(reply, f"{line.where}, second turn,").text("value")
        items.append(
            RestoreItem(
                id=f"{stem}/{line.text('image')}",
                kind=f"{kind or 'fox'}_{lang}",
                lang={"cn": "zh"}.get(lang, lang),
                source=path.name,
                bin=length_bin(line.get("len", int) if kind else meter.count(text)),
                segments=(text,),
            )
        )
    return items


def _read(path: Path) -> list:
    pages = read_json(path)
    if not isinstance(pages, list):
        raise ValueError(f"`{path}` holds a JSON {type(pages).__name__}, expected a list of pages.")
    return pages


def length_bin(num_tokens: int) -> str:
    """The 100-token bin of the paper's Fig. 1 that `num_tokens` falls into, such as `"600-700"`."""
    low = num_tokens // 100 * 100
    return f"{low}-{low + 100}"


TASKS = {"fox_pages": load}
