"""A C3 repository: its code beside the weights, loading a model to change it, and saving one whole.

A folder that is written appears all at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from c3_hf import modeling
from c3_hf.conversion.card import describe_untrained, write_model_card
from c3_hf.conversion.configs import both_rope_keys
from c3_hf.conversion.plan import expected_shapes, find_absent_layers, naming
from c3_hf.conversion.weights import list_tensors, raise_problems
from c3_hf.files import atomic_folder, read_json_object, write_json
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration
from c3_hf.modeling.processing_c3 import C3Processor


MODEL_CLASS = "C3ForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_c3.C3Config",
    "AutoModel": f"modeling_c3.{MODEL_CLASS}",
    "AutoModelForCausalLM": f"modeling_c3.{MODEL_CLASS}",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_c3.C3Processor"}


def code_files() -> list[Path]:
    """The remote-code files: the modules of `c3_hf.modeling` whose names end in `_c3.py`."""
    return sorted(Path(modeling.__file__).parent.glob("*_c3.py"))


def copy_code(folder: Path) -> None:
    """Copy the remote-code files, byte for byte."""
    for path in code_files():
        shutil.copyfile(path, folder / path.name)


def read_config(folder: Path) -> C3Config:
    """The configuration in a folder of a C3 model.

    Raises:
        FileNotFoundError: if there is no `config.json`.
        ValueError: if it is no JSON object, is that of another kind of model, or describes no model.
    """
    path = folder / "config.json"
    model_type = read_json_object(path).get("model_type")
    if model_type != C3Config.model_type:
        raise ValueError(
            f"{path}: `model_type` is {repr(model_type)[:60]}, expected {C3Config.model_type!r}. A checkpoint in the "
            "released layout is converted first, with `c3-hf convert`."
        )
    with naming(path):
        return C3Config.from_pretrained(folder)


def check_layers(folder: Path, config: C3Config, names: Iterable[str]) -> None:
    """Compare the numbers of layers in `config` with the tensors, before a model is built by them.

    Raises:
        ValueError: if a half has more layers than are stored.
    """
    halves = {"text_config": "model.language_model.", "encoder_config": "model.encoder."}
    problems = []
    for half, prefix in halves.items():
        own = [name for name in names if name.startswith(prefix)]
        problems += find_absent_layers(getattr(config, half).num_hidden_layers, own, f"`{half}` of config.json")
    raise_problems(f"the weights in {folder} do not fit its config.json", problems)


def load_model(
    model: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[C3ForConditionalGeneration, C3Processor | None]:
    """Load a C3 model, and its processor if the folder or repository has one.

    Raises:
        ValueError: if `model` is empty, or the folder's `config.json` is damaged or describes no model.
    """
    if not str(model):
        raise ValueError("`model` is empty. Give the folder or the Hub id of a C3 model.")
    if Path(model).is_dir():
        config = read_config(Path(model))
        check_layers(Path(model), config, [tensor.name for tensor in list_tensors(model)])
        expected_shapes(config, Path(model) / "config.json")
    loaded = C3ForConditionalGeneration.from_pretrained(model, dtype=dtype).eval()
    has_processor = not Path(model).is_dir() or (Path(model) / "processor_config.json").is_file()
    return loaded, C3Processor.from_pretrained(model) if has_processor else None


def save_model(
    model: C3ForConditionalGeneration, processor: C3Processor | None, output: str | Path, untrained: str | None = None
) -> None:
    """Save a model and its processor; the folder appears complete or not at all.

    Args:
        output: the folder to make; it must not exist, or be empty.
        untrained: what of the model is not trained yet, in words for the card; None for what its weights show.

    Raises:
        ValueError: if `output` is taken.
    """
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        write_model_card(model.config, folder, Path(output).name, untrained or describe_untrained(model))
        if processor is not None:
            processor.save_pretrained(folder)
        copy_code(folder)
        fields = read_json_object(folder / "config.json")
        for half in ("text_config", "encoder_config"):
            fields[half] = both_rope_keys(fields[half])
        fields["auto_map"] |= AUTO_MAP | (PROCESSOR_AUTO_MAP if processor else {})
        write_json(folder / "config.json", fields)
