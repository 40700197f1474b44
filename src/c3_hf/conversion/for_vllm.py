"""What an exported decoder needs so that servers such as vLLM can run it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from c3_hf.files import read_json_object
from c3_hf.modeling.prompt_c3 import ESCAPE, PLAIN_OUTPUT, reads_escapes


# Sizes of an attention head that vLLM's attention on CPUs computes with (0.32, its module
# v1/attention/backends/cpu_attn.py).
# Its backends for GPUs take these as well.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# What vLLM puts into a message in the place of embeddings, before it renders the template. It refuses user text that
# holds it.
_PLACEHOLDER = "<prompt_embeds>"
# Decoders whose tokenizer transformers 5 reads with a class that rebuilds it, whatever the folder says; 4.57 does not.
_REBUILT = ("qwen2",)


def head_size_of(config: PretrainedConfig) -> int:
    """Size of an attention head of a causal language model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def keeps_escapes(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer takes the escapes of C3's chat template out again, in every supported transformers.

    Args:
        tokenizer: as it is read back from the folder of the decoder.
        folder: with the decoder's config.json.
    """
    return reads_escapes(tokenizer) and read_json_object(folder / "config.json")["model_type"] not in _REBUILT


def with_placeholder(template: str) -> str:
    """C3's chat template, with the place of embeddings left as it is where user text gets its escapes.

    Any other template is returned as it is.
    """
    escape = json.dumps(ESCAPE)[1:-1]
    whole = f"'{_PLACEHOLDER[0]}{escape}{_PLACEHOLDER[1:]}', '{_PLACEHOLDER}'"
    return template.replace(PLAIN_OUTPUT, PLAIN_OUTPUT.replace(" -}}", f" | replace({whole}) -}}}}"))
