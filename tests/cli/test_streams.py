"""One line for what went wrong, whatever the streams are: closed, narrow, full."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import c3_hf
from c3_hf.cli import main
from c3_hf.cli.messages import one_line, prepare_streams
from c3_hf.cli.parsing import as_typed


TEXT = "Elf Schiffe <|im_end|> & Käse.\n\n数到第十一艘。\n"


def one_line_of(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("device", ["cuda", "foo", "cuda:77", "meta"])
@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["compress", "a.txt"],
        ["restore", "a.c3"],
        ["evaluate", "--data-dir", ".", "--output", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_device_that_is_not_there(words, device, here, capsys):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    (here / "a.c3").write_bytes(b"x")
    assert main([*words, "--device", device]) == 1
    error = one_line_of(capsys)
    assert f"`--device` {device!r} cannot be used here (" in error
    assert "Give cpu, or a device this machine has." in error


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config

    path = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("command", ["demo", "compress", "evaluate"])
def test_a_model_that_is_no_c3_model(command, here, gpt2, capsys):
    words = {"demo": [], "compress": ["a.txt"], "evaluate": ["--data-dir", ".", "--output", "out", "--allow-changes"]}[
        command
    ]
    assert main([command, *words, "--model", gpt2]) == 1
    assert f"`--model` {gpt2} is a model of type 'gpt2', not a C3 model" in one_line_of(capsys)


@pytest.mark.parametrize("damage", ["absent", "empty", "no weights", "torn weights"])
def test_a_model_that_cannot_be_loaded(damage, here, model, processor, capsys):
    folder = here / "model"
    if damage != "absent":
        folder.mkdir()
    if damage.endswith("weights"):
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    if damage == "torn weights":
        (folder / "model.safetensors").write_bytes(b"\x08")
    capsys.readouterr()
    assert main(["demo", "--model", str(folder)]) == 1
    assert f"`--model` {folder}: no C3 model can be loaded from there (" in one_line_of(capsys)


@pytest.mark.parametrize("words", [["a.c3", "caf\udce9?"], ["a.c3", "--start", "caf\udce9"]])
def test_words_that_are_no_text(words, run, here, no_model, capsys):
    (here / "a.c3").write_bytes(b"x")
    assert run("ask", *words) == 1
    assert "is not UTF-8 at character 3" in one_line_of(capsys)


@pytest.mark.parametrize(
    "words", [["compress", "-", "-o", "b.c3"], ["restore", "-"], ["demo", "-"], ["ask", "-", "Who?"]]
)
def test_a_closed_standard_input(words, run, here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(*words) == 1
    assert "standard input is closed; leave it open, or give a file instead of -" in one_line_of(capsys)


@pytest.mark.parametrize("words", [["restore", "a.txt.c3"], ["compress", "a.txt", "-o", "-"], ["inspect", "a.txt.c3"]])
def test_a_closed_standard_output(words, run, here, monkeypatch, capsys):
    assert run("compress", "a.txt", "--exact") == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", None)
    assert run(*words) == 1
    assert "standard output is closed" in capsys.readouterr().err


def test_a_reader_that_has_gone(run, here, monkeypatch, capsys):
    assert run("compress", "a.txt", "--exact") == 0
    reading, writing = os.pipe()
    os.close(reading)
    capsys.readouterr()
    with io.TextIOWrapper(io.FileIO(writing, "w"), encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("restore", "a.txt.c3", "a.txt.c3") == 1
    assert "c3-hf restore: the output was closed by the program that reads it" in one_line_of(capsys)


def test_a_full_disk(run, here, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    assert run("compress", "a.txt", "--exact") == 0
    capsys.readouterr()
    assert run("restore", "a.txt.c3", "-o", "/dev/full") == 1
    assert "No space left on device; make room" in one_line_of(capsys)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_narrow_terminal_cannot_show_is_replaced(encoding, run, here, monkeypatch):
    assert run("compress", "a.txt", "--verify") == 0
    for words in (["inspect", "a.txt.c3", "--text", "a.txt"], ["demo", "a.txt", "--ratio", "16"]):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
        assert run(*words) == 0
        sys.stdout.flush()
        assert "Schiffe" in "".join(shown.getvalue().decode(encoding).split("\x1b[97;41m")).replace("\x1b[0m", "")
        assert b"?" in shown.getvalue()


def test_json_loses_nothing_on_a_narrow_terminal(run, here, monkeypatch):
    (here / "a.txt").rename(here / "数.txt")
    assert run("compress", "数.txt") == 0
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert run("inspect", "数.txt.c3", "--json") == 0
    assert json.loads(shown.getvalue())["header"]["source"] == "数.txt"


def test_messages_are_one_line():
    assert one_line(ValueError("first\n  second\n\nthird")) == "first second third"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(OSError("just words")) == "just words"
    error = FileNotFoundError(2, "No such file or directory", "x")
    assert one_line(error) == "x: No such file or directory; check the name"
    assert one_line(MemoryError()) == "there is not enough memory; a smaller --batch-size needs less"


def test_messages_name_arguments_as_they_are_typed():
    typed = {"batch_size": "--batch-size", "exact": "--exact", "question": "QUESTION"}
    assert as_typed("`batch_size` must be at least 1; `other`, `exact=True`", typed) == (
        "`--batch-size` must be at least 1; `other`, `--exact`"
    )
    assert as_typed("`question` of `Path('batch_size')`, batch_size", typed) == (
        "`QUESTION` of `Path('batch_size')`, batch_size"
    )


def test_an_advice_names_the_option_of_the_command(run, here, capsys):
    (here / "a.txt").write_bytes(b"\xff")
    assert run("compress", "a.txt") == 1
    assert "or use `--exact`, which keeps any bytes" in one_line_of(capsys)


@pytest.mark.parametrize("content", ["a: [1", "a: &x *y", "- 1"])
def test_a_recipe_that_is_no_yaml(content, here, capsys):
    (here / "recipe.yaml").write_text(content)
    assert main(["train", "recipe.yaml"]) == 1
    assert one_line_of(capsys).startswith("c3-hf train: ")


def test_streams_closed_by_the_shell_take_no_file():
    """A number that the shell left free would go to the next file opened, and messages would land in that."""
    code = (
        "import os, sys\n"
        "from c3_hf.cli.messages import prepare_streams\n"
        "prepare_streams()\n"
        "print('a message', file=sys.stderr)\n"
        "sys.exit(0 if os.open(os.devnull, os.O_RDONLY) > 2 else 1)"
    )
    words = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    source = os.path.dirname(os.path.dirname(c3_hf.__file__))
    assert subprocess.run(words, env={**os.environ, "PYTHONPATH": source}, check=False).returncode == 0


def test_streams_that_are_there_stay(capsys):
    before = sys.stdin, sys.stdout, sys.stderr
    prepare_streams()
    assert (sys.stdin, sys.stdout, sys.stderr) == before
