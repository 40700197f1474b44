"""Loads the measured C3 checkpoint and lets its decoder speak."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.interface import SystemSettings
from c3_hf.evaluation.tokens import TokenMeter
from c3_hf.latents.restoring import decoder_positions


def load_checkpoint(settings: SystemSettings) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (evaluation mode, on `settings.device`, in `settings.dtype`) and processor of `settings.model`."""
    processor = AutoProcessor.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    return model.to(settings.device).eval(), processor


def load_meter(model: str | os.PathLike, segment_tokens: int | None = None) -> TokenMeter:
    """Tokenizer and number of latents of the checkpoint `model`.

    Args:
        model: Folder or Hub id of a C3 checkpoint.
        segment_tokens: Tokens of a segment of long text; by default 32 a latent, 1,024 for the released model.
    """
    processor = AutoProcessor.from_pretrained(model)
    return TokenMeter(
        tokenizer=processor.tokenizer,
        num_latents=processor.num_latents,
        segment_tokens=segment_tokens or 32 * processor.num_latents,
    )


@torch.no_grad()
def replies(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[list[dict]],
    limits: Sequence[int],
) -> list[str | None]:
    """Greedy replies of the decoder to chats, computed in one batch.

    Args:
        model: A C3 model.
        processor: Its processor.
        conversations: Chats as `apply_chat_template` takes them.
        limits: Most new tokens of each reply; a reply is cut at its own, so that it does not depend on the others.

    Returns:
        The replies, white space at both ends kept; `None` where prompt and limit exceed the decoder's positions.
    """
    lengths = [len(processor.apply_chat_template(chat)["input_ids"][0]) for chat in conversations]
    room = decoder_positions(model)
    taken = [row for row, length in enumerate(lengths) if length + limits[row] <= room]
    answered: list[str | None] = [None] * len(lengths)
    if taken:
        texts = _generate(model, processor, [conversations[row] for row in taken], [limits[row] for row in taken])
        for row, text in zip(taken, texts):
            answered[row] = text
    return answered


def _generate(
    model: PreTrainedModel, processor: ProcessorMixin, conversations: list[list[dict]], limits: list[int]
) -> list[str]:
    inputs = processor.apply_chat_template(conversations).to(model.device)
    # Spelled out, because what is left open comes from the checkpoint's own generation settings.
    sequences = model.generate(
        **inputs,
        max_new_tokens=max(limits),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    new_ids = sequences[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode([row[:limit] for row, limit in zip(new_ids.tolist(), limits)])


def batches(values: Sequence, size: int) -> list[Sequence]:
    """`values` in consecutive slices of at most `size`."""
    return [values[start : start + size] for start in range(0, len(values), size)]
