"""Segment lengths for a target fidelity: the target is reached, or said to be out of reach; passes are bounded."""

from __future__ import annotations

import math

import pytest
import torch

from c3_hf import compress, restore
from c3_hf.latents.measure import MeasuredSegment, fit_segments
from c3_hf.latents.segments import iter_segments
from factories import make_tokenizer


TOKENIZER = make_tokenizer()


def cut(source, limit):
    return iter_segments(source, TOKENIZER, limit)


def measure_with_reach(reach, passes):
    """A model that gets every token right up to `reach` tokens (fewer where digits are), and none behind."""

    def measure(segments):
        passes.append(sum(len(segment.token_ids) for segment in segments))
        measured = []
        for segment in segments:
            limit = reach // 4 if any(char.isdigit() for char in segment.text) else reach
            margins = torch.ones(len(segment.token_ids) + 1)
            margins[limit:] = -1
            measured.append(MeasuredSegment(segment, torch.zeros(4, 8), None, None, margins))
        return measured

    return measure


@pytest.mark.parametrize("reach", [80, 100, 150, 400])
def test_every_segment_reaches_the_target_with_bounded_passes(reach):
    text = "word and word again " * 60 + "\n" + "0123456789" * 20 + "\n" + "more words here " * 40
    passes = []
    start = list(iter_segments(text, TOKENIZER, 400))
    fitted = fit_segments(start, measure_with_reach(reach, passes), cut, target=1.0, shortest=16)
    assert "".join(item.segment.text for item in fitted) == text
    assert all(item.fidelity.token_accuracy == 1.0 for item in fitted)
    assert len(passes) <= 2 + math.log(400 / 16) / math.log(1 / 0.8)
    assert sum(passes) <= len(passes) * len(text)
    # Where it is easy, segments stay long.
    plain = [len(item.segment.token_ids) for item in fitted if not any(c.isdigit() for c in item.segment.text)]
    assert max(plain) > reach / 2


def test_the_reach_is_the_longest_start_that_is_good_enough():
    segment = next(iter_segments("0123456789", TOKENIZER, 16))
    margins = torch.tensor([1.0, 1, 1, -1, 1, 1, 1, 1, -1, -1, 1])
    reaches = {0.5: 10, 0.8: 8, 0.75: 9, 1.0: 3, 0.9: 3}
    for target, reach in reaches.items():
        assert MeasuredSegment(segment, torch.zeros(1), None, None, margins).reach(target) == reach
    assert MeasuredSegment(segment, torch.zeros(1), None, None, None).reach(1.0) == 10
    assert MeasuredSegment(segment, torch.zeros(1), None, None, -margins.abs()).reach(0.5) == 0


def test_what_never_comes_back_is_not_cut_for_nothing():
    passes = []
    start = list(iter_segments("some words that never come back " * 30, TOKENIZER, 200))
    fitted = fit_segments(start, measure_with_reach(0, passes), cut, target=0.9, shortest=20)
    assert [item.segment.text for item in fitted] == [segment.text for segment in start]
    assert all(item.fidelity.token_accuracy < 0.9 for item in fitted)
    assert len(passes) > 1


def test_a_part_that_never_comes_back_does_not_keep_the_rest_from_its_target():
    def measure(segments):
        measured = measure_with_reach(40, [])(segments)
        for item in measured:
            for place, token in enumerate(TOKENIZER.convert_ids_to_tokens(item.segment.token_ids)):
                if token.isdigit():
                    item.margins[place] = -1
        return measured

    text = "good words " * 12 + "0123456789" * 2 + "more good words " * 12
    fitted = fit_segments(list(iter_segments(text, TOKENIZER, 100)), measure, cut, target=1.0, shortest=16)
    assert "".join(item.segment.text for item in fitted) == text
    missed = "".join(item.segment.text for item in fitted if item.fidelity.token_accuracy < 1.0)
    assert "0123456789" * 2 in missed
    assert len(missed) < 100


def test_compressing_to_a_target_reports_passes_and_misses(model, processor):
    text = "A random model brings nothing back. " * 4
    context = compress(text, model, processor, target_fidelity=0.5, segment_length=64, exact=True)
    assert context.header.target_fidelity == 0.5
    assert 1 < context.header.passes < 2 + math.log(64 / 16) / math.log(1 / 0.8)
    assert all(segment.token_accuracy < 0.5 for segment in context.fidelity)
    assert restore(context, model, processor).text == text
    easy = compress(text, model, processor, target_fidelity=1e-9, segment_length=64)
    assert easy.header.passes >= 1
