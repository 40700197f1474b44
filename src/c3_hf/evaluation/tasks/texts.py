"""Whole texts to restore, each in one segment: the kinds that ship as data files, by task."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from c3_hf.evaluation.items import RestoreItem, TokenMeter, read_lines


# What each task reads, `NAME.jsonl` or `NAME.jsonl.gz`.
FILES = {
    # Plain passages of 600 to 1,300 Qwen tokens, English and Chinese, in the paper's 100-token bins.
    "passages": ("passages_en", "passages_zh"),
    # The passages' documents at 32 to 512 Qwen tokens, in bins that double.
    "short_passages": ("passages_short_en", "passages_short_zh"),
    # Their words or characters shuffled: what language modelling alone cannot guess.
    "shuffled": ("shuffled",),
    # Random letters, digits, hexadecimal, base64, UUIDs and Han characters: the hardest text there is.
    "random_strings": ("random",),
    # Python, C and JavaScript.
    "code": ("code",),
    # CSV, TSV, Markdown and HTML.
    "tables": ("tables",),
    # JSON documents and log files.
    "json_logs": ("json_logs",),
    # Texts that break things: special-token spellings, control characters, emoji, one character, repeats.
    "edge_cases": ("edge",),
}


def load(data: Path, meter: TokenMeter, files: tuple[str, ...]) -> list[RestoreItem]:
    """One item for each record of `files`, the text in one segment.

    The kind is the record's; the bin is the record's `bin` (Qwen tokens), empty where it has none.
    """
    lines = (line for name in files for line in read_lines(data, f"{name}.jsonl.gz"))
    return [RestoreItem(**line.labels(), segments=(line.text("text"),)) for line in lines]


TASKS = {name: partial(load, files=files) for name, files in FILES.items()}
