"""How many rooms a reader passes: modules of the library that one call goes through, in the order they are entered.

Cutting a module in two makes shorter files and longer ways; these bounds hold the ways. They are what was reached, not
what is wished for: lower them when a way gets shorter.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch

from c3_hf import C3Pipeline, CompressedContext
from factories import make_model, make_processor, sub_config


SOURCE = Path(__file__).parents[2] / "src" / "c3_hf"


@cache
def room_of(filename: str) -> str | None:
    """The module of the library that a file of code is, as its path without the ending."""
    path = Path(filename)
    return str(path.relative_to(SOURCE).with_suffix("")) if path.is_relative_to(SOURCE) else None


def rooms_passed(call, inside_the_model: bool = False) -> list[str]:
    """The modules that are entered; a room is left when its last function returns. Importing is no part of the way."""
    entered: list[str] = []
    inside: list[str] = []
    importing = 0

    def note(frame, event, _):
        nonlocal importing
        room = room_of(frame.f_code.co_filename)
        if room is None or event not in ("call", "return"):
            return
        if frame.f_code.co_name == "<module>":
            importing += 1 if event == "call" else -1
        if importing or frame.f_code.co_name == "<module>" or room.startswith("modeling") is not inside_the_model:
            return
        if event == "call":
            if room not in inside:
                entered.append(room)
            inside.append(room)
        elif room in inside:
            # From the end: a generator that waits does not return in the order of the calls.
            del inside[len(inside) - 1 - inside[::-1].index(room)]

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [room for room, _ in groupby(entered)]


def assert_way(rooms: list[str], most_rooms: int, most_returns: int) -> None:
    """That so many rooms are passed, and so many entered again, at most."""
    passed, returns = len(set(rooms)), len(rooms) - len(set(rooms))
    assert (passed <= most_rooms, returns <= most_returns) == (True, True), (passed, returns, rooms)


@pytest.fixture
def fresh():
    """A pipeline that knows nothing of its model yet."""
    return C3Pipeline(make_model(), make_processor())


def test_restoring_passes_six_rooms_and_returns_to_none(fresh):
    context = C3Pipeline(fresh.model, fresh.processor).compress("A text of some length.", segment_length=32)
    rooms = rooms_passed(lambda: fresh.restore(context))
    assert_way(rooms, 6, 0)
    assert {"pipeline", "latents/restore", "latents/context", "latents/decoding"} <= set(rooms)


def test_the_way_from_context_input_ids_to_logits(fresh):
    inputs = fresh.processor.apply_chat_template(fresh.processor.restore_messages("A text of some length."))
    with torch.no_grad():
        rooms = rooms_passed(lambda: fresh.model(**inputs), inside_the_model=True)
    assert_way(rooms, 5, 4)
    assert "modeling/modeling_c3" in rooms


def test_the_way_of_a_text_to_a_file_and_back(fresh, tmp_path):
    path = tmp_path / "a.c3"

    def there_and_back():
        fresh.compress("A text of some length.", segment_length=32, output=path)
        fresh.restore(CompressedContext.load(path))

    assert_way(rooms_passed(there_and_back), 11, 19)


def test_the_way_of_an_item_to_the_report(model_path, tmp_path):
    pytest.importorskip("rapidfuzz", reason="the evaluation's own packages are not installed")
    from c3_hf.evaluation.report import write_report
    from c3_hf.evaluation.run import RunSettings, run

    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"id": "a", "text": "A lamp."}) + "\n", encoding="utf-8")
    settings = RunSettings(model=model_path, tasks=("own_texts",), max_new_tokens=6, device="cpu")

    def item_to_report():
        run(settings, data, tmp_path / "run", allow_changes=True)
        write_report([tmp_path / "run"], tmp_path / "report")

    rooms = rooms_passed(item_to_report)
    assert_way(rooms, 25, 43)
    assert {"evaluation/run", "evaluation/records", "evaluation/report"} <= set(rooms)


def test_the_way_of_a_recipe_to_a_step_of_the_optimizer(model_path, tmp_path):
    from c3_hf.training.arguments import parse_recipe
    from c3_hf.training.train import train

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "It was the age of wisdom. " * 9}) + "\n", encoding="utf-8")
    half = {key: value for key, value in sub_config().items() if not key.endswith("_id")}
    recipe = {
        "tokenizer_path": model_path,
        "num_latents": 4,
        "text_config": half,
        "encoder_config": half,
        "train_files": [str(text)],
        "min_context_tokens": 4,
        "context_ceiling": [[0, 8]],
        "length_multiple": 4,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "save_steps": 9,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    rooms = rooms_passed(lambda: train(*parse_recipe(path)))
    # One more return under transformers 4.57 than under 5.x.
    assert_way(rooms, 12, 21)
    assert {"training/train", "training/trainer", "data/collator"} <= set(rooms)
