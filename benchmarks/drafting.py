"""Draft and verify: tokens guessed from what was generated before (prompt lookup) or in blocks (Jacobi decoding)."""

from __future__ import annotations

from typing import Any

import torch

from c3_hf.latents.decoding import Restorer, generation_budget

from .record import ROOT, measure, ratio, spread
from .shapes import Setup


# Number of tokens looked up at each step; "blocks" is what a Restorer does.
DRAFTS = (3, 8, "blocks")


def texts() -> dict[str, str]:
    """A text of each kind: what repeats itself is what a lookup can guess."""
    return {
        "prose": (ROOT / "README.md").read_text(encoding="utf-8"),
        "code": (ROOT / "src" / "c3_hf" / "modeling" / "modeling_c3.py").read_text(encoding="utf-8"),
        "log": "".join(f"2026-01-01 00:00:{i:02d} INFO worker {i % 4} finished job {i} in 12 ms\n" for i in range(60)),
    }


def run(setup: Setup) -> list[dict[str, Any]]:
    """One row for each kind of text and way to draft."""
    return [compare(setup, kind, text, draft) for kind, text in texts().items() for draft in DRAFTS]


@torch.no_grad()
def compare(setup: Setup, kind: str, text: str, draft: int | str) -> dict[str, Any]:
    """Speed-up of restoring one segment, tokens a pass of the decoder, and whether the greedy tokens stay the same."""
    ids = setup.processor.tokenize_context(text)[: setup.scale.segment_length]
    latents = setup.model.get_context_features(torch.tensor([ids], device=setup.device))
    restorer = Restorer(setup.model, setup.processor)
    prompt = restorer.prompt_ids.unsqueeze(0).to(setup.device)
    budget = generation_budget(len(ids))

    def generate(**options: Any) -> list[int]:
        output = setup.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            context_latents=latents,
            max_new_tokens=budget,
            do_sample=False,
            **options,
        )
        new_ids = output[0, prompt.shape[1] :].tolist()
        return new_ids[:-1] if new_ids[-1] in restorer.stop_ids else new_ids

    def drafted() -> list[int]:
        if draft == "blocks":
            return restorer.generate(latents[0], budget)[0]
        return generate(prompt_lookup_num_tokens=draft)

    passes: list[int] = []
    handle = setup.model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    output = drafted()
    handle.remove()
    seconds = measure({"plain": generate, "drafted": drafted}, setup.device, repeats=setup.scale.repeats)
    return {
        "kind": kind,
        "draft": draft if draft == "blocks" else f"lookup of {draft}",
        "new_tokens": len(output),
        "tokens_per_pass": len(output) / len(passes),
        "speedup": ratio(seconds["plain"], seconds["drafted"]),
        "plain_tokens_per_s": spread([len(output) / value for value in seconds["plain"]]),
        "same_tokens": output == generate(),
    }
