"""A question about a long text: the decoder reads the text itself, or latents of it, made now or kept."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from c3_hf.latents.decoding import cache_bytes

from .record import measure, ratio, spread
from .shapes import Setup


SEGMENTS_A_BATCH = 16


def run(setup: Setup) -> list[dict[str, Any]]:
    """One row for each text length."""
    return [compare(setup, length) for length in setup.scale.text_lengths]


@torch.no_grad()
def compress(setup: Setup, segments: torch.LongTensor) -> torch.Tensor:
    """Latents `(1, num_segments, num_latents, hidden_size)` of segments `(num_segments, segment_length)`."""
    features = [setup.model.get_context_features(batch) for batch in segments.split(SEGMENTS_A_BATCH)]
    return torch.cat(features).transpose(0, 1)


@torch.no_grad()
def compare(setup: Setup, text_length: int) -> dict[str, Any]:
    """Time to the first token, time of a reply, bytes of keys and values, and after how many questions latents win."""
    scale, model = setup.scale, setup.model
    num_segments = max(text_length // scale.segment_length, 1)
    segments = setup.random_ids(num_segments, min(scale.segment_length, text_length))
    latents = compress(setup, segments)
    short = setup.prompt_ids(1, num_segments)
    full = torch.cat([setup.random_ids(text_length), setup.prompt_ids(1, 0)[0]]).unsqueeze(0)

    def reply(prompt: torch.LongTensor, new_tokens: int, **contexts: Any):
        return lambda: setup.generate(new_tokens, prompt, **contexts)

    many = 1 + scale.new_tokens
    seconds = measure(
        {
            "compress": lambda: compress(setup, segments),
            "full_first": reply(full, 1),
            "full_reply": reply(full, many),
            "latents_first": reply(short, 1, context_latents=latents),
            "latents_reply": reply(short, many, context_latents=latents),
        },
        setup.device,
        warmup=scale.warmup,
        repeats=scale.repeats,
    )
    fresh_first = [a + b for a, b in zip(seconds["compress"], seconds["latents_first"])]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    saved = median["full_reply"] - median["latents_reply"]
    element_size = next(model.model.language_model.parameters()).element_size()
    return {
        "text_length": text_length,
        "segments": num_segments,
        "prompt_tokens": {"full": full.shape[1], "latents": short.shape[1]},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "first_token_speedup_stored": ratio(seconds["full_first"], seconds["latents_first"]),
        "first_token_speedup_fresh": ratio(seconds["full_first"], fresh_first),
        "decode_tokens_per_s": {
            way: scale.new_tokens / max(median[f"{way}_reply"] - median[f"{way}_first"], 1e-9)
            for way in ("full", "latents")
        },
        "cache_bytes": {
            "full": cache_bytes(model.config.text_config, 1, full.shape[1], element_size),
            "latents": cache_bytes(model.config.text_config, 1, short.shape[1], element_size),
        },
        "break_even_questions": median["compress"] / saved if saved > 0 else None,
    }
