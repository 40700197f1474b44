from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import factories


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    factories.make_tokenizer().save_pretrained(folder)
    # The processor writes the class that both ends of the transformers range know.
    factories.make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": TEXT[shift:] + TEXT * 6}) for shift in range(8)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_path: str, text_path: Path) -> dict[str, Any]:
    """A recipe for a model of two small layers a half that trains in seconds."""
    half = {key: value for key, value in factories.sub_config().items() if not key.endswith("_id")}
    return {
        "tokenizer_path": tokenizer_path,
        "num_latents": 4,
        "text_config": {**half, "hidden_size": 32},
        "encoder_config": {**half, "hidden_size": 24, "head_dim": 6},
        "train_files": [str(text_path)],
        "min_context_tokens": 4,
        "context_ceiling": [[0, 8], [4, 16]],
        "length_multiple": 4,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(values: dict[str, Any], name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write
