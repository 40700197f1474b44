"""A causal language model seen as body and head: the body is what a C3 model takes over."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel


def find_body(causal_lm: PreTrainedModel) -> tuple[str, nn.Module]:
    """The child of a causal language model that `AutoModel` would build, and its name.

    `base_model` is not asked: transformers 4.57 has a wrong prefix for Gemma 3.

    Raises:
        ValueError: if there is no such child, so that the model is no body with a head on it.
    """
    with torch.device("meta"):
        body_class = type(AutoModel.from_config(copy.deepcopy(causal_lm.config)))
    for name, child in causal_lm.named_children():
        if type(child) is body_class:
            return name, child
    raise ValueError(
        f"{type(causal_lm).__name__} holds no {body_class.__name__}, so it is not a language model with a head on it "
        "that a C3 model can take over. Choose a text-only causal language model."
    )
