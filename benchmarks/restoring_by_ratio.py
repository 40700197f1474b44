"""How well a model restores held-out text from one block, by kind and compression ratio, and finds facts in it.

`python -m benchmarks.restoring_by_ratio --data-dir EVAL --output benchmarks/results/c3-tiny` writes `items.jsonl`
(one line an item: id, kind, ratio, lengths, SHA-256 of the text, character precision, whether it came back whole, its
token accuracy teacher-forced and free running, accuracy by position), `summary.json` (means, with 95 % bootstrap
intervals) and `curve.png`. `--model` and another `--output` measure the same of a second training.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import c3_hf
from c3_hf.data.samples import cut_to_tokens
from c3_hf.data.text_kinds import Draw, random_tokens
from c3_hf.evaluation.metrics.characters import char_precision
from c3_hf.evaluation.metrics.tokens import accuracy_by_position, token_accuracy
from c3_hf.evaluation.plots import beside, draw_tenths
from c3_hf.evaluation.provenance import clean_commit, weights_fingerprint
from c3_hf.evaluation.records import bootstrap_interval
from c3_hf.files import write_json
from c3_hf.pipeline import C3Pipeline

from .finding import PROSE_TOKENS, measure_places, measure_questions
from .latents_setup import restore_blocks
from .record import environment


# Name of the kind in the results, file, and kind and language in the file.
KINDS = (
    ("English fiction", "passages_en.jsonl.gz", "fiction", "en"),
    ("English textbook", "passages_en.jsonl.gz", "textbook", "en"),
    ("Chinese novel", "passages_zh.jsonl.gz", "vernacular_novel", "zh"),
    ("shuffled English words", "shuffled.jsonl.gz", "shuffled_words", "en"),
    ("code", "code.jsonl.gz", None, "code"),
    ("tables", "tables.jsonl.gz", None, "table"),
)
# Not in a file: tokens drawn evenly from the vocabulary.
RANDOM = "random tokens"
RATIOS = (2, 4, 8, 16, 20, 40)
# Places are asked for in texts of these kinds, with few tokens a latent: above two c3-tiny was not trained on them.
ASKED_KINDS = (KINDS[0], KINDS[2], KINDS[3])
ASKED_RATIOS = (1, 2, 4, 8)
BATCH_SIZE = 16
MEANS = ("char_precision", "exact", "teacher_forced", "free_running")


class Item(NamedTuple):
    """One text to restore."""

    id: str
    kind: str
    ratio: int
    text: str


def held_out_items(data_dir: Path, processor: Any, ratios: Sequence[int], limit: int) -> Iterator[Item]:
    """At most `limit` texts of `ratio * num_latents` tokens of each kind: the beginnings of documents first."""
    for kind, *where in KINDS:
        records = list(held_out_records(data_dir, *where))
        for ratio in ratios:
            pieces = islice(pieces_of(records, processor, ratio * processor.num_latents), limit)
            yield from (Item(name, kind, ratio, text) for name, text in pieces)
    for ratio in ratios:
        length = ratio * processor.num_latents
        for number in range(limit):
            # Tokens that are no whole characters drop out, and others join when they are read again.
            draw = Draw(np.random.default_rng((ratio, number)), "", 2 * length, processor.tokenizer)
            text = cut_to_tokens(processor.encoder_reader, random_tokens(draw), length)
            yield Item(f"random-{ratio}-{number}", RANDOM, ratio, text)


def pieces_of(records: Sequence[dict[str, Any]], processor: Any, length: int) -> Iterator[tuple[str, str]]:
    """Names and texts of the first pieces of `length` tokens of all records, of the second ones, and so on.

    When they are used up, those follow that begin half a piece further on.
    """
    reader, half = processor.encoder_reader, length // 2
    texts = [(record["id"], record["text"]) for record in records]
    yield from pieces_in_turn(texts, reader, length)
    further = [(f"{name}+{half}", text[len(cut_to_tokens(reader, text, half)) :]) for name, text in texts]
    yield from pieces_in_turn(further, reader, length)


def pieces_in_turn(left: list[tuple[str, str]], reader: Any, length: int) -> Iterator[tuple[str, str]]:
    """Names and texts of the first pieces of all named texts, of the second ones, and so on; no text's last one."""
    number = 0
    while left:
        cut = [(name, text, cut_to_tokens(reader, text, length)) for name, text in left]
        cut = [(name, text, piece) for name, text, piece in cut if 0 < len(piece) < len(text)]
        yield from ((f"{name}/{number}" if number else name, piece) for name, _, piece in cut)
        left, number = [(name, text[len(piece) :]) for name, text, piece in cut], number + 1


