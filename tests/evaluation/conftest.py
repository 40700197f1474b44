"""A small data folder in the layout of the real one, and a tiny checkpoint on disk."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest


def write_jsonl(path: Path, records: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def text_records(stem: str, texts: list[str], **extra) -> list[dict]:
    common = {"lang": "en", "kind": stem, "source": f"written for the test ({stem})", **extra}
    return [{"id": f"{stem}-{number}", "text": text, **common} for number, text in enumerate(texts)]


SENTENCE = "The lamp of the harbour went out before the last boat came in. "
HAYSTACK = "".join(f"Line {number} of the log speaks of rain. " for number in range(40))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Every file the tasks read, a few short records each."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("eval", "long"):
        (folder / name).mkdir()
    short = [SENTENCE, SENTENCE[:30], "雨下了一整夜。", "x", ""]
    for name, stem in (
        ("passages_en", "textbook"),
        ("passages_zh", "novel"),
        ("passages_short_en", "short_en"),
        ("passages_short_zh", "short_zh"),
        ("shuffled", "shuffled_words"),
        ("random", "random_hex"),
        ("code", "code_python"),
        ("tables", "table_csv"),
        ("json_logs", "log"),
        ("edge", "edge_empty"),
    ):
        extra = {} if name == "edge" else {"bin": "32-64"}
        write_jsonl(folder / "eval" / f"{name}.jsonl.gz", text_records(stem, short, **extra))
    for name, length in (("foxlike_en", 1234), ("en", 1)):
        page = {"image": "1.png", "len": length, "conversations": [{"value": "?"}, {"value": SENTENCE}]}
        (folder / "eval" / f"{name}_page_ocr.json").write_text(json.dumps([page]), encoding="utf-8")
    write_jsonl(folder / "long" / "books_and_code.jsonl.gz", text_records("book", [HAYSTACK], title="Log"))
    write_jsonl(folder / "long" / "needles.jsonl.gz", needle_records())
    documents = "\n\n".join(f"Document [{n}](Title: T{n}) Text {n}.\n\nSecond paragraph." for n in (1, 2))
    question = {"question": "Which text?", "answers": ["Text 2"]}
    write_jsonl(
        folder / "long" / "multidoc_qa.jsonl.gz",
        text_records("multidoc_qa", [documents], n_docs=2, gold_position=1, **question),
    )
    write_jsonl(folder / "long" / "kv_retrieval.jsonl.gz", text_records("kv_retrieval", ['{"a": "b"}'], **question))
    return folder


def needle_records() -> list[dict]:
    common = {"lang": "en", "haystack": "book-0", "source": "written for the test"}
    rows = [
        ("single", None, 0.5, "The code of Rome is 11.", "Code of Rome?", "11"),
        ("multi", "m0", 0.25, "The code of Oslo is 22.", "Code of Oslo?", "22"),
        ("multi", "m0", 0.75, "The code of Lima is 33.", "Code of Lima?", "33"),
        ("two_hop", "h0", 0.8, "The parcel went to Cork.", "Which door?", "44"),
        ("two_hop", "h0", 0.2, "Cork keeps things behind door 44.", "Which door?", "44"),
    ]
    keys = ("kind", "group", "depth", "text", "question", "answer")
    return [{"id": f"needle-{n}", **common, **dict(zip(keys, row))} for n, row in enumerate(rows)]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random C3 checkpoint with a byte tokenizer, saved as a user would."""
    # Here, because this file is imported before the root's conftest.py takes huggingface_hub off the network.
    import factories

    folder = tmp_path_factory.mktemp("tiny")
    factories.make_model().save_pretrained(folder)
    factories.make_processor().save_pretrained(folder)
    return folder
