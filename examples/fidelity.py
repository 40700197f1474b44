"""Know what you kept: fidelity of each segment, a target for it, and a page that shows it in colours.

`python examples/fidelity.py FILE [PAGE.html]`
"""

from __future__ import annotations

import sys
from pathlib import Path

from c3_hf import C3Pipeline
from c3_hf.latents.rendering import render_html


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    pipe = C3Pipeline.from_pretrained()
    text = Path(sys.argv[1])
    for target in (None, 0.99):
        context = pipe.compress(text, verify=True, target_fidelity=target, progress=True)
        worst = min(segment.token_accuracy for segment in context.fidelity)
        exact = sum(segment.is_exact for segment in context.fidelity)
        print(f"target {target}: {context}\n  {exact} of {len(context)} segments exact, the worst at {worst:.4f}")
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", encoding="utf-8") as page:
            page.writelines(render_html(context, text, pipe.processor))


if __name__ == "__main__":
    main()
