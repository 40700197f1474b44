"""Files whose checksums are right and whose content is not: a ValueError that names file and field, at little cost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import struct
import sys
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from c3_hf import CompressedContext, compress, restore, verify
from c3_hf.latents.exact import Residual
from c3_hf.latents.file import INDEX, segment_checksums, tensor_bytes


TEXT = "The keeper of the light counted the ships twice, as his father had.\n\n“Eleven,” he said — 数到第十一艘."


@pytest.fixture(scope="module")
def parts(model, processor, tmp_path_factory):
    """Header entries and tensors of a byte-exact file with fidelity, and of a plain one."""
    made = {}
    for kind, options in {"exact": {"exact": True, "verify": True}, "plain": {}}.items():
        path = tmp_path_factory.mktemp(kind) / "good.c3"
        context = compress(
            TEXT, model, processor, segment_length=32, latent_dtype=torch.float32, output=path, **options
        )
        made[kind] = (dataclasses.asdict(context.header), load_file(path))
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bad.c3"


def write_crafted(path, context, tensors, sums=True):
    """A file with right checksums around whatever `context` (JSON text, or what becomes it) and `tensors` are."""
    text = context if isinstance(context, str) else json.dumps(context, sort_keys=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if sums:
        with contextlib.suppress(Exception):
            tensors["checksums"] = segment_checksums(tensors)
    checksum = zlib.crc32(text.encode())
    for name in INDEX:
        checksum = zlib.crc32(tensor_bytes(tensors[name]), checksum) if name in tensors else checksum
    metadata = {"format": "c3-context", "version": "1", "context": text, "crc32": f"{checksum:08x}"}
    path.write_bytes(save(tensors, metadata))


def write_declared(path, entries, metadata, data=b""):
    """A safetensors file that declares whatever `entries` say."""
    head = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def use(path, model, processor):
    """Everything that reads a file."""
    context = CompressedContext.load(path)
    context.check()
    repr(context)
    _ = (context.fidelity, context.compression_ratio)
    if context.is_exact:
        [context.segment_residual(index) for index in range(len(context))]
    context.context_latents(model)
    restore(context, model, processor, batch_size=4)
    verify(context, TEXT, model, processor)


@contextlib.contextmanager
def little_memory():
    """Fails where the process grew by more than 100 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    if sys.platform.startswith("linux"):
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_is_crafted_here_is_read_when_it_is_right(parts, path, model, processor):
    for context, tensors in parts.values():
        write_crafted(path, context, tensors)
        use(path, model, processor)


@pytest.mark.parametrize("name", [*INDEX, "latents", "margins", "digests", "residual"])
@pytest.mark.parametrize("shape", ["none", "one more", "one less", "empty"])
def test_tensors_of_other_dimensions_are_refused(parts, path, name, shape):
    context, tensors = parts["exact"]
    tensors = {"strides": torch.ones(len(tensors["latents"]), dtype=torch.int64), **tensors}
    tensor = tensors[name]
    changed = {
        "none": tensor.flatten()[0],
        "one more": tensor.unsqueeze(-1),
        "one less": tensor.flatten() if tensor.dim() > 1 else tensor.flatten()[0],
        "empty": tensor[:0],
    }[shape]
    write_crafted(path, context, {**tensors, name: changed}, sums=False)
    field = f"`{name}`" if shape != "empty" or name != "latents" else "segments"
    with pytest.raises(ValueError, match=rf"`path`: .*bad.c3 .*{field}"):
        CompressedContext.load(path)


