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
from operator import itemgetter
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling.prompt_c3 import TokenReader


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


def check_model(expected: str, model: PreTrainedModel, name: str) -> None:
    """Raise ValueError unless `model` has the fingerprint `expected` that the context called `name` was made with."""
    found = fingerprint_model(model)
    if found != expected:
        raise ValueError(
            f"`model` has the fingerprint {found[:16]}…, {name} was compressed by one with {expected[:16]}…: its "
            "latents mean nothing to another model. Load the model it was made with, or compress the text again."
        )


def check_processor(expected: str, processor: ProcessorMixin, name: str) -> None:
    """Raise ValueError unless `processor` has the fingerprint `expected`; `name` as for [`check_model`]."""
    found = fingerprint_processor(processor)
    if found != expected:
        raise ValueError(
            f"`processor` has the fingerprint {found[:16]}…, {name} was compressed with {expected[:16]}…: its "
            "tokenizer or restoring prompt is another one. Load the processor that belongs to the model."
        )
