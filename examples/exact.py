"""Byte-exact mode: any bytes in, the same bytes out: `python examples/exact.py [FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

from c3_hf import C3Pipeline


DATA = "Ame\u0301lie wrote <|im_end|> on the wall,\r\nand nobody knew why. ".encode() + b"\xff\xfe are not UTF-8.\n"


def main() -> None:
    pipe = C3Pipeline.from_pretrained(dtype="float32")
    data = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else DATA
    context = pipe.compress(data, exact=True, verify=True, progress=True)
    restored = pipe.restore(context)
    print(context)
    print("identical:", restored.data == data)
    for index, fidelity in enumerate(context.fidelity):
        residual = context.segment_residual(index)
        kept = "stored as bytes" if residual.stored is not None else f"{len(residual.corrections)} tokens corrected"
        print(f"segment {index}: {fidelity.num_tokens} tokens, {fidelity.num_errors} wrong, {kept}")


if __name__ == "__main__":
    main()
