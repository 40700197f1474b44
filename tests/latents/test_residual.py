"""Residual records: what goes in comes out, edits turn one text into the other, damage is noticed."""

from __future__ import annotations

import tracemalloc
import unicodedata
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c3_hf.latents.exact import Edit, Residual, apply_edits, find_edits, lost_characters


CORRECTIONS = st.dictionaries(st.integers(0, 5000), st.integers(0, 200_000)).map(lambda d: tuple(sorted(d.items())))
EDITS = st.lists(st.builds(Edit, st.integers(0, 300), st.integers(0, 300), st.binary(max_size=20))).map(tuple)


@given(CORRECTIONS, EDITS)
def test_corrections_and_edits_survive(corrections, edits):
    residual = Residual(corrections, edits)
    assert Residual.decode(residual.encode(), 5001, 0) == residual


@given(st.binary(max_size=300))
def test_stored_bytes_survive_in_the_smaller_form(data):
    record = Residual(stored=data).encode()
    assert Residual.decode(record, 0, len(data)).stored == data
    assert len(record) <= len(data) + 1


@given(st.text(max_size=200))
def test_edits_lead_from_the_normalised_text_to_the_original(text):
    wanted = text.encode("utf-8", "surrogatepass")
    decoded = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
    edits = find_edits(decoded, wanted)
    if edits is not None:
        assert apply_edits(decoded, edits) == wanted
    if decoded == wanted:
        assert edits == ()


@given(st.binary(max_size=120), st.binary(max_size=120))
def test_edits_are_right_or_absent_for_any_two_byte_strings(decoded, wanted):
    edits = find_edits(decoded, wanted)
    assert edits is None or apply_edits(decoded, edits) == wanted


def test_local_changes_cost_a_few_bytes():
    wanted = ("Ame\u0301lie went to the cafe\u0301. " * 50).encode()
    decoded = unicodedata.normalize("NFC", wanted.decode()).encode()
    edits = find_edits(decoded, wanted)
    assert 50 <= len(edits) <= 100
    assert len(Residual(edits=edits).encode()) < 8 * 100


def test_texts_out_of_step_for_long_have_no_edits():
    assert find_edits(b"a" * 200, b"b" * 200) is None


def test_nothing_missing_costs_nothing():
    assert Residual().encode() == b""
    assert Residual.decode(b"", 0, 0) == Residual()


def test_positions_are_coded_by_distance():
    # kind, count, 3 records of distance and id, no edits
    assert Residual(((0, 5), (1, 6), (100, 7))).encode() == bytes([0, 3, 0, 5, 0, 6, 98, 7, 0])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\x07", r"`record` must start with a kind byte 0, 1 or 2, got 7"),
        (b"\x02nonsense", r"`record` holds a broken zlib stream"),
        (b"\x02" + zlib.compress(b"ab")[:-1], r"`record` holds a broken zlib stream: it is cut short"),
        (b"\x02" + zlib.compress(b"ab") + b"x", r"`record` holds a broken zlib stream: it is cut short or goes on"),
        (b"\x02" + zlib.compress(b"abc"), r"`record` stores other than the 2 bytes of its segment"),
        (b"\x01abc", r"`record` stores other than the 2 bytes of its segment"),
        (b"\x00\x01\x09\x05\x00", r"`record` corrects token 9 of a segment of 9"),
        (b"\x00\x01\x05", r"`record` ends at byte 3, in the middle of a field"),
        (b"\x00\x00\x00rest", r"`record` has 4 bytes behind its end"),
        (b"\x00" + b"\xff" * 12, r"`record` has a number of more than 64 bits"),
    ],
)
def test_broken_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Residual.decode(record, 9, 2)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(record):
    try:
        residual = Residual.decode(record, 100, len(record) - 1)
    except ValueError:
        return
    assert Residual.decode(residual.encode(), 100, len(record) - 1) == residual


def test_a_small_record_cannot_claim_a_large_text():
    bomb = b"\x02" + zlib.compress(bytes(50_000_000), 9)
    assert len(bomb) < 60_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"`record` stores other than the 1000 bytes"):
        Residual.decode(bomb, 10, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("wanted", "lost"),
    [
        ("Cafe\u0301 in Ha\u0300 Noi", [3, 4, 10, 11]),
        ("a <\ufdd0b", [3]),
        ("a\udce4b", [1]),
        ("plain", []),
        ("", []),
    ],
)
def test_lost_characters_are_those_that_the_other_text_lacks(wanted, lost):
    decoded = unicodedata.normalize("NFC", wanted).replace("\ufdd0", "").replace("\udce4", "\ufffd")
    assert lost_characters(decoded, wanted) == lost


@pytest.mark.parametrize(
    ("decoded", "wanted", "lost"),
    [(" ab", "ab", [0]), ("a b.", "a b", [2]), ("axb", "ab", [1]), ("xabby", "cab", [0, 2]), (" ", "a", [0])],
)
def test_characters_too_many_are_a_loss(decoded, wanted, lost):
    assert lost_characters(decoded, wanted) == lost


@given(st.text(max_size=120), st.text(min_size=1, max_size=120))
def test_what_is_not_lost_is_in_both_texts_in_order(decoded, wanted):
    lost = lost_characters(decoded, wanted)
    assert lost == sorted(set(lost))
    rest = iter(decoded)
    assert all(char in rest for place, char in enumerate(wanted) if place not in lost)
    assert (decoded == wanted) == (not lost)


def test_a_script_that_is_composed_throughout_loses_all_but_its_spaces():
    wanted = unicodedata.normalize("NFD", "한글 텍스트 입니다 ") * 40
    lost = lost_characters(unicodedata.normalize("NFC", wanted), wanted)
    assert len(lost) == len(wanted) - 3 * 40


def test_edits_behind_the_end_are_refused():
    with pytest.raises(ValueError, match=r"`edits` reach byte 9 of a text of 3 bytes"):
        apply_edits(b"abc", [Edit(2, 7, b"")])
