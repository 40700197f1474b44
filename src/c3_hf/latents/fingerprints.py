"""Which model and tokenizer a compressed context belongs to.

A fingerprint is a SHA-256. The model's covers the name, shape and values of every parameter, the values rounded to
bfloat16, so that a checkpoint has one fingerprint whether it is loaded in float32 or bfloat16, on any device: all
values of parameters of up to 65,536, otherwise 4,096 evenly spread ones. Training or exchanging either half changes
it. It does not cover buffers, the configuration, or a change confined to values between the ones looked at.
The processor's covers the vocabulary with its ids, the ids of a probe text, and the ids of the restoring prompt; where
the encoder has a vocabulary of its own, that and its ids of the probe text too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling.prompt_c3 import TokenReader


if TYPE_CHECKING:
    from .context import CompressedContext


_WHOLE, _SAMPLED = 1 << 16, 1 << 12
# Contractions, digits, spaces, line breaks, Unicode that NFC changes, several scripts, special strings.
_PROBE = "It's 2024,  don't\tSPLIT\r\n\n me: e\u0301 \u212b 漢字かな 한글 עברית 😀 <|im_end|><img> naïve_x += 0x1F;"


def fingerprint_model(model: PreTrainedModel) -> str:
    """SHA-256 of the model's parameters, in hexadecimal; see the top of this module for what it covers.

    Raises:
        ValueError: If a parameter is not in memory (offloaded, or on the meta device).
    """
    return fingerprint_parameters(sorted(model.named_parameters(), key=itemgetter(0)))


def fingerprint_parameters(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """[`fingerprint_model`] of names and parameters, sorted by their names, one in memory at a time."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"`model` has the parameter {name} on the meta device, its values cannot be seen. Load it without "
                "offloading to disk."
            )
        values = parameter.detach().flatten()
        if len(values) > _WHOLE:
            steps = torch.arange(_SAMPLED, device=values.device)
            values = values[steps * (len(values) - 1) // (_SAMPLED - 1)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_processor(processor: ProcessorMixin) -> str:
    """SHA-256 of what the processor's tokenizer and restoring prompt do, in hexadecimal."""
    parts = [*_describe(processor.reader), restoring_prompt_ids(processor)]
    if processor.encoder_tokenizer is not processor.tokenizer:
        parts += _describe(processor.encoder_reader)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _describe(reader: TokenReader) -> list[Any]:
    vocabulary = sorted(reader.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return [vocabulary, reader.read_plain([_PROBE])[0][0]]


def restoring_prompt_ids(processor: ProcessorMixin) -> list[int]:
    """Ids of the prompt that asks for one context back, with its block of placeholders."""
    inputs = processor.apply_chat_template(processor.restore_messages("x"), add_generation_prompt=True)
    return inputs["input_ids"][0].tolist()


class Fingerprints:
    """Those of a model and its processor, each computed when it is first asked for and then kept.

    Args:
        model: Its weights must not change afterwards.
        processor: May be left out where it is not asked about.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None):
        self._model, self._processor = model, processor

    @cached_property
    def model(self) -> str:
        """See [`fingerprint_model`]."""
        return fingerprint_model(self._model)

    @cached_property
    def tokenizer(self) -> str | None:
        """See [`fingerprint_processor`]; `None` without a processor."""
        return None if self._processor is None else fingerprint_processor(self._processor)

    def check(self, context: CompressedContext) -> None:
        """Raise ValueError unless a context was made by this model and, where it is given, this processor."""
        model, tokenizer = context.header.model, context.header.tokenizer
        if self.tokenizer not in (None, tokenizer):
            raise ValueError(
                f"`processor` has the fingerprint {self.tokenizer[:16]}…, {context.name} was compressed with "
                f"{tokenizer[:16]}…: its tokenizer or restoring prompt is another one. Load the processor that "
                "belongs to the model."
            )
        if self.model != model:
            raise ValueError(
                f"`model` has the fingerprint {self.model[:16]}…, {context.name} was compressed by one with "
                f"{model[:16]}…: its latents mean nothing to another model. Load the model it was made with, or "
                "compress the text again."
            )
