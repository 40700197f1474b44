"""The card of a C3 model: what is known of it, and no more."""

from __future__ import annotations

from pathlib import Path

from c3_hf.modeling.configuration_c3 import C3Config


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

A Context Cascade Compression model (C3, [arXiv 2511.15244](https://arxiv.org/abs/2511.15244)): a context encoder
({encoder}) compresses a text into {num_latents} latent tokens, from which a decoder ({decoder}) restores the text or
answers questions about it. Without a context it is the plain decoder.
{untrained}
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


_UNTRAINED = """
**This model is untrained**: its latent queries and projector are as they were drawn, so its latents hold nothing that
the decoder can read. It is where a training starts.
"""


def render_model_card(config: C3Config, repo_id: str, trained: bool = True) -> str:
    """The card of a model, Markdown with a metadata block.

    Args:
        config: its shapes, `license` and `base_models` go into the card, what is None is not mentioned.
        repo_id: name of the repository or folder, for the title and the snippet.
        trained: whether queries and projector have been trained.
    """
    base_models = "".join(f"- {name}\n" for name in config.base_models or [])
    return CARD.format(
        license=f"license: {config.license}\n" if config.license else "",
        base_models=f"base_model:\n{base_models}" if base_models else "",
        name=repo_id.split("/")[-1],
        encoder=_describe(config.encoder_config),
        decoder=_describe(config.text_config),
        num_latents=config.num_latents,
        untrained="" if trained else _UNTRAINED,
        repo_id=repo_id,
    )


def write_model_card(config: C3Config, folder: Path, repo_id: str, trained: bool = True) -> None:
    """Write README.md into `folder`, unless somebody's own card is there."""
    path = folder / "README.md"
    if path.exists() and TRANSFORMERS_TEMPLATE_MARK not in path.read_text(encoding="utf-8"):
        return
    path.write_text(render_model_card(config, repo_id, trained), encoding="utf-8")


def _describe(config) -> str:
    return f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
