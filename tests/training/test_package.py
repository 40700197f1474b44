"""The folder that goes into the package: everything that is needed, no code, the present chat template."""

from __future__ import annotations

import json

import torch
from benchmarks.c3_tiny_package import PACKAGE_FILES, package_checkpoint

from c3_hf import C3ForConditionalGeneration, C3Processor
from factories import make_model, make_processor


def test_a_checkpoint_becomes_a_package_folder(tmp_path):
    processor = make_processor()
    wanted = processor.chat_template
    processor.chat_template = processor.tokenizer.chat_template = "{{ 'as templates were once' }}"
    make_model().save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    package_checkpoint(tmp_path / "checkpoint", tmp_path / "packed")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == set(PACKAGE_FILES)
    assert "auto_map" not in json.loads((tmp_path / "packed" / "config.json").read_text(encoding="utf-8"))
    model = C3ForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype="auto")
    assert model.dtype == torch.bfloat16
    packed = C3Processor.from_pretrained(tmp_path / "packed")
    assert packed.chat_template == packed.tokenizer.chat_template == wanted
