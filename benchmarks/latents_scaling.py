"""Time and peak memory of compressing a text of 10,000, 100,000 and 1,000,000 tokens into a file.

`python -m benchmarks.latents_scaling --data DATA`; each length runs in a process of its own, for a peak of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from c3_hf import compress

from .latents_setup import data_hash, load, parser, records, write_record
from .record import process_memory


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="in tokens")
    options.add_argument("--segment-length", type=int, help="default: what the model was made for")
    options.add_argument("--child", type=Path, help="measure this file, in this process")
    options = options.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(measure(options)))
        return 0
    started = time.perf_counter()
    model, processor = load(options)
    options.segment_length = options.segment_length or model.config.longest_segment
    text = "\n\n".join(record["text"] for record in records(options.data / "long" / "books_and_code.jsonl.gz", None))
    sample = text[:200_000]
    characters_a_token = len(sample) / len(processor.reader.read_plain([sample])[0][0])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths:
            file = Path(folder) / f"{length}.txt"
            file.write_text(text[: int(length * characters_a_token)], encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.latents_scaling", *arguments, "--child", str(file)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            if rows:
                growth = math.log(row["seconds"] / rows[-1]["seconds"])
                row["time_exponent"] = growth / math.log(row["tokens"] / rows[-1]["tokens"])
                row["peak_over_first"] = row["peak_bytes"] / rows[0]["peak_bytes"]
            rows.append(row)
            print(row, file=sys.stderr)
    write_record("latents_scaling", options, model, started, rows, data_sha256=data_hash([text[:10_000_000]]))
    return 0


def measure(options) -> dict[str, float]:
    """Seconds, tokens and the process's peak memory for one file; loading the model counts in the peak only."""
    model, processor = load(options)
    options.segment_length = options.segment_length or model.config.longest_segment
    warm = "A few words to warm up. " * 400
    compress(warm, model, processor, segment_length=options.segment_length, batch_size=options.batch_size)
    started = time.perf_counter()
    context = compress(
        options.child,
        model,
        processor,
        output=options.child.with_suffix(".c3"),
        segment_length=options.segment_length,
        batch_size=options.batch_size,
        progress=True,
    )
    return {
        "tokens": context.num_tokens,
        "segments": len(context),
        "text_bytes": int(context.byte_offsets[-1]),
        "file_bytes": options.child.with_suffix(".c3").stat().st_size,
        "seconds": time.perf_counter() - started,
        "tokens_per_s": context.num_tokens / (time.perf_counter() - started),
        "peak_bytes": process_memory("VmHWM"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
