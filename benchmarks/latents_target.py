"""Segment lengths chosen for a target fidelity against fixed lengths: latents needed for the same worst segment.

`python -m benchmarks.latents_target --data DATA`: a document each of a book, code, tables, random strings and random
words in four other scripts, and one of all of them.

The longest segment is by default what the model was made for, the fixed lengths are shares of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from c3_hf import CompressedContext, compress

from .latents_setup import data_hash, load, parser, records, texts, write_record


# Fixed lengths, of the longest.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
# First and last letters: Cyrillic, Greek, Arabic, Thai.
SCRIPTS = ("\u0430\u044f", "\u03b1\u03c9", "\u0627\u064a", "\u0e01\u0e2e")


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--targets", type=float, nargs="+", default=[0.95, 0.99, 0.999])
    options.add_argument("--fixed-lengths", type=int, nargs="+", help="to compare with, in tokens")
    options.add_argument("--longest", type=int, help="tokens a segment may have at most")
    options.add_argument("--characters", type=int, default=4000, help="of each kind")
    options = options.parse_args(arguments)
    started = time.perf_counter()
    model, processor = load(options)
    options.longest = options.longest or model.config.longest_segment
    options.fixed_lengths = options.fixed_lengths or [round(share * options.longest) for share in SHARES]
    sources = documents(options)
    rows: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    for name, source in sources.items():
        common = {"verify": True, "batch_size": options.batch_size}
        for length in options.fixed_lengths:
            context = compress(source, model, processor, segment_length=length, **common)
            rows.append({"document": name, "fixed_length": length, **describe(context)})
            print(rows[-1], file=sys.stderr)
        for target in options.targets:
            context = compress(
                source, model, processor, segment_length=options.longest, target_fidelity=target, **common
            )
            compared = against_fixed(rows, context, name)
            rows.append({"document": name, "target": target, **describe(context), **compared})
            print(rows[-1], file=sys.stderr)
        # After every document, so that a run that is cut short has measured what it has measured.
        hashes[name] = data_hash([source])
        write_record("latents_target", options, model, started, rows, data_sha256=hashes)
    return 0


def documents(options: Any) -> dict[str, str]:
    """A text of each kind, and all of them in one."""
    books = records(options.data / "long" / "books_and_code.jsonl.gz", None)
    size = options.characters
    found = {
        "book": books[0]["text"][100_000 : 100_000 + size],
        "code": next(book["text"] for book in books if "networkx" in book["source"].lower())[50_000 : 50_000 + size],
        "tables": "\n".join(texts(options, "tables"))[:size],
        "random strings": "\n".join(texts(options, "random"))[:size],
        "other scripts": "\n".join(random_words(script, size // len(SCRIPTS)) for script in SCRIPTS),
    }
    return {**found, "all": "\n\n".join(found.values())}


def random_words(script: str, characters: int) -> str:
    """About so many characters of words of random letters of one script."""
    rng, (first, last) = np.random.default_rng(0), map(ord, script)
    sizes = rng.integers(2, 10, characters // 6)
    return " ".join("".join(map(chr, rng.integers(first, last + 1, size))) for size in sizes)


def describe(context: CompressedContext) -> dict[str, Any]:
    """Latents, and the worst and mean fidelity they reach."""
    accuracies = sorted(segment.token_accuracy for segment in context.fidelity or [])
    return {
        "segments": len(context),
        "latents": context.total_latents,
        "tokens": context.num_tokens,
        "worst_segment": accuracies[0],
        "tokens_right": context.token_accuracy,
        "passes": context.header.passes,
    }


def against_fixed(rows: Sequence[dict[str, Any]], context: CompressedContext, name: str) -> dict[str, Any]:
    """The fewest latents with which a fixed length has as good a worst segment, and as many right tokens.

    None where no fixed length does.
    """
    fixed = [row for row in rows if row["document"] == name and "fixed_length" in row]
    reached = describe(context)

    def fewest(key: str) -> int | None:
        return min((row["latents"] for row in fixed if row[key] >= reached[key]), default=None)

    target = context.header.target_fidelity or 0.0
    return {
        "below_target": sum(segment.token_accuracy < target for segment in context.fidelity or []),
        "fixed_latents_for_the_same_worst": fewest("worst_segment"),
        "fixed_latents_for_as_many_right": fewest("tokens_right"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
