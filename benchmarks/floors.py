"""What the machine could do at best: work that has to be done over rates that are measured on the spot."""

from __future__ import annotations

import torch
from torch import nn

from c3_hf import C3ForConditionalGeneration
from c3_hf.latents.decoding import cache_bytes

from .record import measure, spread


# Large enough to leave the processor's caches (L3 of server processors: up to some hundred MB).
COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Rates of a large matrix product and a large copy on the device, the best of some rounds.

    Returns:
        `matmul_flops_per_s` in `dtype`, and `copy_bytes_per_s`, bytes read plus bytes written.
    """
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = measure({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, warmup=2, repeats=7)
    return {
        "matmul_flops_per_s": 2 * size**3 / spread(seconds["matmul"])["min"],
        "copy_bytes_per_s": 2 * source.nbytes / spread(seconds["copy"])["min"],
    }


def layer_parameters(half: nn.Module) -> int:
    """Weights of the linear layers of all blocks: what each token is multiplied with."""
    matrices = [module for module in half.modules() if not isinstance(module, nn.Embedding)]
    return sum(
        parameter.numel()
        for module in matrices
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2
    )


def encode_flops(model: C3ForConditionalGeneration, batch_size: int, context_length: int) -> float:
    """Floating-point operations of compressing contexts: text, start marker and queries through the encoder's blocks.

    Two for each weight and token, causal attention, and the projector on the latents.
    """
    config = model.config
    encoder, length = config.encoder_config, context_length + 1 + config.num_latents
    attention = 2 * encoder.num_hidden_layers * encoder.hidden_size * length**2
    projector = 2 * config.num_latents * encoder.hidden_size * config.text_config.hidden_size
    return batch_size * (2 * layer_parameters(model.model.encoder) * length + attention + projector)


def decode_floor(
    model: C3ForConditionalGeneration, batch_size: int, length: int, rates: dict[str, float]
) -> dict[str, float]:
    """The least time of one decode step: all blocks and the head read once, the cache read once.

    Returns:
        `bytes`, `flops` and `seconds`, the larger of the two times.
    """
    weights = layer_parameters(model.model.language_model) + model.lm_head.weight.numel()
    element_size = model.lm_head.weight.element_size()
    num_bytes = weights * element_size + cache_bytes(model.config.text_config, batch_size, length, element_size)
    flops = 2 * batch_size * weights
    seconds = max(num_bytes / rates["copy_bytes_per_s"], flops / rates["matmul_flops_per_s"])
    return {"bytes": num_bytes, "flops": flops, "seconds": seconds}
