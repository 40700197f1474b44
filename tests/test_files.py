from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from c3_hf import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with pytest.raises(TypeError, match="bytes-like"), files.atomic_file(path) as file:
        file.writelines([b"half", "of it"])
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a.bin"])
    with files.atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), names(tmp_path)) == (b"new", ["a.bin"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_and_a_pipe_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with files.atomic_file(tmp_path / "link") as file:
        file.write(b"through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"through"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    with files.atomic_file(pipe) as file:
        file.write(b"into the pipe")
    reader.join(timeout=10)
    assert read == [b"into the pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("é" * 127)
    files.write_json(path, {})
    assert names(tmp_path) == [path.name]
    with (
        pytest.raises(ValueError, match="has 256 bytes, a file name may have 255"),
        files.atomic_file(tmp_path / ("é" * 128)),
    ):
        pass
    with pytest.raises(ValueError, match=r"with \.journal behind it has 258 bytes"):
        files.check_name("x" * 250, ".journal")


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError) as caught:
        files.write_json(path, {})
    assert caught.value.filename == str(path)


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "model"
    with pytest.raises(FileNotFoundError), files.atomic_folder(path) as folder:
        (folder / "half" / "of it").write_text("")
    assert names(tmp_path / "deep") == []
    path.mkdir()
    with files.atomic_folder(path) as folder:
        (folder / "whole").write_text("")
        assert names(path) == []
    assert names(path) == ["whole"]
    (tmp_path / "plain").mkdir()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="exists and is not an empty folder"), files.atomic_folder(path):
        pass


def test_json_comes_back(tmp_path):
    files.write_json(tmp_path / "a.json", {"ключ": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"ключ": [1, None]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"a" 1}\n', r"lines.jsonl`, line 2, is not JSON: Expecting ':' delimiter at column 6"),
        (b'{"a": "\xe9"}\n', r"lines.jsonl`, line 1, is not UTF-8 \(byte 7\)"),
        (b'\n["a"]\n', "line 2, holds a list, expected an object"),
        (b"[" * 100_000, "line 1, is JSON nested too deep"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(files.read_jsonl(path))


def test_json_lines_plain_and_compressed(tmp_path):
    # Characters at which str.splitlines would break stand inside a line.
    records = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(data + b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    assert list(files.read_jsonl(tmp_path / "a.jsonl")) == list(files.read_jsonl(tmp_path / "a.jsonl.gz")) == records
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ValueError, match=r"torn.jsonl.gz` is damaged behind line \d"):
        list(files.read_jsonl(tmp_path / "torn.jsonl.gz"))


def test_a_torn_line_is_dropped_before_the_next_is_written(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, [{"step": 1}, {"step": 2}])
    path.write_bytes(path.read_bytes() + b'{"step": 3, "text": "' + b"x" * 200_000)
    assert [record["step"] for record in files.read_jsonl(path, skip_torn=True)] == [1, 2]
    files.append_jsonl(path, [{"step": 3}])
    assert [record["step"] for record in files.read_jsonl(path)] == [1, 2, 3]
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b'{"step')
    files.append_jsonl(torn, [{"step": 1}])
    assert list(files.read_jsonl(torn)) == [{"step": 1}]


def test_a_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert files.file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("20 B", 20), ("1.5GB", 1_500_000_000), (" 2 mib ", 2 << 20), ("1TB", 10**12), ("0.5KB", 500)],
)
def test_sizes_in_words(text, size):
    assert files.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-3GB", "1iB", "5K", "1,5GB", "nan", "9" * 400])
def test_no_sizes(text):
    assert files.parse_size(text) == 0


def test_the_standard_library_is_enough():
    names = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; runpy.run_path({files.__file__!r}); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"torch", "transformers", "numpy"}.isdisjoint(names)
