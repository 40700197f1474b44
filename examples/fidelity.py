"""Know what you kept: fidelity of each segment, a target for it, and a page that shows it in colours.

`python examples/fidelity.py FILE [PAGE.html]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoProcessor

import c3_hf
from c3_hf import compress
from c3_hf.latents.rendering import render_html


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    model = AutoModelForCausalLM.from_pretrained(c3_hf.tiny_model_path())
    processor = AutoProcessor.from_pretrained(c3_hf.tiny_model_path())
    text = Path(sys.argv[1])
    for target in (None, 0.99):
        context = compress(text, model, processor, verify=True, target_fidelity=target, progress=True)
        worst = min(segment.token_accuracy for segment in context.fidelity)
        exact = sum(segment.is_exact for segment in context.fidelity)
        print(f"target {target}: {context}\n  {exact} of {len(context)} segments exact, the worst at {worst:.4f}")
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", encoding="utf-8") as page:
            page.writelines(render_html(context, text, processor))


if __name__ == "__main__":
    main()
