"""How well a model restores held-out text, by kind and compression ratio, and finds sentences and facts in it.

`python -m benchmarks.restoring_by_ratio --data-dir EVAL --output benchmarks/results/c3-tiny` writes `items.jsonl`
(one line an item: id, kind, ratio, lengths, SHA-256 of the text, character precision, accuracy by position),
`summary.json` (means and numbers of items) and `curve.png`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import c3_hf
from c3_hf.data.samples import cut_to_tokens
from c3_hf.evaluation.metrics.characters import char_precision
from c3_hf.evaluation.metrics.tokens import accuracy_by_position
from c3_hf.evaluation.plots import beside, draw_tenths
from c3_hf.evaluation.provenance import clean_commit, weights_fingerprint
from c3_hf.files import write_json
from c3_hf.pipeline import C3Pipeline

from .finding import measure_questions, measure_sentences
from .record import environment


# Name of the kind in the results, file, and kind and language in the file.
KINDS = (
    ("English fiction", "passages_en.jsonl.gz", "fiction", "en"),
    ("English textbook", "passages_en.jsonl.gz", "textbook", "en"),
    ("Chinese novel", "passages_zh.jsonl.gz", "vernacular_novel", "zh"),
    ("shuffled English words", "shuffled.jsonl.gz", "shuffled_words", "en"),
)
RATIOS = (2, 3, 4, 8, 12, 16, 20, 32)
BATCH_SIZE = 16
# Ratios above this take long to generate.
LONG = 4


class Item(NamedTuple):
    """One text to restore."""

    id: str
    kind: str
    ratio: int
    text: str


def held_out_items(data_dir: Path, processor: Any, ratios: list[int], limit: int | None) -> Iterator[Item]:
    """The first `ratio * num_latents` tokens of records that are long enough: of all, above `LONG` of `limit`."""
    for kind, *where in KINDS:
        records = list(held_out_records(data_dir, *where))
        for ratio in ratios:
            heads = [cut_to_tokens(processor.reader, r["text"], ratio * processor.num_latents) for r in records]
            pairs = [(record, head) for record, head in zip(records, heads) if len(head) < len(record["text"])]
            chosen = pairs[:limit] if ratio > LONG else pairs
            yield from (Item(record["id"], kind, ratio, head) for record, head in chosen)


def held_out_records(data_dir: Path, name: str, kind: str, lang: str) -> Iterator[dict[str, Any]]:
    """Records of one kind and language of a file."""
    with gzip.open(data_dir / name, "rt", encoding="utf-8") as lines:
        yield from (record for record in map(json.loads, lines) if (record["kind"], record["lang"]) == (kind, lang))


def texts_of(data_dir: Path, kind: tuple[str, ...]) -> list[str]:
    """Texts of one of `KINDS`."""
    return [record["text"] for record in held_out_records(data_dir, *kind[1:])]


def measure_restoring(model: Any, processor: Any, items: list[Item]) -> list[dict[str, Any]]:
    """Restore all items greedily, each ratio in batches."""
    rows = []
    groups = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    for group in tqdm(groups, unit="batch", disable=None):
        restored = C3Pipeline(model, processor).round_trip([item.text for item in group], batch_size=BATCH_SIZE)
        for item, text in zip(group, restored):
            wanted, got = (processor.tokenize_context(side) for side in (item.text, text))
            rows.append(
                {
                    "id": item.id,
                    "kind": item.kind,
                    "ratio": item.ratio,
                    "num_tokens": len(wanted),
                    "num_chars": len(item.text),
                    "sha256": hashlib.sha256(item.text.encode()).hexdigest(),
                    "restored_chars": len(text),
                    "char_precision": round(char_precision(text, item.text), 6),
                    "accuracy_by_position": accuracy_by_position(got, wanted),
                }
            )
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by kind and ratio."""
    table = []
    for kind, ratio in dict.fromkeys((row["kind"], row["ratio"]) for row in rows):
        cell = [row for row in rows if (row["kind"], row["ratio"]) == (kind, ratio)]
        precision = [row["char_precision"] for row in cell]
        places = np.array([row["accuracy_by_position"] for row in cell], dtype=float)
        table.append(
            {
                "kind": kind,
                "ratio": ratio,
                "num_items": len(cell),
                "char_precision": round(float(np.mean(precision)), 4),
                "lowest": min(precision),
                "exact": sum(value == 1 for value in precision),
                "accuracy_by_position": np.nanmean(places, axis=0).round(4).tolist(),
            }
        )
    return table


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Character precision at each ratio, the kinds side by side, and token accuracy along the text of the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ticks, kinds = sorted({row["ratio"] for row in table}), list(dict.fromkeys(row["kind"] for row in table))
    for number, kind in enumerate(kinds):
        cells = [row for row in table if row["kind"] == kind]
        # Between two ratios nobody measured: nothing joins them.
        places = [ticks.index(cell["ratio"]) + beside(number, len(kinds)) for cell in cells]
        left.plot(places, [c["char_precision"] for c in cells], linewidth=0, marker="osD^vPX"[number % 7], label=kind)
    left.set_xticks(range(len(ticks)), [f"{ratio}x" for ratio in ticks])
    left.set(xlabel="tokens for each latent", ylabel="character precision, free running", ylim=(0, 1.03))
    left.grid(axis="y", alpha=0.3)
    left.legend(loc="lower left")
    rows = [row for row in table if row["kind"] == kinds[0]]
    draw_tenths(right, [f"{row['ratio']}x" for row in rows], [row["accuracy_by_position"] for row in rows])
    right.set(xlabel="place in the text, percent; in the cells the percent of tokens that come back")
    right.set_title(f"{kinds[0]}, by tokens for each latent", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=c3_hf.tiny_model_path(), help="checkpoint (default: c3-tiny)")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the held-out files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--ratios", type=int, nargs="+", help=f"default: those of {RATIOS} that the model has room for"
    )
    parser.add_argument("--limit", type=int, help=f"most items of a kind above {LONG}x (default: all)")
    parser.add_argument("--questions", type=int, default=200, help="generated questions to ask (default: 200)")
    parser.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    arguments = parser.parse_args()
    commit = clean_commit(arguments.allow_changes)
    model = c3_hf.C3ForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = c3_hf.C3Processor.from_pretrained(arguments.model)
    room = C3Pipeline(model, processor).segment_room
    ratios = arguments.ratios or [ratio for ratio in RATIOS if ratio * processor.num_latents <= room]
    items = list(held_out_items(arguments.data_dir, processor, ratios, arguments.limit))
    rows = measure_restoring(model, processor, items)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "items.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    summary = {
        "commit": commit,
        "weights": weights_fingerprint(model),
        "dtype": "float32",
        "decoding": "greedy, one block of latents a text",
        "restoring": summarise(rows),
        "answering": measure_questions(model, processor, texts_of(arguments.data_dir, KINDS[0]), arguments.questions),
        # Shuffled words have no sentences.
        "going_on": [
            {"kind": kind[0], **measure_sentences(model, processor, texts_of(arguments.data_dir, kind))}
            for kind in KINDS[:3]
        ],
        "environment": environment(torch.device("cpu")),
    }
    write_json(arguments.output / "summary.json", summary)
    draw(summary["restoring"], arguments.output / "curve.png")
    for row in summary["restoring"]:
        print(f"{row['kind']:24s} {row['ratio']:3d}x  n={row['num_items']:3d}  {row['char_precision']:.4f}")
    print(f"questions {summary['answering']}\nsentences {summary['going_on']}")


if __name__ == "__main__":
    main()
