"""Latents in fewer bytes: bfloat16, or int8 with one float32 scale a latent."""

from __future__ import annotations

import torch


LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def quantize(latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store latents as `dtype`.

    Args:
        latents: `(num_segments, num_latents, hidden_size)` of any float dtype.
        dtype: One of `LATENT_DTYPES`.

    Returns:
        The latents as `dtype`, and for int8 the scales `(num_segments, num_latents)` float32: magnitude / 127.
    """
    if dtype != torch.int8:
        return latents.to(dtype), None
    latents = latents.float()
    scales = latents.abs().amax(dim=-1) / 127
    steps = latents / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantize(latents: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The inverse of [`quantize`]: float32 for int8, otherwise the latents as they are."""
    return latents if scales is None else latents.float() * scales.unsqueeze(-1)
