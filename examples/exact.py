"""Byte-exact mode: any bytes in, the same bytes out: `python examples/exact.py [FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoProcessor

import c3_hf
from c3_hf import compress, restore


DATA = "Ame\u0301lie wrote <|im_end|> on the wall,\r\nand nobody knew why. ".encode() + b"\xff\xfe are not UTF-8.\n"


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(c3_hf.tiny_model_path(), dtype="float32")
    processor = AutoProcessor.from_pretrained(c3_hf.tiny_model_path())
    data = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else DATA
    context = compress(data, model, processor, exact=True, verify=True, progress=True)
    restored = restore(context, model, processor)
    print(context)
    print("identical:", restored.data == data)
    for index, fidelity in enumerate(context.fidelity):
        residual = context.segment_residual(index)
        kept = "stored as bytes" if residual.stored is not None else f"{len(residual.corrections)} tokens corrected"
        print(f"segment {index}: {fidelity.num_tokens} tokens, {fidelity.num_errors} wrong, {kept}")


if __name__ == "__main__":
    main()
