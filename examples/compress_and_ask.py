"""Compress a text once, keep it as a file, ask it often: `python examples/compress_and_ask.py [FILE [START]]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from c3_hf import C3Pipeline, CompressedContext


TEXT = """\
The access code of the depot at Trieste is 481920. The keys hang behind the door of the harbour office, and whoever \
takes them signs the book. On Sundays the depot is closed.
"""
# c3-tiny is asked by words of the text, and goes on from them where it is short.
START = "The access code of the depot at Trieste is"


def main() -> None:
    pipe = C3Pipeline.from_pretrained()
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else TEXT
    start = " ".join(sys.argv[2:]) or START
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.c3"
        pipe.compress(source, output=file, progress=True)

        # Another day, another process: the text is not needed any more, and the encoder does not run.
        context = CompressedContext.load(file)
        print(context)
        # What the checkpoint was trained to be asked is saved with it; anything else is refused.
        print(f"prompts: {', '.join(pipe.processor.prompts)}")
        print(f"{start!r} -> {str(pipe.ask(context, start=start))!r}")
        print(pipe.restore(context))


if __name__ == "__main__":
    main()
