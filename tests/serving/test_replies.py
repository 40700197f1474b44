"""Text out of tokens, one by one, and places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st


pytest.importorskip("fastapi", reason="needs the extra serve")

from c3_hf.serving.protocol import ApiError
from c3_hf.serving.replies import Places, TextStream
from factories import make_processor


PROCESSOR = make_processor()  # one token a byte


def stream(data, stop=()):
    """The pieces that a stream of these bytes gives, and whether it was stopped."""
    text, pieces = TextStream(PROCESSOR, stop), []
    for token in PROCESSOR.reader.read_plain([data])[0][0]:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, True
    return [*pieces, text.rest()], False


@given(text=st.text(alphabet="ab中é <", max_size=20), stop=st.lists(st.text(alphabet="ab中é", min_size=1, max_size=3)))
def test_the_pieces_are_the_text_up_to_the_first_stop_string(text, stop):
    pieces, stopped = stream(text, stop)
    ends = [text.find(word) + len(word) for word in stop if word in text]
    if ends:
        # The one that is complete first; among those, the one that begins first.
        end = min(ends)
        begins = [text[:end].find(word) for word in stop if word in text[:end]]
        text = text[: min(begins)]
    assert stopped == bool(ends)
    assert "".join(pieces) == text


def test_a_character_comes_whole_and_what_may_be_a_stop_string_is_held_back():
    assert stream("中a")[0] == ["", "", "中", "a", ""]
    assert stream("xSTy", ["STOP"])[0] == ["x", "", "", "STy", ""]
    text = TextStream(PROCESSOR)
    first = PROCESSOR.reader.read_plain(["中"])[0][0][0]
    assert (text.push(first), text.rest()) == ("", "\ufffd")
    assert TextStream(PROCESSOR, ["ab"]).push(PROCESSOR.reader.read_plain(["a"])[0][0][0], last=True) == "a"


def test_places_are_given_back():
    places = Places(3, "places for tea")
    with (
        pytest.raises(ApiError, match="this request needs 4 places for tea at once; the server has 3"),
        places.taken(4),
    ):
        pass
    full = pytest.raises(ApiError, match="all 3 places for tea of the server are taken")
    with places.taken(2), full as caught, places.taken(2):
        pass
    assert (caught.value.status, caught.value.headers()) == (429, {"retry-after": "1"})
    assert places.used == 0
