"""Make the model that lies in the package from a training checkpoint, or from several, whose mean it takes.

`python -m benchmarks.c3_tiny_package CHECKPOINT... FOLDER` writes bfloat16 weights, a configuration that computes with
them in float32, processor and tokenizer, and leaves out the remote code: the package is the one copy of it.
`save_pretrained` from the folder writes a complete Hub folder again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.processing_c3 import C3Processor
from c3_hf.modeling.prompt_c3 import install_escapes


# What a package folder holds, apart from its README.
PACKAGE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)
_LARGEST_SHARD = "1GB"
_LICENSE = "apache-2.0"
# A block holds 640 tokens: where no end comes, plain `generate()` stops not long behind that.
_MAX_NEW_TOKENS = 1024


def package_checkpoint(checkpoints: Sequence[str | Path], folder: str | Path) -> None:
    """Write a model into `folder` in bfloat16, without code; files are replaced one by one.

    Args:
        checkpoints: One, or several trainings that began with the same weights, of which the mean is taken: what each
            of them gets wrong by chance is right in the others (model soups, arXiv 2203.05482).
        folder: Where to write.

    Raises:
        ValueError: if the checkpoints have other weights than the first, or it does not yield all of `PACKAGE_FILES`.
    """
    checkpoint = checkpoints[0]
    model = mean_of(checkpoints).to(torch.bfloat16)
    model.config.license = _LICENSE
    model.generation_config.max_new_tokens = _MAX_NEW_TOKENS
    processor = C3Processor.from_pretrained(checkpoint)
    # A training may have begun under an older chat template than the package's present one.
    install_escapes(processor.tokenizer)
    processor.chat_template = processor.tokenizer.chat_template
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        model.save_pretrained(staging, max_shard_size=_LARGEST_SHARD)
        processor.save_pretrained(staging)
        written = {path.name for path in Path(staging).iterdir()}
        if not written >= set(PACKAGE_FILES):
            raise ValueError(f"`checkpoint` {str(checkpoint)!r} gave no {sorted(set(PACKAGE_FILES) - written)}.")
        for name in PACKAGE_FILES:
            source = Path(staging) / name
            if source.suffix == ".json":
                _settle(source)
            source.chmod(0o644)
            os.replace(source, folder / name)


def mean_of(checkpoints: Sequence[str | Path]) -> C3ForConditionalGeneration:
    """The first model in float32, with the mean of the weights of all.

    Raises:
        ValueError: if one has weights of other names or shapes.
    """
    models = [C3ForConditionalGeneration.from_pretrained(path, dtype=torch.float32) for path in checkpoints]
    states = [model.state_dict() for model in models]
    shapes = [{name: weights.shape for name, weights in state.items()} for state in states]
    for path, found in zip(checkpoints, shapes):
        if found != shapes[0]:
            raise ValueError(f"`checkpoints`: {str(path)!r} has other weights than {str(checkpoints[0])!r}.")
    # All means before the first is put in: tied weights have two names.
    models[0].load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return models[0]


def _settle(path: Path) -> None:
    """Drop references to code; a model's configuration says float32, which most processors compute faster."""
    content = json.loads(path.read_text(encoding="utf-8"))
    settled = {name: value for name, value in content.items() if name != "auto_map"}
    if "text_config" in settled:
        settled["dtype"] = "float32"
        for half in ("text_config", "encoder_config"):
            settled[half] = {**settled[half], "dtype": "float32"}
    if settled != content:
        path.write_text(json.dumps(settled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse `CHECKPOINT... FOLDER` and write the package folder."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) < 2:
        raise SystemExit("usage: python -m benchmarks.c3_tiny_package CHECKPOINT... FOLDER")
    package_checkpoint(arguments[:-1], arguments[-1])


if __name__ == "__main__":
    main()
