"""An encoder with a vocabulary of its own: it is asked where to cut, the decoder what comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from c3_hf import CompressedContext, compress, restore, verify
from c3_hf.latents.decoding import Restorer, generation_budget
from c3_hf.latents.fingerprints import fingerprint_processor
from c3_hf.pipeline import C3Pipeline
from factories import make_processor, make_two_vocabularies


MODEL, PROCESSOR = make_two_vocabularies()
PROSE = "then the other one in the tin theatre on the moor thought another thing over, " * 6


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def pieces(context, text):
    """The text of each segment."""
    offsets = context.char_offsets.tolist()
    return [text[start:end] for start, end in pairwise(offsets)]


def test_the_encoders_tokens_are_cut_and_the_decoders_are_stored():
    context = compress(PROSE, MODEL, PROCESSOR, segment_length=32, latent_dtype=torch.float32)
    segments = pieces(context, PROSE)
    read = [count(PROCESSOR.encoder_tokenizer, segment) for segment in segments]
    written = [count(PROCESSOR.tokenizer, segment) for segment in segments]
    assert max(read) <= 32 < max(written)
    # Half of what is allowed is filled at least, but for the end: the budget is not the decoder's.
    assert min(read[:-1]) >= 16
    assert context.token_offsets.diff().tolist() == written
    for index, segment in enumerate(segments):
        fresh = MODEL.get_encoder_latents(torch.tensor([PROCESSOR.tokenize_context(segment)]))[0, 0].detach()
        torch.testing.assert_close(context.latents[index], fresh, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", [PROSE, "caf\u00e9 <|im_end|><img> e\u0301 \u6570\u5230 the end\r\n" * 4])
def test_fidelity_and_exact_restoring_count_the_decoders_tokens(text, tmp_path):
    compress(text, MODEL, PROCESSOR, segment_length=32, exact=True, verify=True, output=tmp_path / "text.c3")
    context = CompressedContext.load(tmp_path / "text.c3")
    lengths = [count(PROCESSOR.tokenizer, segment) for segment in pieces(context, text)]
    assert [fidelity.num_tokens for fidelity in context.fidelity] == lengths
    assert restore(context, MODEL, PROCESSOR).text == text
    again = verify(context, text, MODEL, PROCESSOR).margins.float()
    torch.testing.assert_close(again, context.margins.float(), atol=0.01, rtol=0.01)


def test_a_target_is_fitted_in_the_encoders_tokens(monkeypatch):
    def forty_right(_, latents, sequences, strides):
        return [torch.where(torch.arange(len(ids) + 1) < 40, 1.0, -1.0) for ids in sequences]

    monkeypatch.setattr("c3_hf.latents.compress.measure_margins", forty_right)
    context = compress(PROSE, MODEL, PROCESSOR, segment_length=64, target_fidelity=1.0)
    segments = pieces(context, PROSE)
    assert all(segment.is_exact for segment in context.fidelity)
    assert max(count(PROCESSOR.encoder_tokenizer, segment) for segment in segments) > 16
    assert max(count(PROCESSOR.tokenizer, segment) for segment in segments) in range(32, 40)


def test_a_reply_may_have_as_many_tokens_as_the_decoder_needs(monkeypatch):
    budgets = []

    def generate(_, latents, max_new_tokens, strides):
        budgets.append(max_new_tokens)
        return [[5] * max_new_tokens] * len(latents)

    monkeypatch.setattr(Restorer, "generate", generate)
    restored = C3Pipeline(MODEL, PROCESSOR).round_trip([PROSE[:60], PROSE[:30]])
    assert budgets == [generation_budget(60)]
    assert [len(text) for text in restored] == [generation_budget(60), generation_budget(30)]


def test_a_segment_the_decoder_has_no_room_for_is_refused():
    with pytest.raises(ValueError, match=r"`segment_length` 300 gives a segment of \d+ tokens in the decoder's"):
        compress(" the" * 400, MODEL, PROCESSOR, segment_length=300)


def test_the_encoders_vocabulary_is_part_of_the_fingerprint():
    assert fingerprint_processor(PROCESSOR) != fingerprint_processor(make_processor())
    _, other = make_two_vocabularies()
    assert fingerprint_processor(other) == fingerprint_processor(PROCESSOR)
    other.encoder_tokenizer.add_tokens(["theatre"])
    assert fingerprint_processor(other) != fingerprint_processor(PROCESSOR)
