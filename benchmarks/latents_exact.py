"""Byte-exact mode on every file of texts and on fuzzed strings: does each come back, and at how many bits a token?

`python -m benchmarks.latents_exact --data DATA [--books] [--limit 10] [--fuzz 10000] [--processes 2]`

The books are six million tokens, five times all the rest, and have a record of their own (`--books`). With
`--no-check` texts are restored once, without it when they are compressed, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch

from c3_hf import CompressedContext, CompressionOptions, restore
from c3_hf.latents.compress import Compressor
from c3_hf.latents.decoding import Restorer
from c3_hf.latents.fingerprints import fingerprint_model
from c3_hf.latents.segments import iter_segments

from .latents_setup import data_hash, load, parser, records, write_record


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--fuzz", type=int, default=10_000, help="number of fuzzed strings")
    options.add_argument("--books", action="store_true", help="the books of long/ instead of everything else")
    options.add_argument("--segment-length", type=int, help="default: what the model was made for")
    options.add_argument("--no-check", action="store_true", help="restore once, not when compressing, too")
    options.add_argument("--resume", action="store_true", help="keep the kinds that a stopped run has measured")
    options.add_argument("--processes", type=int, default=1, help="of one thread each, on a CPU")
    options = options.parse_args(arguments)
    if options.processes > 1:
        torch.set_num_threads(1)
    started = time.perf_counter()
    model, processor = load(options)
    options.segment_length = options.segment_length or model.config.longest_segment
    found = books(options) if options.books else fuzzed(options) | texts_by_file(options)
    groups = {name: sources for name, sources in found.items() if sources}
    noise = numeric_noise(model, processor, next(iter(texts_by_file(options).values())), options)
    hashes = {name: data_hash([source.hex() for source in sources]) for name, sources in groups.items()}
    # Children have the model and the texts from their parent. The longest kinds come first.
    _JOBS.update({name: (model, processor, sources, options) for name, sources in groups.items()})
    rows = measured_before(options, model, hashes) if options.resume else []
    left = groups.keys() - {row["kind"] for row in rows}
    names = sorted(left, key=lambda name: -sum(map(len, groups[name])))
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for row in pool.imap_unordered(_measure_job, names):
            rows.append(row)
            print(row, file=sys.stderr)
            # After every kind, so that a run that is cut short has measured what it has measured.
            more = {"data_sha256": hashes, "margin_noise": noise, "kinds_left": len(groups) - len(rows)}
            write_record("latents_exact", options, model, started, in_order(rows, groups), **more)
    return 0 if all(row["identical"] == row["sources"] for row in rows) else 1


def fuzzed(options: Any) -> dict[str, list[bytes]]:
    """`--fuzz` strings, evenly of all fuzzers."""
    rng = random.Random(options.seed)
    return {
        f"fuzzed: {name}": [make(rng) for _ in range(options.fuzz // len(FUZZERS))] for name, make in FUZZERS.items()
    }


def texts_by_file(options: Any) -> dict[str, list[bytes]]:
    """The texts of every file under eval/ and long/, but for the books."""
    found = {}
    for path in sorted([*options.data.glob("eval/*.json*"), *options.data.glob("long/*.jsonl.gz")]):
        name = f"{path.parent.name}/{path.name.partition('.')[0]}"
        # Edge cases are few and short: all of them, whatever the limit.
        limit = None if name == "eval/edge" else options.limit
        if path.suffix == ".json":
            pages = json.loads(path.read_text(encoding="utf-8"))[:limit]
            texts = [page["conversations"][1]["value"] for page in pages]
        elif path.name != BOOKS:
            texts = [record["text"] for record in records(path, limit)]
        else:
            continue
        found[name] = [text.encode() for text in texts]
    return found


def books(options: Any) -> dict[str, list[bytes]]:
    """Each book, and the one codebase, as a kind of its own."""
    found = records(options.data / "long" / BOOKS, options.limit)
    return {f"long/books_and_code: {record['title']}": [record["text"].encode()] for record in found}


def measured_before(options: Any, model: Any, hashes: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of the record that is there.

    Raises:
        ValueError: If it was measured on other weights, texts or settings.
    """
    path = options.output / f"latents_exact.{options.name}.{model.device.type}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    settings, same = record["settings"], ("dtype", "segment_length", "batch_size", "limit", "books", "fuzz", "seed")
    wanted = [fingerprint_model(model), hashes, *(getattr(options, name) for name in same)]
    if [record["model"]["weights"], settings["data_sha256"], *(settings[name] for name in same)] != wanted:
        raise ValueError(f"`--resume`: {path} was measured on other weights, texts or settings. Measure anew.")
    return record["measurements"]


