"""Files that are there whole or not at all, and that two runs do not write at once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import c3_hf
from c3_hf import CompressedContext, compress
from c3_hf.files import atomic_file, atomic_folder, claimed


HOLD = """
import sys
from c3_hf.files import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing `tmp_path / "a.c3"`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(c3_hf.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a.c3")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_into_one_file_is_told_so(holder, model, processor, tmp_path):
    (tmp_path / "link.c3").symlink_to("a.c3")
    for name in ("a.c3", "link.c3"):
        for append in (False, True):
            with pytest.raises(ValueError, match=r"`output`: .*\.c3 is being written by another run"):
                compress("text", model, processor, output=tmp_path / name, append=append)
    compress("text", model, processor, output=tmp_path / "b.c3")
    # However the other ends, the file is free again.
    holder.kill()
    holder.wait()
    compress("text", model, processor, output=tmp_path / "a.c3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.c3", "b.c3", "link.c3"]


def test_a_run_in_the_midst_of_another_loses_nothing(model, processor, tmp_path):
    path = tmp_path / "a.c3"

    def pieces():
        yield "The first text. " * 10
        with pytest.raises(ValueError, match=r"is being written by another run"):
            compress("The second text. " * 10, model, processor, output=path)
        yield "The end."

    context = compress(pieces(), model, processor, output=path, segment_length=16, batch_size=1)
    assert int(context.byte_offsets[-1]) == len("The first text. " * 10 + "The end.")
    compress("More.", model, processor, output=path, append=True)
    compress("And more.", model, processor, output=path, append=True)
    assert int(CompressedContext.load(path).byte_offsets[-1]) == int(context.byte_offsets[-1]) + len("More.And more.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", r"`output`: .*folder is a folder\. Give the name of the file to write"),
        (os.devnull, r"`output`: .*null is a device or a pipe"),
        ("n" * 248, r"`output`: the name 'n+' with \.journal behind it has 256 bytes"),
    ],
)
def test_what_cannot_be_a_file_is_refused_before_the_work(name, message, model, processor, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("c3_hf.latents.compress.Compressor.compress_group", lambda *_: pytest.fail("compressed"))
    with pytest.raises(ValueError, match=message):
        compress("text", model, processor, output=tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent.x\.c3'$"):
        compress("text", model, processor, output=tmp_path / "absent" / "x.c3")


def test_a_source_is_never_its_own_output(model, processor, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the text")
    os.link(path, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("a.txt")
    for output in ("a.txt", "hard", "soft"):
        with pytest.raises(ValueError, match=r"`output`: .* and `source` are one file, whose text would be lost"):
            compress(path, model, processor, output=tmp_path / output)
        with path.open("rb") as file, pytest.raises(ValueError, match=r"are one file"):
            compress(file, model, processor, output=tmp_path / output)
        # A file without a name, as standard input by `<` is.
        with open(os.open(path, os.O_RDONLY), "rb") as file, pytest.raises(ValueError, match=r"are one file"):
            compress(file, model, processor, output=tmp_path / output)
    assert path.read_text() == "the text"


@pytest.mark.parametrize("suffix", [".lock", ".journal"])
def test_files_of_others_beside_the_output_stay(suffix, model, processor, tmp_path):
    """`-o poetry` beside somebody's poetry.lock."""
    other = tmp_path / f"poetry{suffix}"
    other.write_text("somebody's")
    with pytest.raises(ValueError, match=rf"poetry\{suffix}.*Move it away"):
        compress("text", model, processor, output=tmp_path / "poetry")
    with pytest.raises(ValueError, match=r"are one file, whose text would be lost"):
        compress(other, model, processor, output=tmp_path / "poetry")
    assert other.read_text() == "somebody's"
    other.write_text("")
    with pytest.raises(ValueError, match=r"are one file, whose text would be lost"):
        compress(other, model, processor, output=tmp_path / "poetry")
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_the_name_of_a_file_in_place_of_its_text_is_warned_of(model, processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a long text")
    with pytest.warns(UserWarning, match=r"`source` 'book.txt' is compressed as the text it is.*`Path\('book.txt'\)`"):
        context = compress("book.txt", model, processor)
    assert int(context.char_offsets[-1]) == len("book.txt")
    with pytest.warns(UserWarning, match=r"write `Path\('book.txt'\)`"):
        compress(["book.txt", "other.txt"], model, processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress("no file.txt", model, processor)
        compress(Path("book.txt"), model, processor)
        compress(b"book.txt", model, processor)
        compress("book.txt\n", model, processor)
        compress("x\0" + "y" * 5000, model, processor)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"new", "no bytes"])
    assert path.read_bytes() == b"old"
    path.chmod(0o600)
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_link_that_leads_to_itself_stays(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("link")
    for write in (atomic_file, atomic_folder, claimed):
        with pytest.raises(OSError, match=r"symbolic links: '.*link'"), write(link):
            pytest.fail("opened")
    assert os.readlink(link) == "link"


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "absent" / "x"):
        pytest.fail("opened")
    assert caught.value.filename == str(tmp_path / "absent" / "x")
    assert str(caught.value).endswith("absent/x'")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        CompressedContext.load(tmp_path)
    with pytest.raises(FileNotFoundError) as caught, claimed(tmp_path / "absent" / "x"):
        pytest.fail("claimed")
    assert caught.value.filename == str(tmp_path / "absent" / "x")
