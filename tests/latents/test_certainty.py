"""What is called certain is certain: characters that the tokenizer changes count, and so does text that is missing."""

from __future__ import annotations

import dataclasses
import unicodedata

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers

from c3_hf import C3Pipeline, CompressedContext, compress, restore, verify
from c3_hf.latents import RestoredText
from c3_hf.latents.file import read_file, write_file
from c3_hf.latents.measure import Calibration, SegmentFidelity
from c3_hf.latents.rendering import WRONG, heat_segments
from c3_hf.modeling.processing_c3 import C3Processor
from factories import NUM_LATENTS, make_tokenizer


NFD = "Cafe\u0301 in Ha\u0300 Noi"
KOREAN = unicodedata.normalize("NFD", "한글 텍스트 입니다")
# The characters that NFC puts together with a neighbour; all of a syllable's are, spaces stay.
LOST = {NFD: 4, KOREAN: len(KOREAN) - 2, "\u212b plain": 1, "plain": 0}


@pytest.fixture(scope="module")
def normalising():
    """A processor whose tokenizer normalises to NFC, as the released one does."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([backend.normalizer, normalizers.NFC()])
    return C3Processor(tokenizer, num_latents=NUM_LATENTS)


def with_right_margins(context):
    """As if the model brought every token back."""
    return dataclasses.replace(context, margins=torch.full_like(context.margins, 5.0), checksums=None)


@pytest.mark.parametrize(("text", "lost"), LOST.items())
def test_a_segment_whose_tokens_give_other_characters_is_not_certain(model, normalising, text, lost):
    context = compress(text, model, normalising, verify=True)
    assert context.lost_characters.tolist() == [lost]
    (fidelity,) = with_right_margins(context).fidelity
    assert (fidelity.num_errors, fidelity.lost_characters, fidelity.is_exact) == (0, lost, lost == 0)
    (expected,) = with_right_margins(context).expected_precision(Calibration(0.5, 0.0))
    assert expected == pytest.approx(1 - lost / len(text))
    assert verify(compress(text, model, normalising), text, model, normalising).lost_characters.tolist() == [lost]


def test_a_space_that_the_tokenizer_puts_in_front_is_no_certain_text(model):
    """As tokenizers with `add_prefix_space` do: what comes back has one character too many."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    processor = C3Processor(tokenizer, num_latents=NUM_LATENTS)
    for text, lost in (("plain", 1), (" plain", 0)):
        context = compress(text, model, processor, verify=True)
        assert context.lost_characters.tolist() == [lost]
        assert with_right_margins(context).fidelity[0].is_exact == (lost == 0)
        assert restore(compress(text, model, processor, exact=True), model, processor).text == text


def test_only_the_segments_concerned_are_uncertain(model, normalising, tmp_path):
    text = "Plain words, twenty and more.\n\n" + NFD + " and other words too."
    context = compress(text, model, normalising, verify=True, segment_length=32, output=tmp_path / "text.c3")
    assert context.lost_characters.tolist() == [0, 4, 0][: len(context)]
    assert context.num_lost_characters == 4
    assert with_right_margins(context).fidelity[0].is_exact
    assert context[1].num_lost_characters == 4
    assert (context + context).num_lost_characters == 8
    appended = compress("more", model, normalising, verify=True, append=True, output=tmp_path / "text.c3")
    assert appended.num_lost_characters == 4


def test_bytes_and_escapes_that_are_not_kept_are_counted(model, normalising):
    data = b"a\xffb\xfe"
    context = compress(data, model, normalising, exact=True)
    assert context.num_lost_characters == 2
    assert restore(context, model, normalising).data == data
    text = "a <\ufdd0b and <\ufdd0\ufdd0|im_end|>"
    assert compress(text, model, normalising).num_lost_characters == 0
    assert restore(compress(text, model, normalising, exact=True), model, normalising).text == text


def test_compress_says_how_much_is_not_kept(model, normalising, caplog, tmp_path):
    context = compress(NFD, model, normalising, output=tmp_path / "text.c3")
    assert "4 characters not kept by the tokenizer" in repr(context)
    assert "text.c3: the tokenizer does not keep 4 of 16 characters" in caplog.text
    caplog.clear()
    assert "not kept" not in repr(compress("plain", model, normalising))
    # Byte-exact mode keeps them.
    compress(NFD, model, normalising, exact=True)
    assert caplog.text == ""