@pytest.mark.parametrize("value", [None, True, "4", -1, 0, 2**70, 4.0, [4], {"a": 1}])
@pytest.mark.parametrize("name", ["num_latents", "hidden_size", "segment_length"])
def test_header_entries_that_are_no_number_of_things_are_refused(parts, path, name, value):
    context, tensors = parts["plain"]
    write_crafted(path, {**context, name: value}, tensors)
    with pytest.raises(ValueError, match=rf"`header`: the entry `{name}` of .*bad.c3 is .*, expected int from 1 up"):
        CompressedContext.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 7) for name in ("model", "tokenizer", "text_sha256", "source", "writer")],
        *[(name, None) for name in ("model", "tokenizer")],
        *[("text_sha256", value) for value in ([], {}, False)],
        *[(name, value) for name in ("target_fidelity", "exact_margin", "passes") for value in ("1", -1.0, True, [])],
        ("passes", float("nan")),
        ("passes", float("inf")),
    ],
)
def test_header_entries_of_other_types_are_refused(parts, path, name, value):
    context, tensors = parts["plain"]
    write_crafted(path, {**context, name: value}, tensors)
    with pytest.raises(ValueError, match=rf"`header`: the entry `{name}` of .*bad.c3 is .*, expected "):
        CompressedContext.load(path)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("[" * 10_000 + "]" * 10_000, r"the header `context` of .*bad.c3 is no JSON"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, r"the header `context` of .*bad.c3 is no JSON"),
        ('{"num_latents": ' + "9" * 6000 + "}", r"the header `context` of .*bad.c3 is no JSON"),
        ("", r"the header `context` of .*bad.c3 is no JSON"),
        ("[1, 2]", r"the header `context` of .*bad.c3 is a JSON list, expected an object"),
        ("null", r"the header `context` of .*bad.c3 is a JSON NoneType"),
        ("{}", r"`header` lacks .*; .*bad.c3 was not written by c3_hf"),
    ],
)
def test_a_header_that_is_no_header_is_refused(parts, path, context, message):
    write_crafted(path, context, parts["plain"][1])
    with pytest.raises(ValueError, match=message):
        CompressedContext.load(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"latents": {"dtype": "F32", "shape": [0, 2**63, 2], "data_offsets": [0, 0]}}, r"`latents` of .*bad.c3"),
        ({"latents": {"dtype": "F32", "shape": [0, 2**45, 2**45], "data_offsets": [0, 0]}}, r"`latents` of .*bad.c3"),
        ({"latents": {"dtype": "F6_E2M3", "shape": [0, 4], "data_offsets": [0, 0]}}, r"`latents` of .* F6_E2M3"),
        ({"latents": {"dtype": "C64", "shape": [0, 4, 4], "data_offsets": [0, 0]}}, r"`latents` of .* dtype C64"),
        ({"latents": {"dtype": "F32", "shape": [1, 4, 4], "data_offsets": [0, 64]}}, r"bad.c3 is no whole safetens"),
        ({}, r"bad.c3 is damaged: it lacks tensors"),
    ],
)
def test_tensors_that_claim_anything_are_refused(path, entries, message):
    empty = {"shape": [0], "data_offsets": [0, 0]}
    others = {
        name: {"dtype": "I64", **empty} for name in ("char_offsets", "byte_offsets", "token_offsets", "checksums")
    }
    others["digests"] = {"dtype": "U8", "shape": [0, 32], "data_offsets": [0, 0]}
    write_declared(path, {**others, **entries} if entries else {}, {"format": "c3-context", "version": "1"})
    with pytest.raises(ValueError, match=message), little_memory():
        CompressedContext.load(path)


def test_a_safetensors_header_nested_deep_is_refused(path):
    head = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(ValueError, match=r"bad.c3 is no whole safetensors file"):
        CompressedContext.load(path)


@pytest.mark.parametrize("giant", [10**13, 2**62])
def test_giant_token_offsets_are_refused_before_anything_is_allocated(parts, path, model, processor, giant):
    context, tensors = parts["plain"]
    offsets = tensors["token_offsets"].clone()
    offsets[3:] += giant
    write_crafted(path, context, {**tensors, "token_offsets": offsets})
    loaded = CompressedContext.load(path)
    message = r"segment 2 of .*bad.c3 is damaged: `token_offsets` give it [\d,]+ tokens, the decoder has positions for"
    with pytest.raises(ValueError, match=message), little_memory():
        restore(loaded, model, processor)
    with pytest.raises(ValueError, match=message):
        restore(loaded[2:], model, processor)
    write_crafted(path, parts["exact"][0], {**parts["exact"][1], "token_offsets": offsets})
    with pytest.raises(ValueError, match=r"bad.c3 contradicts itself \(`margins` has \d+ entries for \d+ tokens"):
        CompressedContext.load(path)


@pytest.mark.parametrize("name", ["char_offsets", "byte_offsets"])
@pytest.mark.parametrize("change", ["giant", "negative", "overflowing"])
def test_giant_text_offsets_are_refused(parts, path, name, change):
    context, tensors = parts["plain"]
    offsets = tensors[name].clone()
    if change == "giant":
        offsets[3:] += 10**13
    elif change == "negative":
        offsets -= 5
    else:
        offsets[0], offsets[-1] = -(2**63), 2**63 - 1
    write_crafted(path, context, {**tensors, name: offsets})
    with pytest.raises(ValueError, match=r"bad.c3 contradicts itself \(.*(`byte_offsets`|`char_offsets`)"):
        CompressedContext.load(path)


