"""C3, Context Cascade Compression: long text in a few latents, as an ordinary transformers model."""

__version__ = "0.1.0"

import typing as _typing
from pathlib import Path

from . import _auto_classes


if _typing.TYPE_CHECKING:
    from c3_hf.latents import CompressedContext
    from c3_hf.modeling.configuration_c3 import C3Config
    from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration, C3Model
    from c3_hf.modeling.processing_c3 import C3Processor
    from c3_hf.options import CompressionOptions
    from c3_hf.pipeline import C3Pipeline, compress, restore, verify


__all__ = [
    "C3Config",
    "C3ForConditionalGeneration",
    "C3Model",
    "C3Pipeline",
    "C3Processor",
    "CompressedContext",
    "CompressionOptions",
    "compress",
    "restore",
    "tiny_model_path",
    "verify",
]

# What needs torch is imported when it is first asked for, so that `c3-hf --help` answers at once.
_HOMES = {
    "latents": ("CompressedContext",),
    "modeling.configuration_c3": ("C3Config",),
    "modeling.modeling_c3": ("C3ForConditionalGeneration", "C3Model"),
    "modeling.processing_c3": ("C3Processor",),
    "options": ("CompressionOptions",),
    "pipeline": ("C3Pipeline", "compress", "restore", "verify"),
}


def tiny_model_path() -> str:
    """Folder of the small trained model that lies in the package, for `from_pretrained` without a network."""
    return str(Path(__file__).parent / "checkpoints" / "c3-tiny")


def __getattr__(name: str) -> object:
    """Import the public names, and the packages they are in, at the first use of one of them."""
    if name not in __all__ and name not in ("latents", "modeling", "pipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    for home, names in _HOMES.items():
        module = import_module(f"{__name__}.{home}")
        globals().update({public: getattr(module, public) for public in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto_classes.register_with_transformers()
