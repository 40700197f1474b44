"""Golden cases: what the original's code computed on random weights, and those weights converted by this package."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from c3_hf import C3ForConditionalGeneration


# Marks of transformers' own tests, which test_mixins.py runs from a checkout.
THEIR_MARKS = (
    "accelerate_tests executorch_export_test flash_attn_test flash_attn_3_test flash_attn_4_test generate "
    "onnx_export_test order timeout torch_compile_test torch_export_test"
)


def pytest_configure(config: pytest.Config) -> None:
    if "C3_TRANSFORMERS" in os.environ:
        for mark in THEIR_MARKS.split():
            config.addinivalue_line("markers", mark)


@dataclass
class Golden:
    """One set: the converted model in float32, its folder, the recorded cases and their tensors."""

    model: C3ForConditionalGeneration
    folder: Path
    record: dict
    tensors: dict[str, torch.Tensor]

    def case(self, name: str) -> dict:
        return next(case for case in self.record["cases"] if case["name"] == name)

    def tensor(self, case: dict, name: str) -> torch.Tensor | None:
        key = case.get("tensors", {}).get(name)
        return None if key is None else self.tensors[key]

    def inputs(self, case: dict) -> dict[str, torch.Tensor]:
        """The case's inputs in this package's form: contexts lose the marker block that the original appends."""
        inputs = {"input_ids": torch.tensor(case["input_ids"])}
        if "attention_mask" in case:
            inputs["attention_mask"] = torch.tensor(case["attention_mask"])
        if "context_ids" not in case:
            return inputs
        context_ids = torch.tensor(case["context_ids"])
        mask = torch.tensor(case.get("context_attention_mask", torch.ones_like(context_ids).tolist()))
        ends = (context_ids == self.model.config.context_start_token_id).int().argmax(dim=1)
        length = int(ends.max())
        mask = mask * (torch.arange(context_ids.shape[1]) < ends[:, None])
        return inputs | {
            "context_input_ids": context_ids[:, :length],
            "context_attention_mask": mask[:, :length],
        }


@pytest.fixture(scope="session")
def goldens(shared_dir: Path, converted_goldens: dict[str, Path]) -> dict[str, Golden]:
    """Both golden sets: name to [`Golden`]."""
    sets = {}
    for name, folder in converted_goldens.items():
        source = shared_dir / "goldens" / name
        sets[name] = Golden(
            C3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
            folder,
            json.loads((source / "cases.json").read_text(encoding="utf-8")),
            load_file(source / "tensors.safetensors"),
        )
    return sets
