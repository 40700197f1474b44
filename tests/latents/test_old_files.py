"""A file that c3_hf 0.1 wrote (by the code before commit 603bda0: a model of ramp weights, int8, byte-exact and
measured) is read, measured and restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

from c3_hf import C3Pipeline, C3Processor, CompressedContext
from factories import NUM_LATENTS, make_tokenizer
from ramp_golden import ramp_model


TEXT = "The night train left the harbour a little after nine, and nobody on the pier looked up. Cafe\u0301, \u212b."
FILE = Path(__file__).parent / "data" / "written_by_0.1.c3"


@pytest.fixture(scope="module")
def pipe():
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    # One that does not keep every character.
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), backend.normalizer])
    return C3Pipeline(ramp_model(), C3Processor(tokenizer, num_latents=NUM_LATENTS))


def test_it_is_read_and_restored_to_the_byte(pipe):
    context = CompressedContext.load(FILE)
    context.check()
    assert pipe.restore(context).data == TEXT.encode()
    assert (context.num_lost_characters, context.header.min_segment_length) == (None, None)
    # Nothing comes back without the corrections; the file says nothing of calibration.
    assert [fidelity.token_accuracy for fidelity in context.fidelity] == [0.0] * 4
    assert context.expected_precision() == [0.0] * 4


def test_it_is_what_compressing_again_gives(pipe, tmp_path):
    old = CompressedContext.load(FILE)
    new = pipe.compress(TEXT, exact=True, verify=True, latent_dtype=torch.int8, segment_length=32)
    torch.testing.assert_close(new.dense_latents(), old.dense_latents(), atol=0.05, rtol=0)
    torch.testing.assert_close(new.margins, old.margins, atol=0.05, rtol=0)
    assert pipe.verify(old, TEXT).num_lost_characters == new.num_lost_characters > 0
    (old + new).save(tmp_path / "both.c3")
    assert pipe.restore(CompressedContext.load(tmp_path / "both.c3")).text == TEXT * 2
