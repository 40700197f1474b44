"""`import c3_hf` makes the auto classes of transformers know C3 without `trust_remote_code`, and loads nothing for it.

Where transformers is there already, C3 is registered at once. Else it is registered by the import of transformers,
whoever asks for it, so that no auto class can be used before it knows C3, and who only wants `c3-hf --help` does not
wait for torch.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register C3 with the auto classes now, or as soon as transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterBehindImport())


class _RegisterBehindImport(MetaPathFinder):
    """Finds transformers as the other finders do, and registers C3 when it has been executed."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, None, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        # Whoever only asks whether transformers is there gets a spec too, so the finder stays until the import.
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

    from .modeling.configuration_c3 import C3Config
    from .modeling.modeling_c3 import C3ForConditionalGeneration
    from .modeling.processing_c3 import C3Processor

    # AutoModel gives the model with its head, as the Hub repositories do: generate() must be reachable from it.
    AutoConfig.register("c3", C3Config)
    AutoModel.register(C3Config, C3ForConditionalGeneration)
    AutoModelForCausalLM.register(C3Config, C3ForConditionalGeneration)
    AutoProcessor.register(C3Config, C3Processor)
