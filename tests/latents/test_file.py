"""The file and the journal: read back as written, damage noticed, nothing that was finished lost."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import struct
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from c3_hf import CompressedContext, compress, restore
from c3_hf.latents.file import Journal, tensor_bytes, write_file


def assert_same(first, second):
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.c3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("extra", [{}, {"verify": True}, {"verify": True, "exact": True}])
def test_a_file_reads_back_as_written(compressed, path, dtype, extra):
    context = compressed(latent_dtype=dtype, **extra)
    context.save(path)
    loaded = CompressedContext.load(path)
    assert loaded.header == context.header
    assert_same(loaded, context)
    loaded.check()
    assert os.listdir(path.parent) == ["text.c3"]


def test_it_is_plain_safetensors_with_aligned_tensors(compressed, path):
    context = compressed(verify=True, exact=True)
    context.save(path)
    # The library's own reader, which knows nothing of contexts.
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, context.tensors()[name])
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in context.tensors().items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
    assert header["__metadata__"]["format"] == "c3-context"


def test_one_segment_is_read_without_the_rest(compressed, path):
    """Bytes of other segments may be damaged: they are not looked at."""
    context = compressed()
    context.save(path)
    data = bytearray(path.read_bytes())
    third = bytes(tensor_bytes(context.latents[3]))
    where = data.find(third)
    data[where + 7] ^= 1
    path.write_bytes(data)
    damaged = CompressedContext.load(path)
    assert torch.equal(damaged[2].dense_latents(), context[2].dense_latents())
    with pytest.raises(ValueError, match=r"segment 3 of .*text.c3 \(and 0 more\) is damaged"):
        damaged[3].dense_latents()
    with pytest.raises(ValueError, match=r"segment 3 of .*text.c3 \(and 0 more\) is damaged"):
        damaged.check()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_latents_are_mapped_not_read(model, processor, path):
    context = compress("word " * 40, model, processor, segment_length=16, latent_dtype=torch.float32)
    wide = 4000
    header = {**json.loads(json.dumps(vars(context.header))), "hidden_size": wide}
    piece = dict(context.tensors())
    piece["latents"] = torch.zeros(len(context), 4, wide)
    pieces = [piece] * 50
    write_file(path, header, lambda: iter(pieces))
    assert path.stat().st_size > 30e6
    before = resident_bytes()
    loaded = CompressedContext.load(path)
    loaded[7].latents.sum()
    assert resident_bytes() - before < 8e6
    loaded.latents.sum()
    assert resident_bytes() - before > 30e6


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pieces_are_joined_with_offsets_going_on(compressed, path):
    context = compressed(verify=True, exact=True, latent_dtype=torch.int8)
    pieces = [context[:2].tensors(), context[2:2].tensors(), context[2:].tensors()]
    write_file(path, vars(context.header), lambda: iter(pieces))
    assert_same(CompressedContext.load(path), context)
    with pytest.raises(ValueError, match=r"`pieces` is empty"):
        write_file(path, {}, list)
    with pytest.raises(ValueError, match=r"`pieces` differ in dtype or width of `latents`"):
        write_file(path, {}, lambda: [context.tensors(), {**context.tensors(), "latents": context.latents.float()}])
    assert_same(CompressedContext.load(path), context)


def test_any_flipped_bit_is_noticed(compressed, path):
    """Header, index and payload alike: an error or (in padding) the same content, never other content."""
    context = compressed("Some words, of which none may change.", verify=True, exact=True, latent_dtype=torch.int8)
    context.save(path)
    data = path.read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(data)), 150):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = CompressedContext.load(path)
            loaded.check()
        except ValueError:
            continue
        assert loaded.header == context.header, position
        assert_same(loaded, context)


def test_any_truncation_is_noticed(compressed, path):
    compressed(exact=True).save(path)
    data = path.read_bytes()
    for length in [0, 4, 8, 50, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"`path`: .* is no whole safetensors file"):
            CompressedContext.load(path)


def change_metadata(path, **changes):
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    save_file(load_file(path), path, {**metadata, **changes})


def test_other_files_are_refused_with_a_reason(compressed, path):
    context = compressed()
    with pytest.raises(FileNotFoundError):
        CompressedContext.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is not a compressed context: its metadata entry `format` is None"):
        CompressedContext.load(path)
    context.save(path)
    change_metadata(path, version="2")
    with pytest.raises(ValueError, match=r"has format version '2', this reader knows 1. Update c3_hf"):
        CompressedContext.load(path)
    context.save(path)
    change_metadata(path, context="{}")
    with pytest.raises(ValueError, match=r"the header of .* is damaged \(its checksum differs\)"):
        CompressedContext.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digests": None}, r"it lacks tensors \['digests'\] or has unknown ones \[\]"),
        ({"more": torch.zeros(1)}, r"unknown ones \['more'\]"),
        ({"char_offsets": torch.zeros(3)}, r"tensor `char_offsets` .* has dtype torch.float32"),
        ({"latents": torch.zeros(3, 4)}, r"`latents` has 2 dimensions instead of 3"),
        ({"digests": torch.zeros(2, 32, dtype=torch.uint8)}, r"`digests` has 2 rows for \d+ segments"),
        ({"latent_scales": "absent"}, r"`latent_scales` goes with int8 latents and with nothing else"),
        ({"residual_offsets": None}, r"`residual` and `residual_offsets` come together"),
        ({"token_offsets": "backwards"}, r"offsets go backwards"),
        ({"margins": torch.zeros(5, dtype=torch.float16)}, r"`margins` has 5 entries for \d+ tokens"),
        ({"residual": torch.zeros(1, dtype=torch.uint8)}, r"`residual` has 1 bytes, its offsets end elsewhere"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(compressed, path, change, message):
    tensors = compressed(verify=True, exact=True, latent_dtype=torch.float32).tensors()
    for name, value in change.items():
        if value is None:
            del tensors[name]
        elif isinstance(value, str):
            backwards = tensors["token_offsets"].flip(0)
            tensors[name] = backwards if value == "backwards" else torch.zeros(len(tensors["latents"]), 4)
        else:
            tensors[name] = value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    change_metadata_to_context(path)
    with pytest.raises(ValueError, match=message):
        CompressedContext.load(path)


def change_metadata_to_context(path):
    save_file(load_file(path), path, {"format": "c3-context", "version": "1", "context": "{}", "crc32": ""})


def journal_of(path):
    return path.with_name(path.name + ".journal")


class Killed(BaseException):
    """Ends a call as abruptly as an exception can."""


@pytest.mark.parametrize("extra", [{}, {"exact": True, "latent_dtype": torch.int8}, {"target_fidelity": 0.5}])
def test_an_interrupted_run_goes_on_where_it_was(model, processor, text, path, monkeypatch, extra):
    text = text[:250]
    options = {"segment_length": 32, "batch_size": 1, "latent_dtype": torch.float32, "output": path, **extra}
    whole = compress(text, model, processor, **{**options, "output": None})
    append = Journal.append
    written = itertools.count()

    def append_until_killed(journal, tensors):
        append(journal, tensors)
        if next(written) % 2:
            raise Killed

    monkeypatch.setattr(Journal, "append", append_until_killed)
    calls = 0
    while not path.exists():
        calls += 1
        try:
            resumed = compress(text, model, processor, **options)
        except Killed:
            assert Journal(journal_of(path)).num_records == 2 * calls
    assert calls > 1
    assert_same(resumed, whole)
    assert resumed.header.text_sha256 == whole.header.text_sha256
    assert os.listdir(path.parent) == ["text.c3"]


def test_a_torn_record_costs_that_record_only(model, processor, text, path):
    text = text * 2
    options = {"segment_length": 32, "batch_size": 1, "latent_dtype": torch.float32}
    whole = compress(text, model, processor, **options)
    journal_path = journal_of(path)

    def pieces_until(count):
        for start in range(0, 40 * count, 40):
            yield text[start : start + 40]
        raise Killed

    with pytest.raises(Killed):
        compress(pieces_until(14), model, processor, output=path, **options)
    data = journal_path.read_bytes()
    records = Journal(journal_path).num_records
    assert records > 1
    rng = random.Random(0)
    for length in [0, 10, *rng.sample(range(len(data)), 5)]:
        journal_path.write_bytes(data[:length])
        assert Journal(journal_path).num_records <= records
        assert_same(compress(text, model, processor, output=path, **options), whole)
        assert not journal_path.exists()


@pytest.mark.parametrize("tail", [bytes(8), bytes(4096), bytes(3), b"\xff" * 8 + bytes(50)])
def test_zeros_behind_the_last_record_cost_nothing(model, processor, text, path, tail):
    """A crash can leave a file longer than what had reached the disk: the rest reads as zeros."""
    options = {"segment_length": 32, "batch_size": 1, "latent_dtype": torch.float32}
    whole = compress(text, model, processor, **options)

    def broken_off():
        yield text[:200]
        raise Killed

    with pytest.raises(Killed):
        compress(broken_off(), model, processor, output=path, **options)
    records = Journal(journal_of(path)).num_records
    assert records > 0
    with journal_of(path).open("ab") as file:
        file.write(tail)
    assert Journal(journal_of(path)).num_records == records
    assert_same(compress(text, model, processor, output=path, **options), whole)


@pytest.mark.parametrize("start", [b"", b"c3-context journal 1\n", b"c3-con"])
def test_a_journal_of_zeros_is_begun_anew(model, processor, text, path, start):
    journal_of(path).write_bytes(start + bytes(100))
    assert Journal(journal_of(path)).num_records == 0
    options = {"segment_length": 32, "latent_dtype": torch.float32}
    assert_same(compress(text, model, processor, output=path, **options), compress(text, model, processor, **options))


def test_a_journal_record_cannot_claim_a_large_read(path):
    journal_of(path).write_bytes(b"c3-context journal 1\n" + struct.pack("<II", 2**32 - 1, 5))
    tracemalloc.start()
    assert Journal(journal_of(path)).num_records == 0
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("payload", [b"x", b"\x00" * 8, b"\x02" + bytes(7) + b"{}", struct.pack("<Q", 2**40)])
def test_a_whole_record_that_is_no_group_names_the_journal(path, payload):
    header = b"{}"
    records = [struct.pack("<II", len(data), zlib.crc32(data)) + data for data in (header, payload)]
    journal_of(path).write_bytes(b"c3-context journal 1\n" + b"".join(records))
    with pytest.raises(ValueError, match=r"text.c3.journal"):
        list(Journal(journal_of(path)).pieces())
    damaged = struct.pack("<II", 2, zlib.crc32(b"[]")) + b"[]"
    journal_of(path).write_bytes(b"c3-context journal 1\n" + damaged + records[1])
    with pytest.raises(ValueError, match=r"the header `context` of .*text.c3.journal is a JSON list"):
        Journal(journal_of(path))


def test_appending_leaves_the_file_whole_until_the_end(model, processor, text, path, monkeypatch):
    options = {"segment_length": 32, "batch_size": 1, "exact": True, "output": path}
    compress(text, model, processor, append=True, **options)
    before = path.read_bytes()
    more = "More of the same, later.\n" * 9
    append = Journal.append
    monkeypatch.setattr(Journal, "append", lambda *args: (append(*args), (_ for _ in ()).throw(Killed)))
    with pytest.raises(Killed):
        compress(more, model, processor, append=True, **options)
    assert path.read_bytes() == before
    monkeypatch.undo()
    context = compress(more, model, processor, append=True, **options)
    assert restore(context, model, processor).data == (text + more).encode()
    assert int(context.char_offsets[-1]) == len(text + more)
    assert context.header.text_sha256 is None
    assert not journal_of(path).exists()


def test_what_does_not_continue_is_refused(model, processor, text, path, tmp_path):
    options = {"segment_length": 32, "batch_size": 1, "output": path}

    def broken_off():
        yield text
        raise Killed

    with pytest.raises(Killed):
        compress(broken_off(), model, processor, **options)
    with pytest.raises(ValueError, match=r"`output`: .* holds an unfinished run with other settings \(segment"):
        compress(text, model, processor, **{**options, "segment_length": 40})
    with pytest.raises(ValueError, match=r"`source` differs from the text that .* was begun with, before char"):
        compress("x" + text, model, processor, **options)
    journal_of(path).write_bytes(b"something else altogether, not a journal")
    with pytest.raises(ValueError, match=r"`path`: .* is no journal of `c3-hf compress`, it starts with b'something"):
        compress(text, model, processor, **options)
    journal_of(path).unlink()
    compress(text, model, processor, **options)
    with pytest.raises(ValueError, match=r"`contexts` differ in dtype"):
        compress(text, model, processor, append=True, latent_dtype=torch.int8, **options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_with_kill_9_it_resumes_without_loss(model, processor, text, path):
    """A real process, a real SIGKILL, at whatever point it has reached by then."""
    options = {"segment_length": 32, "batch_size": 2, "exact": True, "output": path}
    source = text * 4
    rng = random.Random(0)
    kills = 0
    while not path.exists():
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            compress(source, model, processor, **options)
            os._exit(0)
        records = Journal(journal_of(path)).num_records
        deadline = time.monotonic() + 30
        while not path.exists() and Journal(journal_of(path)).num_records <= records and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() / 10)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Nothing that was finished is lost, however the writing of the next group ended.
        assert path.exists() or Journal(journal_of(path)).num_records > records
        kills += 1
    context = CompressedContext.load(path)
    assert kills > 1
    assert restore(context, model, processor, batch_size=64).data == source.encode()
