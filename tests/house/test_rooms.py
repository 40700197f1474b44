"""How many rooms a reader passes: modules of the library that one call goes through, in the order they are entered."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from c3_hf import C3Pipeline
from factories import make_model, make_processor


SOURCE = Path(__file__).parents[2] / "src" / "c3_hf"


def rooms_passed(call) -> list[str]:
    """The modules that are entered, those of the model left out; a room is left when its last function returns."""
    entered: list[str] = []
    inside: list[str] = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(SOURCE):
            return
        room = str(path.relative_to(SOURCE).with_suffix(""))
        if room.startswith("modeling"):
            return
        if event == "call":
            if room not in inside:
                entered.append(room)
            inside.append(room)
        else:
            # From the end: a generator that waits does not return in the order of the calls.
            del inside[len(inside) - 1 - inside[::-1].index(room)]

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [room for room, _ in groupby(entered)]


def test_restoring_passes_six_rooms_and_returns_to_none():
    pipe = C3Pipeline(make_model(), make_processor())
    context = pipe.compress("A text of some length.", segment_length=32)
    # Nothing is known of the pair yet.
    fresh = C3Pipeline(pipe.model, pipe.processor)
    rooms = rooms_passed(lambda: fresh.restore(context))
    assert len(rooms) == len(set(rooms)) <= 6, rooms
    assert {"pipeline", "latents/restore", "latents/context", "latents/decoding"} <= set(rooms)
