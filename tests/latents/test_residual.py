"""Residual records: what goes in comes out, edits turn one text into the other, damage is noticed."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c3_hf.latents.residual import Edit, Residual, apply_edits, find_edits


CORRECTIONS = st.dictionaries(st.integers(0, 5000), st.integers(0, 200_000)).map(lambda d: tuple(sorted(d.items())))
EDITS = st.lists(st.builds(Edit, st.integers(0, 300), st.integers(0, 300), st.binary(max_size=20))).map(tuple)


@given(CORRECTIONS, EDITS)
def test_corrections_and_edits_survive(corrections, edits):
    residual = Residual(corrections, edits)
    assert Residual.decode(residual.encode()) == residual


@given(st.binary(max_size=300))
def test_stored_bytes_survive_in_the_smaller_form(data):
    record = Residual(stored=data).encode()
    assert Residual.decode(record).stored == data
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
    assert Residual.decode(b"") == Residual()


def test_positions_are_coded_by_distance():
    # kind, count, 3 records of distance and id, no edits
    assert Residual(((0, 5), (1, 6), (100, 7))).encode() == bytes([0, 3, 0, 5, 0, 6, 98, 7, 0])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\x07", r"`record` must start with a kind byte 0, 1 or 2, got 7"),
        (b"\x02nonsense", r"`record` holds a broken zlib stream"),
        (b"\x00\x01\x05", r"`record` ends at byte 3, in the middle of a field"),
        (b"\x00\x00\x00rest", r"`record` has 4 bytes behind its end"),
        (b"\x00" + b"\xff" * 12, r"`record` has a number of more than 64 bits"),
    ],
)
def test_broken_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Residual.decode(record)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(record):
    try:
        residual = Residual.decode(record)
    except ValueError:
        return
    assert Residual.decode(residual.encode()) == residual


def test_edits_behind_the_end_are_refused():
    with pytest.raises(ValueError, match=r"`edits` reach byte 9 of a text of 3 bytes"):
        apply_edits(b"abc", [Edit(2, 7, b"")])
