"""Compressing texts of growing length: time must grow in proportion, working memory not at all."""

from __future__ import annotations

import math
from typing import Any

import torch

from .against_full_text import SEGMENTS_A_BATCH
from .record import measure, peak_memory, spread
from .shapes import Setup


def run(setup: Setup) -> list[dict[str, Any]]:
    """One row a length, and `time_exponent` against the row before: 1 is proportional growth."""
    rows: list[dict[str, Any]] = []
    for length in setup.scale.scaling_lengths:
        row = compress(setup, length)
        if rows:
            growth = row["seconds"]["median"] / rows[-1]["seconds"]["median"]
            row["time_exponent"] = math.log(growth) / math.log(row["tokens"] / rows[-1]["tokens"])
        rows.append(row)
    return rows


@torch.no_grad()
def compress(setup: Setup, text_length: int) -> dict[str, Any]:
    """Seconds, tokens a second and memory beyond the latents for one length, in tokens."""
    num_segments = max(text_length // setup.scale.segment_length, 1)
    segments = setup.random_ids(num_segments, setup.scale.segment_length)

    def all_latents() -> list[torch.Tensor]:
        return [setup.model.get_context_features(batch) for batch in segments.split(SEGMENTS_A_BATCH)]

    # The longest runs take minutes on a CPU: one timed round after one that warms up on a part.
    setup.model.get_context_features(segments[:SEGMENTS_A_BATCH])
    seconds = measure({"compress": all_latents}, setup.device, warmup=0, repeats=1)["compress"]
    config = setup.model.config
    latents_bytes = num_segments * config.num_latents * config.text_config.hidden_size * setup.model.dtype.itemsize
    return {
        "tokens": segments.numel(),
        "segments": num_segments,
        "seconds": spread(seconds),
        "tokens_per_s": segments.numel() / seconds[0],
        "latents_bytes": latents_bytes,
        "peak_bytes_beyond_latents": max(peak_memory(all_latents, setup.device) - latents_bytes, 0),
    }
