"""Every block of docs/conversion.md runs, on a small checkpoint in place of the released one."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

from c3_hf.cli import main


RELEASED = "liufanfanlff/C3-Context-Cascade-Compression"


def read_blocks(repository: Path) -> list[tuple[str, str]]:
    text = (repository / "docs" / "conversion.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


class Shell:
    """Runs the commands of a block; what needs a network is done with a small checkpoint."""

    def __init__(self, source: Path, repository: Path):
        self.source = source
        self.repository = repository
        self.commands: list[str] = []

    def run(self, line: str) -> None:
        program, *arguments = shlex.split(line)
        self.commands.append(program)
        if program == "hf":
            assert arguments[:3] == ["download", RELEASED, "--local-dir"]
            shutil.copytree(self.source, arguments[3])
            return
        if program == "c3-hf":
            is_source = arguments[0] == "convert"
            arguments[1:2] = [str(self.source) if is_source and arguments[1] == RELEASED else arguments[1]]
            assert main(arguments) == 0, line
            return
        assert program == "python"
        # In a process of its own: test_script_runs_by_its_path.
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", arguments)
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(str(self.repository / arguments[0]), run_name="__main__")
        assert stop.value.code == 0, line


@pytest.fixture(params=["made up", pytest.param("golden", marks=pytest.mark.slow)])
def source(request, released, tmp_path) -> Path:
    if request.param == "golden":
        return request.getfixturevalue("shared_dir") / "goldens" / "vocab_b" / "checkpoint"
    return released(num_latents=32).write(tmp_path / "source")


def test_every_block_runs(repository, source, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    uploads = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, exist_ok: uploads.append(repo_id))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda repo_id, folder_path: uploads.append(folder_path))
    shell = Shell(source, repository)
    for language, block in read_blocks(repository):
        if language == "python":
            exec(compile(block, "docs/conversion.md", "exec"), {})
        else:
            for line in block.splitlines():
                shell.run(line)
    printed = capsys.readouterr().out
    assert re.search(r"^\d\d tensors equal$", printed, flags=re.MULTILINE)
    assert "32 of 32 queries kept, 0 dropped, 32 drawn anew" in printed
    assert "one vocabulary" in printed
    assert uploads == ["your-name/C3-hf", "C3-hf"]
    assert shell.commands.count("c3-hf") >= 7
    again, before = (Path(name, "model.safetensors").read_bytes() for name in ("C3-again", "C3-hf"))
    assert again == before


def test_every_option_of_the_table_exists(repository):
    text = (repository / "docs" / "conversion.md").read_text(encoding="utf-8")
    options = re.findall(r"`(--[a-z-]+)", text)
    assert len(options) > 8
    known = "".join(
        (repository / "src" / "c3_hf" / "cli" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("convert", "export", "new", "loading")
    )
    assert [option for option in options if f'"{option}"' not in known] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "out"], "give `--encoder` and `--decoder`, or `--from`"),
        (["new", "out", "--encoder", "a", "--decoder", "b", "--new-queries"], "`--new-queries` goes with `--from`"),
        (["new", "out", "--from", "a"], "`--from` needs something to change"),
        (["convert", "nowhere", "out"], "is no folder, and no Hub id"),
        (["export", "nowhere", "out", "--layout", "decoder"], "is no folder, and no Hub id"),
    ],
)
def test_bad_commands_say_what_to_do(capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
