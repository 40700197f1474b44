"""The examples run as they lie there, on the bundled model (that of the harness has a test of its own)."""

from __future__ import annotations

import runpy
import sys

import pytest

from c3_hf import C3Pipeline
from c3_hf.latents.ask import Answer


TEXT = (
    "The harbour was empty. The access code of the depot at Bergen is 482913. Nobody knew why. The access code of the "
    "depot at Lyon is 107745. It rained. The keeper of the lighthouse at Rostock is Edith Parker. So the day went by "
    "us."
)


@pytest.fixture
def run_example(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(repository / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_compressing_once_and_asking_often(run_example, tmp_path, monkeypatch):
    def find(self, contexts, **options):
        asked.append(options["start"])
        return Answer(options["start"] + " 482913.", (0,))

    # What the bundled model finds is its weights' business.
    asked = []
    monkeypatch.setattr(C3Pipeline, "ask", find)
    (tmp_path / "short.txt").write_text(TEXT[:22])
    shown = run_example("compress_and_ask.py")
    assert "-> 'The access code of the depot at Trieste is 482913.'" in shown
    shown = run_example("compress_and_ask.py", "short.txt", "The access", "code is")
    assert "-> 'The access code is 482913.'" in shown
    assert shown.endswith(TEXT[:22] + "\n")
    assert asked == ["The access code of the depot at Trieste is", "The access code is"]


def test_any_bytes_and_back(run_example):
    shown = run_example("exact.py")
    assert "identical: True" in shown
    assert "segment 0: " in shown
    assert "identical: True" in run_example("exact.py", "a.txt")


@pytest.mark.slow
def test_what_is_kept(run_example, tmp_path):
    (tmp_path / "short.txt").write_text(TEXT[:22])
    shown = run_example("fidelity.py", "short.txt", "page.html")
    assert "target None: CompressedContext(1 segments" in shown
    assert shown.count("1 of 1 segments exact, the worst at 1.0000") == 2
    assert "harbour" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_every_example_is_run_by_a_test(repository):
    tests = "".join(path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("test_*example*.py"))
    assert [path.name for path in (repository / "examples").glob("*.py") if f'"{path.name}"' not in tests] == []
