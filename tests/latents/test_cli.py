"""compress, restore, inspect and ask from the command line, on a tiny random model."""

from __future__ import annotations

import html
import io
import json
import re

import pytest

from c3_hf import CompressedContext
from c3_hf.cli import main
from c3_hf.latents.rendering import AFTER_ERROR, CERTAIN, CLOSE, WRONG, character_spans, heat_kind


DATA = "Elf Schiffe <|im_end|> & cafe\u0301\r\n\r\n数到第十一艘。\n".encode()


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(command, *words):
        return main([command, *words, "--model", model_path])

    return call


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def test_a_file_goes_there_and_back(run, tmp_path, capfdbinary):
    (tmp_path / "a.txt").write_bytes(DATA)
    assert run("compress", "a.txt", "--exact", "--verify") == 0
    assert run("restore", "a.txt.c3", "-o", "b.txt") == 0
    assert (tmp_path / "b.txt").read_bytes() == DATA
    capfdbinary.readouterr()
    assert run("restore", "a.txt.c3") == 0
    output = capfdbinary.readouterr()
    assert output.out == DATA
    count = len(CompressedContext.load(tmp_path / "a.txt.c3"))
    assert f"a.txt.c3: {count} of {count} segments exact".encode() in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a.txt.c3", "b.txt"]


def test_leaving_out_the_check(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(DATA)
    monkeypatch.setattr("c3_hf.latents.compress.keep_what_restores", lambda *_: pytest.fail("restored"))
    assert run("compress", "a.txt", "--exact", "--no-check") == 0
    assert run("restore", "a.txt.c3", "-o", "b.txt") == 0
    assert (tmp_path / "b.txt").read_bytes() == DATA


def test_standard_streams(run, tmp_path, stdin, capfdbinary):
    stdin(DATA)
    assert run("compress", "-", "-o", "-", "--exact") == 0
    packed = capfdbinary.readouterr().out
    stdin(packed)
    assert run("restore", "-") == 0
    assert capfdbinary.readouterr().out == DATA
    assert list(tmp_path.iterdir()) == []


def test_directories_go_on_and_report_what_fails(run, tmp_path, capsys):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(DATA)
    (tmp_path / "in" / "sub" / "b.bin").write_bytes(b"\xff\xfe")
    assert run("compress", "in", "-o", "out") == 1
    errors = capsys.readouterr().err
    assert "b.bin: `source` is not UTF-8 at byte 0" in errors
    assert "1 of 2 inputs failed" in errors
    made = tmp_path / "out" / "a.txt.c3"
    before = made.stat().st_mtime_ns
    assert run("compress", "in", "-o", "out") == 1
    assert made.stat().st_mtime_ns == before
    # Another mode is another file.
    assert run("compress", "in", "-o", "out", "--exact") == 0
    assert CompressedContext.load(made).is_exact
    (tmp_path / "back").mkdir()
    assert run("restore", "out/a.txt.c3", "out/sub/b.bin.c3", "-o", "back") == 0
    assert (tmp_path / "back" / "b.bin").read_bytes() == b"\xff\xfe"


def test_appending(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(DATA)
    for _ in range(2):
        assert run("compress", "a.txt", "-o", "all.c3", "--append", "--exact", "--target-fidelity", "0.9") == 0
    assert run("restore", "all.c3", "-o", "all.txt") == 0
    assert (tmp_path / "all.txt").read_bytes() == DATA * 2


def test_inspecting(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(DATA)
    assert run("compress", "a.txt", "--exact", "--target-fidelity", "0.99") == 0
    context = CompressedContext.load(tmp_path / "a.txt.c3")
    capsys.readouterr()
    assert run("inspect", "a.txt.c3", "--segments") == 0
    text = capsys.readouterr().out
    assert f"{len(DATA.decode())} characters, {len(DATA)} bytes, {context.num_tokens} tokens" in text
    assert f"{len(context)} segments miss the target 0.99" in text
    assert len(text.split("first error\n")[1].splitlines()) == len(context)
    assert run("inspect", "a.txt.c3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_segments"] == len(found["segments"]) == len(context)
    assert found["residual"]["stored_segments"] == len(context)
    assert sum(found["sizes"].values()) == context.nbytes


def test_the_text_in_colours(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(DATA)
    assert run("compress", "a.txt") == 0
    capsys.readouterr()
    assert run("inspect", "a.txt.c3") == 0
    assert "not measured (compress with --verify)" in capsys.readouterr().out
    assert run("inspect", "a.txt.c3", "--text", "a.txt") == 0
    coloured = capsys.readouterr().out
    for code in ("\x1b[97;41m", "\x1b[30;43m", "\x1b[2m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured.encode().rstrip() == DATA.rstrip()
    assert run("inspect", "a.txt.c3", "--text", "a.txt", "--html", "a.html") == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    body = page.split('<div class="text">')[1]
    shown = html.unescape(re.sub(r'<span class="mark".*?</span> |<[^>]+>', "", body))
    assert shown.strip() == DATA.decode().replace("\r\n", "\n").strip()
    assert page.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "-"], r"`--output` must be given with stdin"),
        (["compress", "a.txt", "a.txt", "--append"], r"go with a single input file"),
        (["compress", "a.txt", "a.txt", "-o", "a.txt"], r"`--output` must be a directory for several inputs"),
        (["compress", "empty"], r"`FILE`: there is no file below empty"),
        (["compress", "absent.txt"], r"absent.txt"),
        (["restore", "a.txt"], r"`path`: a.txt is no whole safetensors file"),
        (["restore", "a.c3", "b.c3", "-o", "absent"], r"`--output` must be an existing directory for several files"),
        (["inspect", "a.txt", "--html", "a.html"], r"`--html` needs `--text`"),
    ],
)
def test_what_cannot_be_done_is_refused(run, tmp_path, capsys, words, message):
    (tmp_path / "a.txt").write_bytes(DATA)
    (tmp_path / "empty").mkdir()
    assert run(*words) == 1
    assert message in capsys.readouterr().err


def test_kinds_of_heat():
    assert [heat_kind(margin, False) for margin in (5.0, 1.0, 0.0, -1.0)] == [CERTAIN, CLOSE, WRONG, WRONG]
    assert [heat_kind(margin, True) for margin in (5.0, 1.0, -1.0)] == [AFTER_ERROR, CLOSE, WRONG]


def test_tokens_that_share_a_character_are_shown_as_one():
    # Two tokens of one character, one character dropped by normalisation, a tail.
    spans = character_spans([(0, 1), (0, 1), (2, 3)], [4.0, 1.0, 3.0, 9.0], 4)
    assert list(spans) == [(0, 1, 0, 1.0), (1, 4, 2, 3.0)]
