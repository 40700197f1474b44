"""Questions a second to one text: from a stored file, and compressing the text anew for each.

`python -m benchmarks.latents_questions --data DATA`
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c3_hf import CompressedContext, compress
from c3_hf.latents.segments import iter_segments

from .latents_setup import data_hash, load, parser, records, write_record
from .record import measure, ratio, spread


def main(arguments: Sequence[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the text")
    options.add_argument("--segment-length", type=int, help="default: what the model was made for")
    options.add_argument("--new-tokens", type=int, default=8, help="of each answer")
    options.add_argument("--repeats", type=int, default=5)
    options = options.parse_args(arguments)
    started = time.perf_counter()
    model, processor = load(options)
    options.segment_length = options.segment_length or model.config.longest_segment
    book = records(options.data / "long" / "books_and_code.jsonl.gz", None)[0]["text"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths:
            text = "".join(segment.text for segment in first_segments(book, processor, length))
            file = Path(folder) / f"{length}.c3"
            compress(text, model, processor, output=file, segment_length=options.segment_length)
            rows.append(compare(model, processor, text, file, options))
            print(rows[-1], file=sys.stderr)
    write_record("latents_questions", options, model, started, rows, data_sha256=data_hash([book]))
    return 0


def first_segments(text: str, processor: Any, length: int) -> list[Any]:
    """The start of `text`, up to `length` tokens."""
    return [next(iter_segments(text, processor.tokenizer, length))]


def compare(model: Any, processor: Any, text: str, file: Path, options: Any) -> dict[str, Any]:
    """Time both ways of asking, the stored one from opening the file on."""
    segments = [segment.text for segment in iter_segments(text, processor.tokenizer, options.segment_length)]
    question = {"type": "text", "text": "Who is it about?"}

    def ask(parts: list[dict[str, Any]]) -> None:
        inputs = processor.apply_chat_template([{"role": "user", "content": [*parts, question]}])
        model.generate(**inputs.to(model.device), max_new_tokens=options.new_tokens, do_sample=False)

    opened = CompressedContext.load(file).content_parts(model)
    seconds = measure(
        {
            "stored, opened each time": lambda: ask(CompressedContext.load(file).content_parts(model)),
            "stored, kept in memory": lambda: ask(opened),
            "text, compressed each time": lambda: ask([{"type": "context", "text": part} for part in segments]),
        },
        model.device,
        repeats=options.repeats,
    )
    fresh = seconds["text, compressed each time"]
    return {
        "segments": len(segments),
        "questions_per_s": {name: spread([1 / value for value in values]) for name, values in seconds.items()},
        "speedup_opened": ratio(fresh, seconds["stored, opened each time"]),
        "speedup_kept": ratio(fresh, seconds["stored, kept in memory"]),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