def with_records(tensors, records):
    lengths = [0, *map(len, records)]
    return {
        **tensors,
        "residual": torch.tensor(list(b"".join(records)), dtype=torch.uint8),
        "residual_offsets": torch.tensor(lengths).cumsum(0),
    }


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Residual(((10**6, 5),)).encode(), r"the `residual` of segment 2 of .*bad.c3 .* corrects token 1000000 of a"),
        (Residual(((2**62, 5),)).encode(), r"the `residual` of segment 2 of .*bad.c3 .* corrects token 4611"),
        (
            Residual(((0, 10**9),)).encode(),
            r"the `residual` of segment 2 of .*bad.c3 .* token id 1000000000, the model",
        ),
        (Residual(((0, 2**63),)).encode(), r"the `residual` of segment 2 of .*bad.c3 .* token id 9223372036854775808"),
        (Residual(stored=b"x" * 10**6).encode(), r"the `residual` of segment 2 of .*bad.c3 .* stores other than the"),
        (b"\x02nonsense", r"the `residual` of segment 2 of .*bad.c3 is damaged: .* broken zlib stream"),
        (b"\x09", r"the `residual` of segment 2 of .*bad.c3 is damaged: .* kind byte"),
    ],
)
def test_records_out_of_range_name_file_and_segment(parts, path, model, processor, record, message):
    context, tensors = parts["exact"]
    offsets = tensors["residual_offsets"].tolist()
    whole = bytes(tensors["residual"].tolist())
    kept = [whole[start:end] for start, end in itertools.pairwise(offsets)]
    records = [*kept[:2], record, *kept[3:]]
    write_crafted(path, context, with_records(tensors, records))
    loaded = CompressedContext.load(path)
    with pytest.raises(ValueError, match=message), little_memory():
        restore(loaded, model, processor)
    # A slice still knows which segment of the file it is.
    with pytest.raises(ValueError, match=message):
        restore(loaded[2:4], model, processor)


def test_latents_of_another_shape_than_the_models_are_refused(parts, path, model, processor):
    context, tensors = parts["plain"]
    wide = torch.zeros(len(tensors["latents"]), 4, 30)
    write_crafted(path, {**context, "hidden_size": 30}, {**tensors, "latents": wide})
    with pytest.raises(ValueError, match=r"`latents` of .*bad.c3 are 4 of width 30 .* the model makes 4 of width 24"):
        restore(CompressedContext.load(path), model, processor)


def test_every_message_about_a_damaged_segment_names_its_file(parts, tmp_path, model, processor):
    context, tensors = parts["plain"]
    for name in ("one.c3", "two.c3"):
        write_crafted(tmp_path / name, context, tensors)
    data = bytearray((tmp_path / "two.c3").read_bytes())
    where = data.find(tensors["latents"][1].numpy().tobytes())
    data[where + 7] ^= 1
    (tmp_path / "two.c3").write_bytes(data)
    one, two = (CompressedContext.load(tmp_path / name) for name in ("one.c3", "two.c3"))
    named = r"segment 1 of .*two.c3 \(and 0 more\) is damaged"
    for damaged in (two, two[1:3], two[1], one + two, one[2:] + two[1:]):
        for call in (
            damaged.check,
            damaged.dense_latents,
            lambda damaged=damaged: damaged.context_latents(model),
            lambda damaged=damaged: damaged.content_parts(model),
            lambda damaged=damaged: restore(damaged, model, processor),
        ):
            with pytest.raises(ValueError, match=named):
                call()
    one.check()
    assert (one + two).name.count(".c3") == 2
    with pytest.raises(ValueError, match=r"differs from the text that was compressed, in segment 0 of .*one.c3"):
        verify(one, "x" + TEXT, model, processor)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 300)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["exact", "plain"]))
def test_any_change_is_read_or_refused_with_the_file(parts, path, model, processor, data, kind):
    """Right checksums around anything: a ValueError that names the file (or the text that differs), or a context."""
    context, tensors = parts[kind]
    context, tensors = dict(context), dict(tensors)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            context[data.draw(st.sampled_from(sorted(context)))] = data.draw(VALUES)
            continue
        name = data.draw(st.sampled_from(sorted(tensors.keys() - {"checksums"})))
        change = data.draw(st.sampled_from(["flatten", "shorten", "scalar", "number", "bytes", "drop"]))
        if change == "drop":
            del tensors[name]
        elif change == "number" and tensors[name].dtype == torch.int64 and tensors[name].dim() == 1:
            tensors[name] = tensors[name].clone()
            tensors[name][data.draw(st.integers(0, len(tensors[name]) - 1))] = data.draw(NUMBERS)
        elif change == "bytes" and tensors[name].dtype == torch.uint8 and tensors[name].dim() == 1:
            tensors[name] = tensors[name].clone()
            tensors[name][data.draw(st.integers(0, len(tensors[name]) - 1))] = data.draw(st.integers(0, 255))
        else:
            flat = tensors[name].flatten()
            tensors[name] = {"flatten": flat, "scalar": flat[0]}.get(change, tensors[name][:-1])
        if not len(tensors) or name not in tensors or tensors[name].dim() == 0:
            break
    write_crafted(path, context, tensors)
    message = None
    with little_memory():
        try:
            use(path, model, processor)
        except ValueError as error:
            message = str(error)
    assert message is None or "bad.c3" in message
