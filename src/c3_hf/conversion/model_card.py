"""The README.md of a converted model: metadata for the Hub, a snippet that runs, where the weights come from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from c3_hf.conversion.source import ReleasedCheckpoint
from c3_hf.modeling.configuration_c3 import C3Config

DEFAULT_LICENSE = "apache-2.0"

_TEXT = """# {title}

A C3 (Context Cascade Compression, [arXiv 2511.15244](https://arxiv.org/abs/2511.15244)) model for transformers: a
context encoder of {encoder_width} dimensions compresses a text into {num_latents} latents, a decoder of {text_width}
dimensions reads them in place of the text.

## Use

{usage}

## Where the weights come from

Converted from `{source}`{revision} with c3_hf {version}.
{dtype_line} Every tensor of the source is used once, except:

{dropped}

SHA-256 of the source files:

| file | sha256 |
|---|---|
{hashes}

{receipt}
"""

_USAGE_WITH_PROCESSOR = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{title}", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)

messages = processor.restore_messages("It was the best of times, it was the worst of times.")
inputs = processor.apply_chat_template(messages)
output = model.generate(**inputs)
print(processor.post_process_text(output[:, inputs["input_ids"].shape[1] :])[0])
```"""

_USAGE_WITHOUT_PROCESSOR = """The source has no tokenizer, so there is no processor here: the model takes token ids.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{title}", trust_remote_code=True, dtype="auto")
```"""


def write_card(folder: Path, title: str, config: C3Config, source: ReleasedCheckpoint, record: dict) -> None:
    """Write `README.md`.

    Args:
        folder: the new repository.
        title: its name.
        config: its configuration.
        source: what it was converted from.
        record: the conversion record (see `convert_c3_to_hf.convert`).
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=_license_of(source),
        base_model=record["base_models"] or None,
        tags=["c3", "context-compression", "custom_code"],
    )
    usage = _USAGE_WITH_PROCESSOR if record["has_processor"] else _USAGE_WITHOUT_PROCESSOR
    text = _TEXT.format(
        title=title,
        encoder_width=config.encoder_config.hidden_size,
        num_latents=config.num_latents,
        text_width=config.text_config.hidden_size,
        usage=usage.format(title=title),
        source=source.name if source.revision else Path(source.name).name,
        revision=f" at revision `{source.revision}`" if source.revision else "",
        version=record["versions"]["c3_hf"],
        dtype_line=(
            f"Weights were cast to {record['cast_to']}." if record["cast_to"] else "Weights keep their stored type."
        ),
        dropped="\n".join(f"- `{drop['tensor']}`: {drop['reason']}" for drop in record["dropped"]) or "- nothing",
        hashes="\n".join(f"| `{name}` | `{digest}` |" for name, digest in record["source_files"].items()),
        receipt=_describe_verification(record["verification"]),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    (folder / "README.md").write_text(card.content, encoding="utf-8")


def _license_of(source: ReleasedCheckpoint) -> str:
    """The licence the source's own card states, else Apache-2.0, under which the original released its weights."""
    path = source.folder / "README.md"
    stated = ModelCard.load(path).data.license if path.is_file() else None
    return stated or DEFAULT_LICENSE


def _describe_verification(verification: dict | None) -> str:
    if verification is None:
        return "The conversion checked shapes and values; it was not verified by a forward pass (`--verify`)."
    forward = verification["forward"]
    return (
        "## Parity receipt\n\n"
        f"Reloaded from disk: {verification['tensors_equal']} tensors have the SHA-256 of their sources. An independent "
        f"forward pass on the source weights (two stock Qwen2 models joined by hand, {forward['dtype']}, "
        f"{len(forward['samples'])} samples) differs from this model's logits by at most "
        f"{forward['max_difference']:.3g}; the largest logit is {forward['max_logit']:.3g}. The most likely token agrees "
        f"at {forward['argmax_agreement']:.2%} of positions. Details: `conversion.json`."
    )
