"""A file that c3_hf 0.1 wrote (with c3-tiny, int8, byte-exact and measured) is read, measured and restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from c3_hf import C3Pipeline, CompressedContext


TEXT = "The night train left the harbour a little after nine, and nobody on the pier looked up. Cafe\u0301, \u212b."
FILE = Path(__file__).parent / "data" / "written_by_0.1.c3"


@pytest.fixture(scope="module")
def pipe():
    return C3Pipeline.from_pretrained(dtype="float32")


def test_it_is_read_and_restored_to_the_byte(pipe):
    context = CompressedContext.load(FILE)
    context.check()
    assert pipe.restore(context).data == TEXT.encode()
    assert (context.num_lost_characters, context.header.min_segment_length) == (None, None)
    assert context.fidelity[0].token_accuracy == 1.0
    # The text as the tokenizer has it comes back without the corrections too; its context says nothing of calibration.
    assert context.expected_precision() == [1.0]


def test_it_is_what_compressing_again_gives(pipe, tmp_path):
    old = CompressedContext.load(FILE)
    new = pipe.compress(TEXT, exact=True, verify=True, latent_dtype=torch.int8)
    torch.testing.assert_close(new.dense_latents(), old.dense_latents(), atol=0.05, rtol=0)
    assert pipe.verify(old, TEXT).num_lost_characters == new.num_lost_characters > 0
    (old + new).save(tmp_path / "both.c3")
    assert pipe.restore(CompressedContext.load(tmp_path / "both.c3")).text == TEXT * 2
