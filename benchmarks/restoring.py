"""Sixty-four segments of mixed length, restored in batches: what the differing lengths cost."""

from __future__ import annotations

from typing import Any

import torch

from c3_hf.latents.decoding import Restorer, batches_by_length

from .record import measure, ratio, spread
from .shapes import Setup


SEGMENTS, BATCH_SIZE = 64, 16


def run(setup: Setup) -> list[dict[str, Any]]:
    """One row: useful tokens a second for mixed lengths, for equal ones of the same sum, and for one segment alone."""
    shortest, longest = setup.scale.restore_lengths
    mixed = torch.linspace(shortest, longest, SEGMENTS).round().int().tolist()
    equal = [round(sum(mixed) / SEGMENTS)] * SEGMENTS
    restorer = Restorer(setup.model, setup.processor)
    latents = setup.model.get_context_features(setup.random_ids(SEGMENTS, longest))
    seconds = measure(
        {
            "mixed": lambda: restore(restorer, latents, mixed),
            "equal": lambda: restore(restorer, latents, equal),
            "single": lambda: restore(restorer, latents[:1], equal[:1]),
        },
        setup.device,
        warmup=setup.scale.warmup,
        repeats=setup.scale.repeats,
    )
    tokens = {"mixed": sum(mixed), "equal": sum(equal), "single": equal[0]}
    return [
        {
            "segments": SEGMENTS,
            "batch_size": BATCH_SIZE,
            "lengths": {"shortest": shortest, "longest": longest, "mean": equal[0]},
            "tokens_per_s": {name: spread([tokens[name] / value for value in seconds[name]]) for name in seconds},
            "mixed_over_equal": ratio(seconds["equal"], seconds["mixed"], tokens["mixed"] / tokens["equal"]),
            "mixed_over_single": ratio(seconds["single"], seconds["mixed"], tokens["mixed"] / tokens["single"]),
        }
    ]


def restore(restorer: Restorer, latents: torch.Tensor, lengths: list[int]) -> None:
    """Generate `lengths[i]` tokens and a stop from `latents[i]`, in batches of like length."""
    for rows in batches_by_length(lengths, BATCH_SIZE):
        sizes = [lengths[row] for row in rows]
        restorer.generate(latents[rows, 0], max(sizes) + 1, forced=[[] for _ in rows], lengths=sizes)