def in_order(rows: Sequence[dict[str, Any]], groups: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` in the order of `groups`: children finish in another one."""
    return sorted(rows, key=lambda row: list(groups).index(row["kind"]))


BOOKS = "books_and_code.jsonl.gz"
_JOBS: dict[str, tuple[Any, ...]] = {}


def _measure_job(name: str) -> dict[str, Any]:
    return {"kind": name, **measure(*_JOBS[name])}


def measure(model: Any, processor: Any, sources: Sequence[bytes], options: Any) -> dict[str, Any]:
    """Compress every source byte-exactly, restore it with another batch size, compare, count."""
    compressor = Compressor(Restorer(model, processor), make_options(options))
    owned = (
        (owner, segment)
        for owner, source in enumerate(sources)
        for segment in iter_segments(source, processor.tokenizer, options.segment_length)
    )
    restored = [hashlib.sha256() for _ in sources]
    tokens = 0
    started = time.perf_counter()
    while group := list(islice(owned, 8 * options.batch_size)):
        context = CompressedContext(compressor.header, **compressor.compress_group([segment for _, segment in group]))
        pieces = restore_each(context, model, processor, options.batch_size // 2 + 5)
        for (owner, _), data in zip(group, pieces):
            restored[owner].update(data)
        tokens += context.num_tokens
    counts = dataclasses.asdict(compressor.state.exact)
    digests = [hashlib.sha256(source).digest() for source in sources]
    return {
        "sources": len(sources),
        "identical": sum(first.digest() == second for first, second in zip(restored, digests)),
        "bytes": sum(map(len, sources)),
        "tokens": tokens,
        "residual_bits_a_token": 8 * counts["residual_bytes"] / max(1, tokens),
        **counts,
        "seconds": time.perf_counter() - started,
    }


def restore_each(context: CompressedContext, model: Any, processor: Any, batch_size: int) -> list[bytes]:
    """The bytes of each segment; an error if one does not come back."""
    restored = restore(context, model, processor, batch_size=batch_size).data
    ends = (context.byte_offsets - context.byte_offsets[0]).tolist()
    return [restored[start:end] for start, end in pairwise(ends)]


def make_options(options: Any) -> CompressionOptions:
    """Byte-exact, bfloat16 latents, the default margin."""
    return CompressionOptions(
        segment_length=options.segment_length,
        latent_dtype=torch.bfloat16,
        verify=True,
        exact=True,
        target_fidelity=None,
        min_segment_length=16,
        exact_margin=None,
        exact_check=not options.no_check,
        batch_size=options.batch_size,
    )


@torch.no_grad()
def numeric_noise(model: Any, processor: Any, sources: Sequence[bytes], options: Any) -> dict[str, float]:
    """How far margins move between batch sizes, in logits: what the margin of byte-exact mode must cover."""
    segments = [next(iter_segments(source, processor.tokenizer, options.segment_length)) for source in sources[:32]]
    restorer = Restorer(model, processor)
    margins = []
    for batch_size in (len(segments), 1):
        compressor = Compressor(restorer, dataclasses.replace(make_options(options), batch_size=batch_size))
        margins.append(torch.cat([item.margins for item in compressor.measure(segments)]))
    moved = (margins[0] - margins[1]).abs()
    return {"largest": moved.max().item(), "mean": moved.mean().item(), "positions": len(moved)}


def _unicode(rng: random.Random) -> bytes:
    planes = [(0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x4E00, 0x9FFF), (0xFDD0, 0xFDEF), (0x1F300, 0x1FAFF)]
    chars = (chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 60)))
    return "".join(chars).encode()


def _markup(rng: random.Random) -> bytes:
    special = ["<|im_end|>", "<|im_start|>", "<img>", "<imgpad>", "</img>"]
    parts = [*special, "<", "|", ">", "\ufdd0", "user\n", "e\u0301", " "]
    return "".join(rng.choice(parts) for _ in range(rng.randint(1, 25))).encode()


FUZZERS = {
    "bytes": lambda rng: rng.randbytes(rng.randint(1, 60)),
    "unicode": _unicode,
    "markup": _markup,
    "white space": lambda rng: "".join(rng.choice(" \t\r\n\u3000ab") for _ in range(rng.randint(1, 60))).encode(),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
