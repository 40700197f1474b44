# Copyright 2026 The c3_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card that a C3 model writes beside its weights when there is none yet.

One of the remote-code files of every C3 repository on the Hub.
"""

import os
from typing import Optional


# What transformers puts into a repository on push when it finds no card: nothing about the model itself.
TRANSFORMERS_TEMPLATE_MARK = "This is the model card of a 🤗 transformers model that has been pushed on the Hub"

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{license}{base_models}tags:
- c3
- context-compression
- arxiv:2511.15244
---

# {name}
{untrained}
A Context Cascade Compression model (C3, [arXiv 2511.15244](https://arxiv.org/abs/2511.15244)): a context encoder
({encoder}) compresses a text into {num_latents} latent tokens, from which a decoder ({decoder}) restores the text or
answers questions about it. Without a context it is the plain decoder.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
messages = processor.restore_messages("The text to compress.")
inputs = processor.apply_chat_template(messages)
new_ids = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new_ids)[0])
```

Latents lose something: restored text can differ from the original, most of all where a text is long for
{num_latents} latents and toward its end. Check before you rely on exact strings.
"""
UNTRAINED = """
**Untrained:** {reason}. Nothing of what is said below holds before it is trained.
"""


def render_model_card(config, repo_id: str, untrained: Optional[str] = None) -> str:
    """
    The card of a model, Markdown with a metadata block.

    Args:
        config (`C3Config`): its shapes go into the card, and `license` and `base_models` where they are stated.
        repo_id (`str`): name of the repository or folder, for the title and the snippet.
        untrained (`str`, *optional*): what of the model is not trained yet, in words; `None` for nothing.
    """
    base_models = "".join(f"- {name}\n" for name in config.base_models or [])
    return CARD.format(
        license=f"license: {config.license}\n" if config.license else "",
        untrained=UNTRAINED.format(reason=untrained) if untrained else "",
        base_models=f"base_model:\n{base_models}" if base_models else "",
        name=repo_id.split("/")[-1],
        encoder=_describe(config.encoder_config),
        decoder=_describe(config.text_config),
        num_latents=config.num_latents,
        repo_id=repo_id,
    )


def write_model_card(config, directory: str, repo_id: str, untrained: Optional[str] = None) -> None:
    """Write README.md into `directory`, unless somebody's own card is there."""
    path = os.path.join(directory, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if TRANSFORMERS_TEMPLATE_MARK not in file.read():
                return
    with open(path, "w", encoding="utf-8") as file:
        file.write(render_model_card(config, repo_id, untrained))


def describe_untrained(model) -> Optional[str]:
    """What of a model is not trained yet, for its card: a projector's bias is zero at first, and no step leaves it."""
    bias = getattr(model, model.base_model_prefix, model).projector.bias
    is_drawn = bias is not None and not bias.is_meta and not bias.any()
    return "its projector's bias is zero, as at the start" if is_drawn else None


def _describe(config) -> str:
    return f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
