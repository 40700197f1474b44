"""The card of a C3 model: what is known of it, and no more; of a converted one also where its weights come from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.utils import logging
from yaml import YAMLError

from c3_hf.conversion.released import ReleasedCheckpoint
from c3_hf.modeling.configuration_c3 import C3Config


logger = logging.get_logger(__name__)


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
_UNTRAINED = """
**Untrained:** {reason}. Nothing of what is said below holds before it is trained.
"""
_ORIGIN = """
## Where the weights come from

Converted from `{source}`{revision} with c3_hf {version}. {cast} Every tensor of the source is used once, except:

{dropped}

SHA-256 of the source files:

| file | sha256 |
|---|---|
{hashes}

## Parity receipt

{receipt}
"""
_NO_PROCESSOR = """
The source has no tokenizer, so there is no processor here and the snippet above does not run: the model takes token
ids, as `input_ids` and `context_input_ids`.
"""


def render_model_card(config: C3Config, repo_id: str, untrained: str | None = None) -> str:
    """The card of a model, Markdown with a metadata block.

    Args:
        config: its shapes, `license` and `base_models` go into the card, what is None is not mentioned.
        repo_id: name of the repository or folder, for the title and the snippet.
        untrained: what of the model is not trained yet, in words; None for nothing.
    """
    base_models = "".join(f"- {name}\n" for name in config.base_models or [])
    return CARD.format(
        license=f"license: {config.license}\n" if config.license else "",
        base_models=f"base_model:\n{base_models}" if base_models else "",
        name=repo_id.split("/")[-1],
        encoder=_describe(config.encoder_config),
        decoder=_describe(config.text_config),
        num_latents=config.num_latents,
        untrained=_UNTRAINED.format(reason=untrained) if untrained else "",
        repo_id=repo_id,
    )


def write_model_card(config: C3Config, folder: Path, repo_id: str, untrained: str | None = None) -> None:
    """Write README.md into `folder`, unless somebody's own card is there."""
    path = folder / "README.md"
    if path.exists() and TRANSFORMERS_TEMPLATE_MARK not in path.read_text(encoding="utf-8"):
        return
    path.write_text(render_model_card(config, repo_id, untrained), encoding="utf-8")


def describe_untrained(model: PreTrainedModel) -> str | None:
    """What of a model its weights show to be untrained: a projector's bias is zero at first, and no step leaves it."""
    bias = model.model.projector.bias
    is_drawn = bias is not None and not bias.is_meta and not bias.any()
    return "its projector's bias is zero, as at the start" if is_drawn else None


def read_license(checkpoint: ReleasedCheckpoint) -> str | None:
    """The licence that the source's own card states; None if there is no card, or it states none."""
    path = checkpoint.folder / "README.md"
    if not path.is_file():
        return None
    try:
        stated = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (ValueError, TypeError, YAMLError) as error:
        logger.warning(f"{path} cannot be read ({error}): the new card states no licence.")
        return None
    return stated if isinstance(stated, str) else None


def write_converted_card(folder: Path, name: str, config: C3Config, record: dict) -> None:
    """Write `README.md`.

    Args:
        record: the conversion record (see `convert_c3_to_hf.convert`).
    """
    origin = _ORIGIN.format(
        source=record["source"],
        revision=f" at revision `{record['revision']}`" if record["revision"] else "",
        version=record["versions"]["c3_hf"],
        cast=f"Weights were cast to {record['cast_to']}." if record["cast_to"] else "Weights keep their stored type.",
        dropped="\n".join(f"- `{drop['tensor']}`: {drop['reason']}" for drop in record["dropped"]) or "- none",
        hashes="\n".join(f"| `{file}` | `{digest}` |" for file, digest in record["source_files"].items()),
        receipt=_describe_verification(record["verification"]),
    )
    text = render_model_card(config, name) + ("" if record["has_processor"] else _NO_PROCESSOR) + origin
    (folder / "README.md").write_text(text, encoding="utf-8")


def _describe(config) -> str:
    return f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"


def _describe_verification(verification: dict | None) -> str:
    if verification is None:
        return "The conversion checked names, shapes and values. It was not followed by a forward pass (`--verify`)."
    forward = verification["forward"]
    return (
        f"Reloaded from disk, {verification['tensors_equal']} tensors have the SHA-256 of their sources. On "
        f"{len(forward['samples'])} samples in {forward['dtype']}, an independent computation on the source weights "
        f"(two stock Qwen2 models joined by hand) and this model differ by at most {forward['max_difference']:.3g} in "
        f"a logit; the largest logit is {forward['max_logit']:.3g}, and the most likely token agrees at "
        f"{forward['argmax_agreement']:.2%} of positions. `conversion.json` holds the details."
    )
