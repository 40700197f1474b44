"""Where output goes: nothing that is there is lost, and what cannot be written is refused before any work."""

from __future__ import annotations

import os
import re
import threading

import pytest

from c3_hf import CompressedContext
from c3_hf.cli import main


TEXT = "Elf Schiffe <|im_end|> & Käse.\n\n数到第十一艘。\n".encode()


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("words", [["a/notes.txt", "b/notes.txt"], ["a", "b"], ["a", "b/notes.txt"]])
def test_two_inputs_never_become_one_output(words, run, here, no_model, capsys):
    for name in "ab":
        (here / name).mkdir()
        (here / name / "notes.txt").write_text(name)
    assert run("compress", *words, "-o", "out") == 1
    message = capsys.readouterr().err
    assert "`--output`: a/notes.txt and b/notes.txt would both become out/notes.txt.c3" in message
    assert message.count("\n") == 1
    assert not (here / "out").exists()


def test_two_contexts_never_become_one_text(run, here, no_model, capsys):
    for name in "ab":
        (here / name).mkdir()
        (here / name / "notes.c3").write_text(name)
    assert run("restore", "a/notes.c3", "b/notes.c3", "-o", "out/") == 1
    assert "would both become out/notes" in capsys.readouterr().err


def test_one_input_named_twice_is_one_job(run, here, capsys):
    (here / "in").mkdir()
    (here / "a.txt").rename(here / "in" / "a.txt")
    assert run("compress", "in", "in/a.txt", "./in/a.txt", "-o", "out") == 0
    assert files_below(here / "out") == ["a.txt.c3"]
    assert capsys.readouterr().err.count("out/a.txt.c3") == 1


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link", "another name"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_source_is_never_its_own_output(kind, force, run, here, no_model, capsys):
    target = "a.txt" if kind == "itself" else "./a.txt" if kind == "another name" else "link.txt"
    if kind == "symbolic link":
        (here / target).symlink_to("a.txt")
    elif kind == "hard link":
        os.link(here / "a.txt", here / target)
    assert run("compress", "a.txt", "-o", target, *force) == 1
    assert "one file, which would be lost" in capsys.readouterr().err
    assert (here / "a.txt").read_bytes() == TEXT


