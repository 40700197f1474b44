"""Compress a text once, keep it as a file, ask it often: `python examples/compress_and_ask.py [FILE]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoProcessor

import c3_hf


TEXT = """\
The access code of the depot at Trieste is 481920. The keys hang behind the door of the harbour office, and whoever \
takes them signs the book. On Sundays the depot is closed.
"""
# How the reply to a prompt begins: c3-tiny is asked to find something by a sentence begun.
BEGUN = {"find": "The access code of the depot at Trieste is"}


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(c3_hf.tiny_model_path())
    processor = AutoProcessor.from_pretrained(c3_hf.tiny_model_path())
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else TEXT
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.c3"
        c3_hf.compress(source, model, processor, output=file, progress=True)

        # Another day, another process: the text is not needed any more, and the encoder does not run.
        context = c3_hf.CompressedContext.load(file)
        print(context)
        # The prompts that the checkpoint was trained for are saved with it.
        for name, request in processor.prompts.items():
            begun = BEGUN.get(name, "")
            content = [*context.content_parts(), {"type": "text", "text": request}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": begun}]
            inputs = processor.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
            output = model.generate(**inputs, context_latents=context, max_new_tokens=200)
            answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])[0]
            print(f"{request + begun!r} -> {answer!r}")


if __name__ == "__main__":
    main()
