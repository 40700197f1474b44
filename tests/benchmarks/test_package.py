"""The folder that goes into the package: everything that is needed, no code, the present chat template."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks.c3_tiny_package import PACKAGE_FILES, mean_of, package_checkpoint
from safetensors.torch import load_file

from c3_hf import C3ForConditionalGeneration, C3Processor
from factories import make_model, make_processor


def test_a_checkpoint_becomes_a_package_folder(tmp_path):
    processor = make_processor()
    wanted = processor.chat_template
    processor.chat_template = processor.tokenizer.chat_template = "{{ 'as templates were once' }}"
    trained = make_model()
    trained.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    package_checkpoint([tmp_path / "checkpoint"], tmp_path / "packed")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == set(PACKAGE_FILES)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "packed" / name).read_text(encoding="utf-8"))
    # Stored in bfloat16, computed in float32.
    weights = load_file(tmp_path / "packed" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = C3ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype="auto")
    halves = [model, model.get_encoder(), model.get_decoder()]
    assert {half.dtype for half in halves} == {half.config.dtype for half in halves} == {torch.float32}
    packed = C3Processor.from_pretrained(tmp_path / "packed")
    assert packed.chat_template == packed.tokenizer.chat_template == wanted
    assert packed.num_latents == trained.config.num_latents
    assert model.generation_config.eos_token_id == trained.generation_config.eos_token_id
    # What is saved from the package is a complete folder for the Hub again.
    model.save_pretrained(tmp_path / "hub")
    assert (tmp_path / "hub" / "modeling_c3.py").is_file()


def test_several_checkpoints_become_their_mean(tmp_path):
    trained = [make_model(seed) for seed in range(3)]
    for number, model in enumerate(trained):
        model.save_pretrained(tmp_path / str(number))
    mean = mean_of([tmp_path / str(number) for number in range(3)])
    for name, weights in mean.state_dict().items():
        wanted = sum(model.state_dict()[name].double() for model in trained) / 3
        torch.testing.assert_close(weights.double(), wanted, rtol=1e-6, atol=1e-7)
    make_model(num_latents=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other' has other weights than"):
        mean_of([tmp_path / "0", tmp_path / "other"])