def held_out_records(data_dir: Path, name: str, kind: str | None, lang: str) -> Iterator[dict[str, Any]]:
    """Records of one kind (or of all) and language of a file."""
    with gzip.open(data_dir / name, "rt", encoding="utf-8") as lines:
        yield from (
            record for record in map(json.loads, lines) if kind in (None, record["kind"]) and record["lang"] == lang
        )


def texts_of(data_dir: Path, kind: tuple[str | None, ...]) -> list[str]:
    """Texts of one of `KINDS`."""
    return [record["text"] for record in held_out_records(data_dir, *kind[1:])]


def measure_restoring(pipe: C3Pipeline, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Restore all items greedily, each ratio in batches."""
    rows = []
    groups = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    read = pipe.processor.tokenize_context
    for group in tqdm(groups, unit="batch", disable=None):
        for item, block in zip(group, restore_blocks(pipe, [read(item.text) for item in group])):
            rows.append(
                {
                    "id": item.id,
                    "kind": item.kind,
                    "ratio": item.ratio,
                    "num_tokens": len(block.token_ids),
                    "num_chars": len(item.text),
                    "sha256": hashlib.sha256(item.text.encode()).hexdigest(),
                    "restored_chars": len(block.text),
                    "char_precision": round(char_precision(block.text, item.text), 6),
                    "exact": block.text == item.text,
                    "teacher_forced": round(float((block.margins[:-1] > 0).float().mean()), 6),
                    "free_running": round(token_accuracy(block.new_ids, block.token_ids), 6),
                    "accuracy_by_position": accuracy_by_position(block.new_ids, block.token_ids),
                }
            )
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by kind and ratio; those of `MEANS` with their intervals."""
    table = []
    for kind, ratio in dict.fromkeys((row["kind"], row["ratio"]) for row in rows):
        cell = [row for row in rows if (row["kind"], row["ratio"]) == (kind, ratio)]
        places = np.array([row["accuracy_by_position"] for row in cell], dtype=float)
        table.append(
            {
                "kind": kind,
                "ratio": ratio,
                "num_items": len(cell),
                "characters_a_latent": round(
                    sum(r["num_chars"] / r["num_tokens"] for r in cell) / len(cell) * ratio, 2
                ),
                **{name: round(float(np.mean([row[name] for row in cell])), 4) for name in MEANS},
                "intervals": {
                    name: [round(end, 4) for end in bootstrap_interval([row[name] for row in cell])] for name in MEANS
                },
                "lowest": min(row["char_precision"] for row in cell),
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
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS))
    parser.add_argument("--limit", type=int, default=40, help="most items of a kind and ratio (default: 40)")
    parser.add_argument("--places", type=int, default=100, help="places of a kind and ratio to ask for (default: 100)")
    parser.add_argument(
        "--questions", type=int, default=200, help="generated questions to ask of each length (default: 200)"
    )
    parser.add_argument("--allow-changes", action="store_true", help="record from a checkout with changes")
    arguments = parser.parse_args()
    commit = clean_commit(arguments.allow_changes)
    pipe = C3Pipeline.from_pretrained(arguments.model, dtype="float32")
    items = list(held_out_items(arguments.data_dir, pipe.processor, arguments.ratios, arguments.limit))
    rows = measure_restoring(pipe, items)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "items.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    summary = {
        "commit": commit,
        "weights": weights_fingerprint(pipe.model),
        "dtype": "float32",
        "decoding": "greedy, one block of latents a text",
        "restoring": summarise(rows),
        **(finding(pipe, arguments) if "find" in pipe.processor.prompts else {}),
        "environment": environment(torch.device("cpu")),
    }
    write_json(arguments.output / "summary.json", summary)
    draw(summary["restoring"], arguments.output / "curve.png")
    for row in summary["restoring"]:
        print(f"{row['kind']:24s} {row['ratio']:3d}x n={row['num_items']} {[row[name] for name in MEANS]}")
    for name in ("places", "answering", "answering_over_segments"):
        for row in summary.get(name, []):
            print(name, row)


def finding(pipe: C3Pipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a model finds that was trained to: places by their words, and generated facts in fiction."""
    texts = {kind[0]: texts_of(arguments.data_dir, kind) for kind in ASKED_KINDS}
    fiction = texts[KINDS[0][0]]
    return {
        "places": [
            {"kind": kind, **measure_places(pipe, of_kind, ratio, arguments.places)}
            for kind, of_kind in texts.items()
            for ratio in ASKED_RATIOS
        ],
        **{
            name: [
                row
                for num_tokens in PROSE_TOKENS
                for row in measure_questions(pipe, fiction, arguments.questions, num_tokens, task)
            ]
            for name, task in (("answering", "answer"), ("answering_over_segments", "answer_segments"))
        },
    }


if __name__ == "__main__":
    main()