@pytest.mark.parametrize("words", [["compress", "-", "-o", "a.txt"], ["restore", "-", "-o", "a.txt"]])
def test_standard_input_is_never_its_own_output(words, run, here, no_model, monkeypatch, capsys):
    """`c3-hf compress - -o a.txt < a.txt`"""
    with open("a.txt", encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(*words, "--force") == 1
    assert "a.txt and the input - are one file, which would be lost" in capsys.readouterr().err
    assert (here / "a.txt").read_bytes() == TEXT


@pytest.mark.parametrize("words", [["compress", "a.txt", "-o", "-"], ["restore", "a.txt"]])
def test_standard_output_is_never_an_input(words, run, here, no_model, monkeypatch, capsys):
    """`c3-hf restore a.c3 >> a.c3`"""
    with open("a.txt", "a", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert run(*words) == 1
    assert "standard output and the input a.txt are one file, which would be lost" in capsys.readouterr().err
    assert (here / "a.txt").read_bytes() == TEXT


def test_a_page_replaces_neither_the_text_nor_the_context(run, here, no_model, capsys):
    (here / "a.c3").write_bytes(b"context")
    for target in ("a.txt", "a.c3"):
        assert run("inspect", "a.c3", "--text", "a.txt", "--html", target, "--force") == 1
        assert "one file, which would be lost" in capsys.readouterr().err
    assert (here / "a.txt").read_bytes() == TEXT
    (here / "page.html").write_text("mine")
    assert run("inspect", "a.c3", "--text", "a.txt", "--html", "page.html") == 1
    assert "`--output`: page.html exists. Give another name, or --force" in capsys.readouterr().err
    assert (here / "page.html").read_text() == "mine"


def test_a_context_that_another_one_would_be_restored_into_is_kept(run, here, no_model, capsys):
    (here / "x.c3.c3").write_bytes(b"one")
    (here / "x.c3").write_bytes(b"two")
    assert run("restore", "x.c3.c3", "x.c3", "-o", ".", "--force") == 1
    assert "one file, which would be lost" in capsys.readouterr().err


def test_an_existing_text_is_replaced_by_force_only(run, here, capsys):
    assert run("compress", "a.txt", "--exact") == 0
    (here / "a.txt").write_bytes(b"newer than the context")
    assert run("restore", "a.txt.c3", "-o", ".") == 1
    assert "`--output`: a.txt exists. Give another name, or --force" in capsys.readouterr().err
    assert run("restore", "a.txt.c3", "-o", "a.txt") == 1
    assert (here / "a.txt").read_bytes() == b"newer than the context"
    (here / "a.txt").chmod(0o640)
    assert run("restore", "a.txt.c3", "-o", ".", "--force") == 0
    assert (here / "a.txt").read_bytes() == TEXT
    assert (here / "a.txt").stat().st_mode & 0o777 == 0o640


def test_compress_replaces_contexts_only(run, here, capsys):
    (here / "b.txt").write_bytes(b"precious")
    assert run("compress", "a.txt", "-o", "b.txt") == 1
    assert "`--output`: b.txt exists" in capsys.readouterr().err
    assert (here / "b.txt").read_bytes() == b"precious"
    assert run("compress", "a.txt", "-o", "b.txt", "--force") == 0
    assert run("compress", "a.txt", "-o", "b.txt") == 0  # is a context now
    assert CompressedContext.load(here / "b.txt").header.source == "a.txt"


def test_links_are_followed_and_stay(run, here):
    (here / "store").mkdir()
    (here / "out.c3").symlink_to("store/real.c3")
    for _ in range(2):
        assert run("compress", "a.txt", "-o", "out.c3", "--exact") == 0
        assert (here / "out.c3").is_symlink()
        assert len(CompressedContext.load(here / "store" / "real.c3")) > 0
    (here / "back.txt").symlink_to("store/back.txt")
    assert run("restore", "out.c3", "-o", "back.txt") == 0
    assert (here / "back.txt").is_symlink()
    assert (here / "store" / "back.txt").read_bytes() == TEXT
    assert files_below(here / "store") == ["back.txt", "real.c3"]


@pytest.mark.parametrize("command", ["compress", "restore"])
def test_a_pipe_is_written_through(command, run, here):
    assert run("compress", "a.txt", "--exact") == 0
    os.mkfifo(here / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((here / "pipe").read_bytes()))
    reader.start()
    assert run(command, "a.txt.c3" if command == "restore" else "a.txt", "-o", "pipe") == 0
    reader.join()
    assert (here / "pipe").is_fifo()
    if command == "restore":
        assert got == [TEXT]
    else:
        (here / "got.c3").write_bytes(got[0])
        assert CompressedContext.load(here / "got.c3").header.source == "a.txt"
    assert run(command, "a.txt.c3" if command == "restore" else "a.txt", "-o", os.devnull) == 0
    assert not os.path.isfile(os.devnull)


def test_a_slash_at_the_end_means_a_folder(run, here):
    assert run("compress", "a.txt", "-o", "new/", "--exact") == 0
    assert files_below(here / "new") == ["a.txt.c3"]
    assert run("restore", "new/a.txt.c3", "-o", "back/") == 0
    assert (here / "back" / "a.txt").read_bytes() == TEXT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["restore", "a.c3", "-o", "missing/dir/x"], r"missing/dir/x cannot be made, there is no folder"),
        (["inspect", "a.c3", "--text", "a.txt", "--html", "missing/x.html"], r"missing/x.html cannot be made"),
        (["inspect", "a.c3", "--text", "a.txt", "--html", "."], r"`--html`: . is a folder"),
        (["restore", "a.c3", "-o", "a.txt/x"], r"a.txt/x cannot be made, there is no folder"),
        (["compress", "a.txt", "-o", "a.c3/x"], r"a.c3/x cannot be made, .*a.c3 is no folder"),
        (["compress", "a.txt", "-o", "n" * 248], r"with .journal behind it has 256 bytes, a file name may have 255"),
        (["restore", "a.c3", "-o", "n" * 256], r"has 256 bytes, a file name may have 255. Give a shorter one"),
        (["compress", "n" * 245, "-o", "new/"], r"with .journal behind it has 256 bytes"),
        (["compress", "a.txt", "-o", ""], r"`--output` is empty. Give a name"),
        (["compress", "a.txt", "-o", "loop"], r"loop: Too many levels of symbolic links; the link leads to itself"),
        (["restore", "a.c3", "-o", "loop"], r"loop: Too many levels of symbolic links"),
        (["convert", "a", "loop"], r"loop: Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_work(words, message, run, here, no_model, capsys):
    for name in ("a.c3", "n" * 245):
        (here / name).write_bytes(b"x")
    (here / "loop").symlink_to("loop")
    assert (main(words) if words[0] == "convert" else run(*words)) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert ".tmp" not in error
    assert not (here / "new").exists()


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.txt"), "n" * 240 + ".txt", "名" * 80 + ".txt"])
def test_any_name_that_has_room_works(name, run, here):
    (here / "a.txt").rename(here / name)
    assert run("compress", name, "--exact") == 0
    assert CompressedContext.load(here / (name + ".c3")).header.source.encode()
    (here / name).unlink()
    assert run("restore", name + ".c3", "-o", ".") == 0
    assert (here / name).read_bytes() == TEXT
    assert files_below(here) == sorted([name, name + ".c3"])


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "absent/checkpoint", "taken"],
        ["export", "absent/checkpoint", "taken", "--layout", "decoder"],
        ["new", "taken", "--encoder", "absent/model", "--decoder", "absent/model"],
        ["convert", "absent/checkpoint", "a.txt"],
        ["new", "a.txt/model", "--from", "absent/model", "--new-queries"],
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(words, here, capsys):
    (here / "taken").mkdir()
    (here / "taken" / "mine").write_text("mine")
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "exists and is not an empty folder" in message or "is no folder" in message
    assert message.count("\n") == 1


def test_runs_and_reports_go_into_folders(here, capsys):
    assert main(["evaluate", "--data-dir", "absent", "--output", "a.txt"]) == 1
    assert main(["report", "run", "--output", "a.txt"]) == 1
    assert capsys.readouterr().err.count("`--output`: a.txt is no folder") == 2


def test_a_report_does_not_replace_someone_elses_page(here, capsys):
    (here / "out").mkdir()
    (here / "out" / "report.md").write_text("# Mine")
    assert main(["report", "run", "--output", "out"]) == 1
    assert "`--output`: out/report.md exists and is no report" in capsys.readouterr().err
    assert (here / "out" / "report.md").read_text() == "# Mine"
