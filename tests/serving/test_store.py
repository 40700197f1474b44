"""The store: a folder of files that outlives the process, of one model, and of bounded size."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch


pytest.importorskip("fastapi", reason="needs the extra serve")

from c3_hf import C3Pipeline
from c3_hf.serving.protocol import ApiError
from c3_hf.serving.store import ContextStore, context_id_of
from factories import make_model, make_processor


@pytest.fixture(scope="module")
def empty(random_pipe):
    return random_pipe.compress(b"")


@pytest.fixture
def add(random_pipe, tmp_path):
    """Put a text into a store, last used so many seconds after the beginning of time."""

    def call(store, name, text="some text of some length", used=None):
        with store.writing(name) as path:
            random_pipe.compress(text, output=path)
            if used is not None:
                os.utime(path, (used, used))

    return call


def test_contexts_outlive_the_store_object_in_the_order_of_their_use(tmp_path, empty, add):
    store = ContextStore(tmp_path, empty)
    for used, name in enumerate(("a", "b", "c")):
        add(store, name, used=used)
    store.open("a")
    again = ContextStore(tmp_path, empty)
    assert again.ids() == ["a", "c", "b"]
    assert again.open("b").num_tokens == len("some text of some length")
    again.delete("b")
    assert "b" not in again
    with pytest.raises(ApiError, match="there is no context of this id; it may have been evicted") as caught:
        again.delete("b")
    assert caught.value.status == 404


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a.c3", "x" * 81, ".hidden"])
def test_an_id_is_no_path(tmp_path, empty, name):
    with pytest.raises(ApiError, match="there is no context of this id"):
        ContextStore(tmp_path, empty).open(name)


def test_the_least_recently_used_make_room(tmp_path, empty, add):
    store = ContextStore(tmp_path, empty)
    for used, name in enumerate(("a", "b", "c")):
        add(store, name, used=used)
    store.open("a")
    small = ContextStore(tmp_path, empty, max_bytes=3 * store.nbytes() // 3)
    # What an interrupted run left is no less in the way.
    (tmp_path / "old.c3.journal").write_bytes(b"x" * 9)
    os.utime(tmp_path / "old.c3.journal", (0, 0))
    add(small, "d")
    assert small.ids() == ["d", "a", "c"]
    assert not (tmp_path / "old.c3.journal").exists()
    tiny = ContextStore(tmp_path, empty, max_bytes=10)
    with pytest.raises(ApiError, match="this context is larger than the store may be") as caught:
        add(tiny, "e")
    assert caught.value.status == 413
    assert tiny.ids() == []


def test_a_context_that_is_being_written_is_neither_evicted_nor_deleted(tmp_path, empty, add):
    store = ContextStore(tmp_path, empty, max_bytes=2000)
    with store.writing("busy") as path:
        path.write_bytes(b"x" * 1500)
        os.utime(path, (0, 0))
        with pytest.raises(ApiError, match="being compressed at this moment"):
            store.delete("busy")
        add(store, "other")
        assert "busy" in store


def test_a_context_of_another_model_is_refused(tmp_path, empty, add):
    other = C3Pipeline(make_model(seed=1), make_processor())
    other.compress("a text").save(tmp_path / "theirs.c3")
    store = ContextStore(tmp_path, empty)
    with pytest.raises(ApiError, match="this context was compressed by another model") as caught:
        store.open("theirs")
    assert caught.value.status == 409
    refused = pytest.raises(ApiError, match="this context was compressed by another model")
    with (tmp_path / "theirs.c3").open("rb") as file, refused:
        store.add(file)
    assert store.ids() == ["theirs"]


def test_a_damaged_file_is_an_error_that_names_no_path(tmp_path, empty, add):
    store = ContextStore(tmp_path, empty)
    add(store, "a")
    data = (tmp_path / "a.c3").read_bytes()
    (tmp_path / "a.c3").write_bytes(data[: len(data) // 2])
    with pytest.raises(ApiError, match="the file of this context cannot be read: `path`: a is no whole") as caught:
        store.open("a")
    assert (caught.value.status, str(tmp_path) in caught.value.message) == (500, False)
    # Damaged within the latents: its checksum says so.
    flipped = bytearray(data)
    flipped[-100] ^= 255
    with pytest.raises(ApiError, match=r"this is no compressed context: .* is damaged"):
        store.add(io.BytesIO(flipped))
    assert store.ids() == ["a"]


def test_the_same_text_and_options_are_the_same_id(random_pipe, empty):
    one = context_id_of(b"text", empty, True)
    assert one == context_id_of(b"text", random_pipe.compress(b""), True)
    others = [
        context_id_of(b"texts", empty, True),
        context_id_of(b"text", random_pipe.compress(b"", latent_dtype=torch.int8), True),
        context_id_of(b"text", empty, False),
        context_id_of(b"text", random_pipe.compress(b"", segment_length=16), True),
    ]
    assert len({one, *others}) == 5


def test_a_folder_that_is_none_and_a_size_that_is_none(tmp_path, empty):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`folder` .*file is a file; give a folder"):
        ContextStore(tmp_path / "file", empty)
    with pytest.raises(ValueError, match="`max_bytes` must be above 0, got 0"):
        ContextStore(tmp_path, empty, 0)


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_a_whole_store(tmp_path, empty, add):
    """Killed inside the writing of an upload, when half of it is on the disk."""
    store = ContextStore(tmp_path / "store", empty)
    add(store, "before")
    code = """
import os, signal, sys
from c3_hf.serving.store import ContextStore
from c3_hf.latents import CompressedContext

class Half:
    def __init__(self, file): self.file, self.reads = file, 0
    def seek(self, place): self.file.seek(place); self.seeks = place
    def read(self, size=-1):
        self.reads += 1
        if self.reads > 3: os.kill(os.getpid(), signal.SIGKILL)
        return self.file.read(size if self.reads < 3 else 200)

with open(sys.argv[2], "rb") as file:
    ContextStore(sys.argv[1], CompressedContext.load(sys.argv[2])).add(Half(file))
"""
    upload = tmp_path / "upload.c3"
    upload.write_bytes((tmp_path / "store" / "before.c3").read_bytes())
    process = subprocess.run([sys.executable, "-c", code, str(store.folder), str(upload)], timeout=120)
    assert process.returncode == -9
    again = ContextStore(tmp_path / "store", empty)
    assert again.ids() == ["before"]
    assert len(list(store.folder.iterdir())) == 2  # with the part that was written, which takes room until evicted
    with upload.open("rb") as file:
        assert len(again.open(again.add(file))) == 1
