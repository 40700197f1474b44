"""C3, Context Cascade Compression: long text in a few latents, as an ordinary transformers model."""

__version__ = "0.1.0"

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from c3_hf.latents import CompressedContext, compress, restore, verify
from c3_hf.modeling.configuration_c3 import C3Config
from c3_hf.modeling.modeling_c3 import C3ForConditionalGeneration, C3Model
from c3_hf.modeling.processing_c3 import C3Processor


__all__ = [
    "C3Config",
    "C3ForConditionalGeneration",
    "C3Model",
    "C3Processor",
    "CompressedContext",
    "compress",
    "restore",
    "tiny_model_path",
    "verify",
]


def tiny_model_path() -> str:
    """Folder of the small trained model that lies in the package, for `from_pretrained` without a network."""
    return str(Path(__file__).parent / "checkpoints" / "c3-tiny")


# With the package imported, the auto classes know C3 without `trust_remote_code`. AutoModel gives the model with its
# head, as the Hub repositories do: generate() must be reachable from it.
AutoConfig.register("c3", C3Config)
AutoModel.register(C3Config, C3ForConditionalGeneration)
AutoModelForCausalLM.register(C3Config, C3ForConditionalGeneration)
AutoProcessor.register(C3Config, C3Processor)
