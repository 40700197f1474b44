"""C3, Context Cascade Compression: long text in a few latents, as an ordinary transformers model."""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# Public name -> the module that defines it. A name is imported when it is first asked for, so that
# `import c3_hf` costs what transformers' auto classes cost and no more.
_PUBLIC = {
    "C3Config": "c3_hf.modeling.configuration_c3",
    "C3ForConditionalGeneration": "c3_hf.modeling.modeling_c3",
    "C3Model": "c3_hf.modeling.modeling_c3",
    "C3Processor": "c3_hf.modeling.processing_c3",
}

__all__ = ["C3Config", "C3ForConditionalGeneration", "C3Model", "C3Processor", "tiny_model_path"]


def tiny_model_path() -> str:
    """Folder of the small trained model that lies in the package, for `from_pretrained` without a network."""
    return str(Path(__file__).parent / "checkpoints" / "c3-tiny")


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
