"""The command as a whole: what it lists, and how it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

import c3_hf
from c3_hf.cli import COMMANDS, main


def test_every_command_is_listed_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert command.__name__.rpartition(".")[2] in listed


def test_called_with_nothing_it_says_what_there_is(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("usage: c3-hf")
    for command in COMMANDS:
        assert f"    {command.__name__.rpartition('.')[2]} " in listed


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"c3-hf {c3_hf.__version__}\n"


def test_every_help_answers_without_torch_and_in_under_half_a_second():
    code = (
        "import sys, time\n"
        "from c3_hf.cli import COMMANDS, main\n"
        "for words in [[], *([command.__name__.rpartition('.')[2]] for command in COMMANDS)]:\n"
        "    try:\n        main([*words, '--help'])\n    except SystemExit:\n        pass\n"
        "    print(f'loaded for {words}:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
        "    if not words:\n        print(f'{time.process_time()} seconds')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = process.stdout.splitlines()
    loaded = [line for line in lines if line.startswith("loaded for ")]
    assert [line for line in loaded if not line.endswith(": []")] == []
    assert len(loaded) == 1 + len(COMMANDS)
    assert [float(line.removesuffix(" seconds")) < 0.5 for line in lines if line.endswith(" seconds")] == [True]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_every_command_has_help_and_a_run_function(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command.__name__.rpartition(".")[2], "--help"])
    assert stop.value.code == 0
    assert "usage: c3-hf" in capsys.readouterr().out


def test_an_error_of_the_user_is_one_line_and_status_1(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "absent.txt")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("c3-hf demo: ")
    assert "absent.txt" in output.err
    assert output.err.count("\n") == 1


def test_an_interrupted_command_ends_with_the_status_of_an_interrupt(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("c3_hf.cli.demo.run", interrupt)
    assert main(["demo"]) == 130


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("evaluate", "eval"), ("report", "eval")])
def test_a_command_whose_packages_are_missing_names_the_extra(command, extra, monkeypatch, capsys):
    def need(args):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(f"c3_hf.cli.{command}.run", need)
    words = {"train": ["recipe.yaml"], "report": ["folder"], "evaluate": ["--data-dir", "data", "--output", "out"]}
    assert main([command, *words[command]]) == 1
    message = capsys.readouterr().err
    assert f"c3-hf {command}: No module named 'datasets'" in message
    assert f'In a clone of the repository: pip install ".[{extra}]"' in message
