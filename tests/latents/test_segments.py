"""Segments: every character once, in order, within the budget, at natural places, whatever the chunks."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c3_hf.data.samples import cut_to_tokens
from c3_hf.evaluation.items import TokenMeter
from c3_hf.latents.segments import Segment, TextReader, find_cut, iter_segments, iter_text, read_segment
from factories import make_processor


PROCESSOR = make_processor()
TOKENIZER = PROCESSOR.reader
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)


@settings(max_examples=80)
@given(st.binary(max_size=600), st.integers(16, 70), st.integers(1, 50))
def test_segments_partition_any_bytes_within_the_budget(data, length, chunk):
    chunks = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    segments = list(iter_segments(chunks, TOKENIZER, length))
    assert b"".join(segment.data for segment in segments) == data
    assert all(0 < len(segment.token_ids) <= length for segment in segments)
    assert all(segment.text for segment in segments)
    # Where the cuts fall does not depend on the chunks.
    assert segments == list(iter_segments(data, TOKENIZER, length))


@settings(max_examples=60)
@given(ANY_TEXT, st.integers(16, 60))
def test_segments_are_tokenised_as_the_processor_tokenises_contexts(text, length):
    processor = make_processor()
    segments = list(iter_segments(text, processor.tokenizer, length))
    assert "".join(segment.text for segment in segments) == text
    for segment in segments:
        assert list(segment.token_ids) == processor.tokenize_context(segment.text)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One. Two.\n\nThree. Four", 18, "One. Two.\n\n"),
        ("One two. Three four five", 15, "One two."),
        ("“He left.” She stayed there", 15, "“He left.”"),
        ("他来了。她没有来。他又走了", 12, "他来了。她没有来。"),
        ("first line\nsecond line", 16, "first line\n"),
        ("some words without an end", 20, "some words without"),
        ("aaaaaaaaaaaaaaaaaaaa", 12, "aaaaaaaaaaaa"),
        # A paragraph in the first half would waste more than half of the latents.
        ("a\n\nwords upon words upon words", 20, "a\n\nwords upon words"),
        # A combining mark stays with its base.
        ("xxxxxxxxxxe\u0301yyyy", 11, "xxxxxxxxxx"),
        (" aaaaaaaaaaaaa", 10, " aaaaaaaaa"),
    ],
)
def test_cuts_fall_at_natural_places(text, limit, expected):
    assert text[: find_cut(text, limit)] == expected


def test_one_character_of_many_tokens_fits():
    # U+1D160 becomes three characters of four bytes under NFC; the tiny tokenizer has one token a byte.
    text = "\U0001d160" * 9
    assert "".join(segment.text for segment in iter_segments(text, TOKENIZER, 16)) == text


def test_sources_of_every_kind_give_the_same_text(tmp_path):
    text = "Zwei Käse,\r\n三块奶酪 🧀"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    data = text.encode()
    with file.open("rb") as opened:
        assert "".join(iter_text(opened)) == text
    sources = [text, data, bytearray(data), file, io.StringIO(text, newline=""), io.BytesIO(data)]
    sources += [[text[:5], text[5:]], (data[i : i + 1] for i in range(len(data)))]
    for source in sources:
        assert "".join(iter_text(source)) == text


def test_bytes_stay_where_they_were_among_strings():
    for pieces in ([b"a\xc3", "x", b"\xa9"], [b"\xe6\x95", "def"], [b"\xc3", "", b"\xa9"]):
        data = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
        assert "".join(iter_text(pieces)).encode("utf-8", "surrogateescape") == data


def test_bytes_that_are_not_utf8_are_kept_and_read_as_replacement_characters():
    segment = next(iter_segments(b"a\xff\xe4\xb8b", TOKENIZER, 16))
    assert segment.data == b"a\xff\xe4\xb8b"
    assert list(segment.token_ids) == PROCESSOR.tokenize_context("a\ufffd\ufffd\ufffdb")


def test_the_reader_looks_ahead_without_holding_what_is_behind():
    pulled = []

    def pieces():
        for index in range(100):
            pulled.append(index)
            yield "x" * 10

    reader = TextReader(pieces())
    assert reader.peek(5) == "x" * 5
    assert len(pulled) == 1
    assert reader.take(25) == "x" * 25
    assert len(pulled) == 3
    assert len(reader.peek(10_000)) == 975


def test_digests_are_of_the_bytes():
    assert Segment("abc", ()).digest.hex().startswith("ba7816bf")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: list(iter_segments("x", TOKENIZER, 15)), ValueError, r"`segment_length` .* at least 16 .* got 15"),
        (lambda: list(iter_text("a\ud800")), ValueError, r"`source` has the lone surrogate U\+D800"),
        (lambda: list(iter_text(["a", 5])), TypeError, r"`source` must give str or bytes, got a piece of type int"),
        (lambda: list(iter_text(5)), TypeError, r"`source` must be str, bytes, a pathlib.Path, .* got int"),
        # Their order is nobody's, or their values would be left out.
        (lambda: list(iter_text({"a", "b"})), TypeError, r"`source` must be .* pieces in their order, got set"),
        (lambda: list(iter_text({"text": "a"})), TypeError, r"`source` must be .* pieces in their order, got dict"),
    ],
)
def test_what_cannot_be_cut_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"`tokenizer` must be a fast tokenizer, .* got Slow"):
        list(iter_segments("text", Slow(), 16))


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("<|>/im_end \ufdd0e\u0301") | st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_reader_of_plain_text_gives_the_same_tokens_and_places(text):
    """One way to tokenise: the processor, segments, the evaluation's meter and the cuts of training data agree."""
    ids, offsets = PROCESSOR.reader.read_plain([text])[0]
    assert ids == PROCESSOR.tokenize_context(text) == read_segment(PROCESSOR.reader, text)[0]
    assert ids == TokenMeter(PROCESSOR.tokenizer, num_latents=4, segment_tokens=32).encode(text)
    assert PROCESSOR.tokenizer.decode(ids) == text
    for size in range(1, len(ids)):
        cut = cut_to_tokens(PROCESSOR.reader, text, size)
        assert text.startswith(cut)
        assert len(PROCESSOR.tokenize_context(cut)) <= size
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
