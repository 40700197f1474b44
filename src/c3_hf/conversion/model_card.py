"""The README.md of a converted model: the card of every C3 model, and where these weights come from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from c3_hf.conversion.card import render_model_card
from c3_hf.conversion.source import ReleasedCheckpoint
from c3_hf.modeling.configuration_c3 import C3Config


# The licence the original's repository states.
DEFAULT_LICENSE = "apache-2.0"

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


def read_license(checkpoint: ReleasedCheckpoint) -> str:
    """The licence the source's own card states, else that of the original."""
    path = checkpoint.folder / "README.md"
    stated = ModelCard.load(path).data.license if path.is_file() else None
    return stated or DEFAULT_LICENSE


def write_card(folder: Path, name: str, config: C3Config, record: dict) -> None:
    """Write `README.md`.

    Args:
        folder: the new repository.
        name: its name.
        config: its configuration, with licence and base models.
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
