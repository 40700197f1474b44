"""The command, called in an empty folder with a tiny random model."""

from __future__ import annotations

import io

import pytest

from c3_hf.cli import main


TEXT = "Elf Schiffe <|im_end|> & Käse.\n\n数到第十一艘。\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    return tmp_path


@pytest.fixture
def run(here, model_path):
    """Call `c3-hf command words`, with the tiny model."""

    def call(command, *words):
        return main([command, *map(str, words), "--model", model_path])

    return call


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused before the work is refused before a model is loaded."""
    for command in ("compress", "restore", "inspect", "ask"):
        monkeypatch.setattr(f"c3_hf.cli.{command}.load_model", lambda args: pytest.fail("a model was loaded"))
