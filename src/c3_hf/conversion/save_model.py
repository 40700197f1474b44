"""Loading a C3 model to change it, and saving one whole: weights, code, card, processor, both rope keys."""

from __future__ import annotations

from pathlib import Path

import torch

from c3_hf.conversion import repository
from c3_hf.conversion.card import write_model_card
from c3_hf.conversion.configs import both_rope_keys
from c3_hf.conversion.source import read_json
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.processing_c3 import C3Processor


def load_model(
    model: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[C3ForConditionalGeneration, C3Processor | None]:
    """Load a C3 model, and its processor if the folder or repository has one."""
    loaded = C3ForConditionalGeneration.from_pretrained(model, dtype=dtype).eval()
    has_processor = not Path(model).is_dir() or (Path(model) / "processor_config.json").is_file()
    return loaded, C3Processor.from_pretrained(model) if has_processor else None


def save_model(
    model: C3ForConditionalGeneration, processor: C3Processor | None, output: str | Path, trained: bool = True
) -> None:
    """Save a model and its processor; the folder appears complete or not at all.

    Args:
        model: the model.
        processor: its processor, or None.
        output: the folder to make; it must not exist, or be empty.
        trained: whether its queries and projector have been trained; the card says so where not.

    Raises:
        ValueError: if `output` is taken.
    """
    with repository.new_folder(output) as folder:
        model.save_pretrained(folder)
        write_model_card(model.config, folder, Path(output).name, trained)
        if processor is not None:
            processor.save_pretrained(folder)
        repository.copy_code(folder)
        fields = read_json(folder / "config.json")
        for half in ("text_config", "encoder_config"):
            fields[half] = both_rope_keys(fields[half])
        fields["auto_map"] |= repository.AUTO_MAP | (repository.PROCESSOR_AUTO_MAP if processor else {})
        repository.write_json(folder / "config.json", fields)
