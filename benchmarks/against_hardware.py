"""How much of the machine is used: compressing against its arithmetic, decoding against its memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from .floors import decode_floor, encode_flops
from .record import measure, spread
from .shapes import Setup


def run(setup: Setup) -> list[dict[str, Any]]:
    """Rows `encode` and `decode` for each context length and batch size."""
    batches = setup.scale.batches
    encoding = [encode(setup, length, batch_size) for length, sizes in batches.items() for batch_size in sizes]
    batch_sizes = sorted({size for sizes in batches.values() for size in sizes})
    return encoding + [decode(setup, batch_size) for batch_size in batch_sizes]


@torch.no_grad()
def encode(setup: Setup, context_length: int, batch_size: int) -> dict[str, Any]:
    """Share of the measured matmul rate that compressing reaches."""
    contexts = setup.random_ids(batch_size, context_length)
    seconds = measure(
        {"encode": lambda: setup.model.get_context_features(contexts)},
        setup.device,
        **setup.rounds(batch_size * context_length),
    )["encode"]
    floor = encode_flops(setup.model, batch_size, context_length) / setup.rates["matmul_flops_per_s"]
    return {
        "what": "encode",
        "context_length": context_length,
        "batch_size": batch_size,
        "seconds": spread(seconds),
        "floor_s": floor,
        "utilization": spread([floor / value for value in seconds]),
    }


@torch.no_grad()
def decode(setup: Setup, batch_size: int) -> dict[str, Any]:
    """Share of the floor that a decode step reaches: the slope between a short and a long generation."""
    scale, model = setup.scale, setup.model
    prompts = setup.prompt_ids(batch_size)
    latents = model.get_context_features(setup.random_ids(1, min(scale.batches)))
    few, many = 2, 2 + scale.new_tokens
    seconds = measure(
        {
            "few": lambda: setup.generate(few, prompts, context_latents=latents),
            "many": lambda: setup.generate(many, prompts, context_latents=latents),
        },
        setup.device,
        warmup=scale.warmup,
        repeats=scale.repeats,
    )
    steps = [(long - short) / scale.new_tokens for short, long in zip(seconds["few"], seconds["many"])]
    floor = decode_floor(model, batch_size, prompts.shape[1] + scale.new_tokens // 2, setup.rates)
    median = statistics.median(steps)
    return {
        "what": "decode",
        "batch_size": batch_size,
        "step_s": spread(steps),
        "floor_s": floor["seconds"],
        "floor_bytes": floor["bytes"],
        "utilization": floor["seconds"] / median if median > 0 else None,
    }
