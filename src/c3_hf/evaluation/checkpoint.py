"""Loads the measured C3 checkpoint and lets its decoder speak."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from c3_hf.evaluation.interface import SystemSettings
from c3_hf.evaluation.tokens import TokenMeter
from c3_hf.latents.decoding import decoder_positions
from c3_hf.modeling.configuration_c3 import C3Config


def load_checkpoint(settings: SystemSettings) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model (evaluation mode, on `settings.device`, in `settings.dtype`) and processor of `settings.model`."""
    processor = AutoProcessor.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    return model.to(settings.device).eval(), processor


class DecoderSystem:
    """What the systems that ask the decoder of a C3 checkpoint share.

    Args:
        model: A C3 model.
        processor: Its processor.
        settings: Sizes and limits.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: SystemSettings):
        self.model, self.processor, self.settings = model, processor, settings

    def restored(self, texts: Sequence[str], chat: Callable[[str], list[dict]]) -> list[str | None]:
        """The reply to `chat(text)` for each of `texts`, computed in batches; `None` for one too long."""
        outputs: list[str | None] = []
        for start in range(0, len(texts), self.settings.batch_size):
            batch = texts[start : start + self.settings.batch_size]
            limits = [self.settings.restore_limit(text) for text in batch]
            outputs += replies(self.model, self.processor, [chat(text) for text in batch], limits)
        return outputs

    def answered(self, content: str | list[dict]) -> str | None:
        """The reply to one user message; `None` if it is too long."""
        chat = [{"role": "user", "content": content}]
        return replies(self.model, self.processor, [chat], [self.settings.answer_tokens])[0]


def load_meter(model: str | os.PathLike, segment_tokens: int | None = None) -> TokenMeter:
    """Tokenizer and number of latents of the checkpoint `model`.

    Args:
        model: Folder or Hub id of a C3 checkpoint.
        segment_tokens: Tokens of a segment of long text; by default as many as `compress` takes.
    """
    processor = AutoProcessor.from_pretrained(model)
    config = C3Config.from_pretrained(model)
    return TokenMeter(
        tokenizer=processor.tokenizer,
        num_latents=processor.num_latents,
        segment_tokens=segment_tokens or config.longest_segment,
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