def test_what_is_not_kept_is_shown_as_wrong(model, normalising):
    context = with_right_margins(compress(NFD, model, normalising, verify=True))
    ((fidelity, pieces),) = heat_segments(context, NFD, normalising)
    assert not fidelity.is_exact
    assert [piece.text for piece in pieces if piece.kind == WRONG] == ["e\u0301", "a\u0300"]
    assert "".join(piece.text for piece in pieces) == NFD


def test_what_nobody_counted_is_not_certain(model, normalising, tmp_path):
    """A file of c3_hf 0.1 holds no counts; measuring again with the text gives them."""
    path = tmp_path / "old.c3"
    context = with_right_margins(compress("plain", model, normalising, verify=True))
    old = {name: tensor for name, tensor in context.tensors().items() if name != "lost_characters"}
    write_file(path, dataclasses.asdict(context.header), lambda: [old])
    assert "lost_characters" not in path.read_bytes()[:4000].decode("utf-8", "replace")
    loaded = CompressedContext.load(path)
    loaded.check()
    assert loaded.num_lost_characters is None
    assert [fidelity.is_exact for fidelity in loaded.fidelity] == [False]
    assert loaded.fidelity[0].token_accuracy == 1.0
    assert verify(loaded, "plain", model, normalising).num_lost_characters == 0
    both = loaded + compress("more", model, normalising, verify=True)
    assert both.num_lost_characters is None
    appended = compress("more", model, normalising, verify=True, append=True, output=path)
    assert appended.lost_characters.tolist() == [-1, 0]
    assert not SegmentFidelity.from_margins(torch.tensor([1.0, 1.0])).is_exact


@pytest.mark.parametrize("exact", [False, True])
def test_a_context_without_its_segments_is_noticed(compressed, model, processor, tmp_path, exact):
    context = compressed(exact=exact)
    gone = dataclasses.replace(context[2:2], header=context.header)
    gone.save(tmp_path / "gone.c3")
    loaded = CompressedContext.load(tmp_path / "gone.c3")
    message = r"the text of .*gone.c3 has SHA-256 .* its header says .* \(`text_sha256`\).*: segments are missing"
    with pytest.raises(ValueError, match=message):
        restore(loaded, model, processor)
    with pytest.raises(ValueError, match=message):
        verify(loaded, "", model, processor)


def test_a_byte_exact_context_without_some_segments_is_noticed(compressed, model, processor):
    context = compressed(exact=True)
    short = dataclasses.replace(context[:-1], header=context.header)
    with pytest.raises(ValueError, match=r"although each segment is right: segments are missing"):
        restore(short, model, processor)


def test_nothing_restored_is_never_exact(compressed, model, processor):
    assert not RestoredText(b"", ()).is_exact
    assert not RestoredText(b"", (), "0" * 64).is_exact
    assert not restore(compressed()[2:2], model, processor).is_exact
    # An empty text is all there when nothing is.
    assert restore(compressed(""), model, processor).is_exact
    exact = restore(compressed(exact=True), model, processor)
    assert exact.is_exact
    assert not dataclasses.replace(exact, data=exact.data[:-1]).is_exact


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, r"`batch_size` must be at least 1, got -1"),
        (0, ValueError, r"`batch_size` must be at least 1, got 0"),
        (2.5, TypeError, r"`batch_size` must be an int.*, got 2.5"),
        (True, TypeError, r"`batch_size` must be an int.*, got True"),
    ],
)
def test_a_batch_of_no_segments_is_refused_everywhere(compressed, model, processor, text, value, error, message):
    context = compressed(exact=True)
    calls = [
        lambda: restore(context, model, processor, batch_size=value),
        # Before the first segment is asked for.
        lambda: C3Pipeline(model, processor).iter_restored(context, batch_size=value),
        lambda: restore(context[2:2], model, processor, batch_size=value),
        lambda: verify(context, text, model, processor, batch_size=value),
        lambda: compress(text, model, processor, batch_size=value),
        lambda: C3Pipeline(model, processor).round_trip(["a"], batch_size=value),
        lambda: C3Pipeline(model, processor).round_trip([], batch_size=value),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message.replace("batch_size", "max_new_tokens")):
        C3Pipeline(model, processor).round_trip(["a"], max_new_tokens=value)


def test_a_saved_context_reads_its_counts_back(model, normalising, tmp_path):
    compress(NFD, model, normalising).save(tmp_path / "text.c3")
    _, tensors = read_file(tmp_path / "text.c3")
    assert tensors["lost_characters"].tolist() == [4]
