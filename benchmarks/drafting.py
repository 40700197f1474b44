"""Draft and verify: tokens guessed from what was generated before (prompt lookup), checked in one step."""

from __future__ import annotations

from typing import Any

import torch

from c3_hf.latents.restoring import generation_budget
from c3_hf.latents.segmentation import encode_plain

from .record import ROOT, measure, ratio, spread
from .shapes import Setup


DRAFT_LENGTHS = (3, 8)


def texts() -> dict[str, str]:
    """A text of each kind: what repeats itself is what a lookup can guess."""
    return {
        "prose": (ROOT / "README.md").read_text(encoding="utf-8"),
        "code": (ROOT / "src" / "c3_hf" / "modeling" / "modeling_c3.py").read_text(encoding="utf-8"),
        "log": "".join(f"2026-01-01 00:00:{i:02d} INFO worker {i % 4} finished job {i} in 12 ms\n" for i in range(60)),
    }


def run(setup: Setup) -> list[dict[str, Any]]:
    """One row for each kind of text and number of drafted tokens."""
    return [compare(setup, kind, text, drafted) for kind, text in texts().items() for drafted in DRAFT_LENGTHS]


@torch.no_grad()
def compare(setup: Setup, kind: str, text: str, drafted: int) -> dict[str, Any]:
    """Speed-up of restoring one segment, tokens a decoder step, and whether the greedy tokens stay the same."""
    ids = encode_plain(setup.processor.encoder_tokenizer, text)[0][: setup.scale.segment_length]
    latents = setup.model.get_context_features(torch.tensor([ids], device=setup.device))
    prompt = setup.processor.apply_chat_template(setup.processor.restore_messages(latents[0].cpu()))
    inputs = {"input_ids": prompt["input_ids"].to(setup.device), "context_latents": latents}
    budget = generation_budget(len(ids))

    def plain() -> torch.LongTensor:
        return setup.model.generate(**inputs, max_new_tokens=budget)

    def with_draft() -> torch.LongTensor:
        return setup.model.generate(**inputs, max_new_tokens=budget, prompt_lookup_num_tokens=drafted)

    steps: list[int] = []
    handle = setup.model.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    output = with_draft()
    handle.remove()
    seconds = measure({"plain": plain, "drafted": with_draft}, setup.device, repeats=setup.scale.repeats)
    new_tokens = output.shape[1] - inputs["input_ids"].shape[1]
    return {
        "kind": kind,
        "drafted_tokens": drafted,
        "new_tokens": new_tokens,
        "tokens_per_step": new_tokens / len(steps),
        "speedup": ratio(seconds["plain"], seconds["drafted"]),
        "plain_tokens_per_s": spread([new_tokens / value for value in seconds["plain"]]),
        "same_tokens": bool(torch.equal(output, plain())),
    }
