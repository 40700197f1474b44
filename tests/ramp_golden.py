"""Golden numbers of our own: a model with ramp weights, no random generator involved.

`python tests/ramp_golden.py` records them anew, with the versions they were recorded with; the test only reads. Record
only when the computation is meant to change, and say so in the commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

FILE = Path(__file__).parent / "modeling" / "ramp_golden.json"
CONTEXTS = [[72, 101, 108, 108, 111], [67, 51], []]


def ramp_model():
    """The tiny model of the tests; weight i of a tensor is a fixed ramp folded into [-0.5, 0.5)."""
    from factories import make_model

    model = make_model()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            ramp = torch.arange(parameter.numel(), dtype=torch.float64) * 0.6180339887 + 0.1 * number
            values = (ramp % 1.0) - 0.5
            parameter.copy_((values + 1.0 if parameter.dim() == 1 else values).reshape(parameter.shape))
    return model


@torch.no_grad()
def compute() -> list[dict]:
    """Latents, logits and greedy ids of each context, as lists."""
    model = ramp_model()
    config = model.config
    block = [config.context_start_token_id, *[config.context_token_id] * 4, config.context_end_token_id]
    prompt = torch.tensor([[10, *block, 82, 101]])
    cases = []
    for ids in CONTEXTS:
        context = torch.tensor([[ids]], dtype=torch.long)
        output = model(prompt, context_input_ids=context)
        new = model.generate(prompt, context_input_ids=context, max_new_tokens=8, do_sample=False)
        cases.append(
            {
                "context": ids,
                "latents": output.context_latents.flatten().tolist(),
                "last_logits": output.logits[0, -1].tolist(),
                "new_ids": new[0, prompt.shape[1] :].tolist(),
            }
        )
    return cases


def main() -> None:
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    FILE.write_text(json.dumps({"versions": versions, "cases": compute()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
