"""Compress a text once, keep it as a file, ask it often: `python examples/compress_and_ask.py [FILE]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from c3_hf import C3Pipeline, CompressedContext


TEXT = """\
The access code of the depot at Trieste is 481920. The keys hang behind the door of the harbour office, and whoever \
takes them signs the book. On Sundays the depot is closed.
"""
# How the reply to a prompt begins: c3-tiny is asked to find something by a sentence begun.
BEGUN = {"find": "The access code of the depot at Trieste is"}


def main() -> None:
    pipe = C3Pipeline.from_pretrained()
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else TEXT
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.c3"
        pipe.compress(source, output=file, progress=True)

        # Another day, another process: the text is not needed any more, and the encoder does not run.
        context = CompressedContext.load(file)
        print(context)
        # The prompts that the checkpoint was trained for are saved with it.
        for name, request in pipe.processor.prompts.items():
            begun = BEGUN.get(name, "")
            content = [{"type": "context", "context": context}, {"type": "text", "text": request}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": begun}]
            answer = pipe(messages, max_new_tokens=200)
            print(f"{request + begun!r} -> {answer!r}")


if __name__ == "__main__":
    main()
