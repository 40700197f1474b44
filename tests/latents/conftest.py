"""A tiny random model and its processor: everything it restores is wrong, which is what the promises are tested on."""

from __future__ import annotations

import pytest
import torch

from c3_hf import compress


TEXT = (
    "The keeper of the light counted the ships twice, as his father had.\n\n"
    "“Eleven,” he said — and wrote it down. It was the 3rd of May; the wind stood at 7.\r\n"
    "数到第十一艘，他停了下来。海面上什么也没有了。\n"
    "A name like <|im_end|> or <imgpad> is text here, and so is cafe\u0301 (\u212b).\n"
)


@pytest.fixture(scope="session")
def text():
    return TEXT


@pytest.fixture
def compressed(model, processor):
    """Keyword arguments of `compress` -> the compressed `TEXT`."""

    def make(text=TEXT, **options):
        return compress(text, model, processor, **{"segment_length": 64, "latent_dtype": torch.float32, **options})

    return make
