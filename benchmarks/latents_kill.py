"""Kill compressing with SIGKILL at random moments, go on, and count what was lost.

`python -m benchmarks.latents_kill --data DATA`
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from c3_hf import CompressedContext, compress, restore
from c3_hf.latents.file import Journal

from .latents_setup import data_hash, load, parser, texts, write_record


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--segment-length", type=int, default=16)
    options.set_defaults(batch_size=2)
    options = options.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, processor = load(options)
    rng = random.Random(options.seed)
    source = "\n".join(texts(options, "passages_en"))
    rows: list[dict[str, int | float]] = []
    rounds = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        while len(rows) < options.kills:
            rounds += 1
            path = Path(folder) / f"{rounds}.c3"
            lost += compress_with_kills(model, processor, source, path, options, rng, rows)
            context = CompressedContext.load(path)
            context.check()
            if restore(context, model, processor, batch_size=64).data != source.encode():
                raise RuntimeError(f"round {rounds}: the file that was resumed does not restore to the source")
    summary = {"kills": len(rows), "finished_files": rounds, "groups_lost": lost}
    write_record("latents_kill", options, model, started, [summary, *rows], data_sha256=data_hash([source]))
    return 1 if lost else 0


def compress_with_kills(model, processor, source, path, options, rng, rows) -> int:
    """Let children compress `source` into `path`, each killed within five seconds, until the file is there."""
    journal = path.with_name(path.name + ".journal")
    lost = 0
    while not path.exists():
        before = Journal(journal).num_records
        begun = time.perf_counter()
        child = os.fork()
        if child == 0:
            compress(
                source,
                model,
                processor,
                output=path,
                exact=True,
                segment_length=options.segment_length,
                batch_size=options.batch_size,
            )
            os._exit(0)
        # A group of this size takes about one second, so that most children finish a few and die in the middle of one.
        time.sleep(rng.uniform(0.0, 5.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            break
        size = journal.stat().st_size if journal.exists() else 0
        after = Journal(journal).num_records
        lost += max(0, before - after)
        seconds = time.perf_counter() - begun
        print(f"kill {len(rows) + 1}: {before} groups before, {after} after", file=sys.stderr)
        rows.append({"after_s": seconds, "journal_bytes": size, "groups": after, "groups_before": before})
    return lost


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
