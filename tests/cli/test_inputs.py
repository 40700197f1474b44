"""What is read: everything that was asked for, or a line that says what was not and a status of failure."""

from __future__ import annotations

import os

import pytest

from c3_hf import CompressedContext


TEXT = "Elf Schiffe <|im_end|> & Käse.\n\n数到第十一艘。\n".encode()


@pytest.fixture
def folder(here):
    (here / "in" / "sub").mkdir(parents=True)
    (here / "in" / "sub" / "b.txt").write_bytes(TEXT)
    return here / "in"


def test_what_cannot_be_read_below_a_folder_is_said(run, here, folder, capsys):
    (folder / "broken").symlink_to("nowhere")
    (folder / "linked").symlink_to("sub")
    os.mkfifo(folder / "pipe")
    assert run("compress", "in", "-o", "out") == 1
    errors = capsys.readouterr().err
    assert "in/broken: is a link that leads nowhere" in errors
    assert "in/linked: is a link to a folder and not followed" in errors
    assert "in/pipe: is a device or a pipe" in errors
    assert "3 of 4 inputs failed" in errors
    assert (here / "out" / "sub" / "b.txt.c3").is_file()


def test_an_unreadable_folder_is_said(run, here, folder, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (folder / "a.txt").write_bytes(TEXT)
    monkeypatch.setattr(os, "scandir", refuse)
    assert run("compress", "in", "-o", "out") == 1
    assert "in/sub: Permission denied; give one that you may use" in capsys.readouterr().err
    assert (here / "out" / "a.txt.c3").is_file()


@pytest.mark.parametrize("words", [["x.c3"], ["x.c3", "a.txt"]])
def test_a_context_is_not_compressed_again_without_a_word(words, run, here, capsys):
    (here / "x.c3").write_bytes(b"any")
    assert run("compress", *words) == 1
    assert "x.c3: its name says that it is compressed already" in capsys.readouterr().err
    assert (here / "a.txt.c3").exists() == (len(words) == 2)


def test_what_is_absent_does_not_keep_the_rest_from_it(run, here, capsys):
    assert run("compress", "absent.txt", "a.txt", "-o", "out") == 1
    errors = capsys.readouterr().err
    assert "c3-hf compress: absent.txt: No such file or directory; check the name" in errors
    assert "1 of 2 inputs failed" in errors
    assert (here / "out" / "a.txt.c3").is_file()


def test_leftovers_of_killed_runs_are_no_inputs(run, here, folder):
    for name in (".a.txt.c3.4242.tmp", "a.txt.c3.journal", "a.txt.c3.lock", "old.c3"):
        (folder / name).write_bytes(b"left")
    # Someone's own file that only looks a little like one.
    (folder / "notes.tmp").write_bytes(TEXT)
    assert run("compress", "in", "-o", "out") == 0
    made = sorted(path.relative_to(here / "out").as_posix() for path in (here / "out").rglob("*.c3"))
    assert made == ["notes.tmp.c3", "sub/b.txt.c3"]


def test_a_tree_comes_back_as_a_tree(run, here, folder, capsys):
    (folder / "a.txt").write_bytes(TEXT)
    assert run("compress", "in", "-o", "packed", "--exact") == 0
    assert run("restore", "packed", "-o", "back") == 0
    assert (here / "back" / "a.txt").read_bytes() == TEXT
    assert (here / "back" / "sub" / "b.txt").read_bytes() == TEXT


def test_restoring_goes_on_behind_a_bad_file(run, here, capsys):
    for name in ("good.txt", "good2.txt"):
        (here / name).write_bytes(TEXT)
        assert run("compress", name, "-o", name.replace("txt", "c3"), "--exact") == 0
    data = (here / "good.c3").read_bytes()
    (here / "bad.c3").write_bytes(data[: len(data) // 2])
    (here / "r").mkdir()
    assert run("restore", "good.c3", "bad.c3", "absent.c3", "good2.c3", "-o", "r") == 1
    errors = capsys.readouterr().err
    assert "c3-hf restore: bad.c3: " in errors
    assert "c3-hf restore: absent.c3: No such file or directory" in errors
    assert "2 of 4 inputs failed" in errors
    assert sorted(path.name for path in (here / "r").iterdir()) == ["good", "good2"]
    assert (here / "r" / "good").read_bytes() == (here / "r" / "good2").read_bytes() == TEXT


@pytest.mark.parametrize("words", [["restore", "-", "a.c3", "-"], ["ask", "-", "-", "Who?"]])
def test_standard_input_is_read_once(words, run, here, no_model, capsys):
    (here / "a.c3").write_bytes(b"x")
    assert run(*words) == 1
    assert "- is named 2 times, and standard input can be read once" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["restore", "-"], ["inspect", "-"]])
def test_a_bad_context_from_standard_input_is_named_so(words, run, here, stdin, capsys):
    stdin(b"no context")
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "`path`: standard input is no whole safetensors file" in error
    assert "/" not in error.replace("c3-hf", "")


def test_a_context_that_is_called_like_its_suffix_comes_back_as_a_file_in_the_folder(run, here):
    assert run("compress", "a.txt", "-o", ".c3", "--exact") == 0
    assert run("restore", ".c3", "-o", "r/") == 0
    assert (here / "r" / ".c3").read_bytes() == TEXT


def test_one_context_may_go_to_stdout_several_times(run, here, capfdbinary):
    assert run("compress", "a.txt", "--exact") == 0
    assert run("restore", "a.txt.c3", "a.txt.c3") == 0
    assert capfdbinary.readouterr().out == 2 * TEXT


@pytest.mark.parametrize("command", ["inspect", "ask"])
def test_a_folder_is_no_context(command, run, here, folder, capsys):
    assert run(command, "in", *(["Who?"] if command == "ask" else [])) == 1
    error = capsys.readouterr().err
    assert "in is a folder. Give the compressed contexts in it." in error
    assert error.count("\n") == 1


def test_a_folder_without_contexts_is_refused(run, folder, capsys):
    assert run("restore", "in", "-o", "back") == 1
    assert "there is no compressed context below in" in capsys.readouterr().err


def test_a_context_may_come_from_a_pipe(run, here, capfdbinary):
    assert run("compress", "a.txt", "--exact") == 0
    reading, writing = os.pipe()
    os.write(writing, (here / "a.txt.c3").read_bytes())
    os.close(writing)
    capfdbinary.readouterr()
    assert run("restore", f"/dev/fd/{reading}") == 0
    os.close(reading)
    assert capfdbinary.readouterr().out == TEXT


def test_a_damaged_output_is_made_anew(run, here, folder):
    (folder / "a.txt").write_bytes(TEXT)
    assert run("compress", "in", "-o", "out") == 0
    made = here / "out" / "a.txt.c3"
    made.write_bytes(made.read_bytes()[:-5])
    assert run("compress", "in", "-o", "out") == 0
    assert len(CompressedContext.load(made)) == 1
