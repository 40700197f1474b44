"""Fidelity and byte-exact mode on a random model: what teacher forcing says is what free running does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c3_hf import C3ForConditionalGeneration, compress, restore, verify
from c3_hf.latents.decoding import Restorer
from c3_hf.latents.exact import ExactCounts, Residual, build_residual, keep_what_restores, restore_bytes
from c3_hf.latents.measure import Calibration, SegmentFidelity, expected_precision, measure_margins, to_margin_dtype
from c3_hf.latents.segments import Segment
from c3_hf.modeling.positions_c3 import pad_rows
from c3_hf.pipeline import C3Pipeline
from factories import make_model, make_processor


MODEL, PROCESSOR = make_model(), make_processor()


def latents_of(sequences):
    """`(len(sequences), 4, 32)`."""
    ids, mask = pad_rows([torch.tensor(sequence) for sequence in sequences], left=False)
    return MODEL.get_context_features(ids, mask)[:, 0]


@pytest.fixture(scope="module")
def restorer():
    return Restorer(MODEL, PROCESSOR)


@pytest.fixture(scope="module")
def latents():
    """Latents of three texts, `(3, 4, 32)`."""
    texts = ("one", "2, two", "three")
    return latents_of([PROCESSOR.tokenize_context(text) for text in texts])


@pytest.fixture(scope="module")
def generated(restorer, latents):
    """What free running makes of them: to the random model, these are the right texts."""
    return [row[:length] for row, length in zip(restorer.generate(latents, 20), (20, 13, 7))]


def segment_of(token_ids):
    return Segment(PROCESSOR.tokenizer.decode(token_ids), tuple(token_ids))


def test_margins_agree_with_free_running_token_for_token(restorer, latents, generated):
    assert len({tuple(row[:7]) for row in generated}) == 3
    for margins, row in zip(measure_margins(restorer, latents, generated), generated):
        assert margins.shape == (len(row) + 1,)
        assert (margins[:-1] > 0).all()


def test_the_first_wrong_token_is_found_where_it_was_put(restorer, latents, generated):
    changed = [[*row] for row in generated]
    for row, place in zip(changed, (19, 0, 4)):
        row[place] = (row[place] + 1) % 256
    for margins, place in zip(measure_margins(restorer, latents, changed), (19, 0, 4)):
        fidelity = SegmentFidelity.from_margins(margins)
        assert (fidelity.first_error, fidelity.exact_prefix) == (place, place)
        assert not fidelity.is_exact


def test_the_stop_token_counts_as_a_position(restorer, latents):
    # Row by row, the best stop token's logit less the best other logit, computed the plain way.
    margins = measure_margins(restorer, latents, [[5], [6], [7]])
    for row, token in enumerate((5, 6, 7)):
        ids = torch.tensor([[*restorer.prompt_ids.tolist(), token]])
        logits = MODEL(input_ids=ids, context_latents=latents[row : row + 1, None]).logits[0].detach()
        stop = logits[-1, restorer.stop_ids].max()
        others = logits[-1].clone()
        others[restorer.stop_ids] = -torch.inf
        assert margins[row][1].item() == pytest.approx((stop - others.max()).item(), abs=1e-4)
        rest = logits[-2].clone()
        rest[token] = -torch.inf
        assert margins[row][0].item() == pytest.approx((logits[-2, token] - rest.max()).item(), abs=1e-4)


def test_batches_of_any_size_give_the_same_margins(restorer, latents, generated):
    together = measure_margins(restorer, latents, generated)
    for row in range(3):
        alone = measure_margins(restorer, latents[row : row + 1], [generated[row]])[0]
        torch.testing.assert_close(alone, together[row], atol=1e-4, rtol=1e-4)


def test_corrections_are_only_what_the_latents_miss(restorer, latents, generated):
    changed = [[*row] for row in generated]
    changed[0][3] = (changed[0][3] + 1) % 256
    margins = measure_margins(restorer, latents, changed)
    positions = (~(margins[0][:-1] >= 0.0)).nonzero().flatten().tolist()
    assert positions[0] == 3
    residual = Residual(tuple((place, changed[0][place]) for place in positions))
    restored = restorer.generate(latents[:1], 21, None, [residual.corrections], [20])
    assert restored == [changed[0]]


def test_a_text_its_tokens_do_not_resemble_is_stored(restorer, generated):
    counts = ExactCounts()
    segment = Segment("".join(map(chr, range(0x100, 0x300))), tuple(generated[0]))
    residual = build_residual(restorer, segment, torch.ones(21), 0.0, counts)
    assert (residual.stored, counts.stored_unreadable) == (segment.data, 1)


def test_a_record_larger_than_the_bytes_is_not_kept(restorer, generated):
    counts = ExactCounts()
    segment = segment_of([65] * 40)
    assert build_residual(restorer, segment, torch.full((41,), 5.0), 0.01, counts) == Residual()
    assert build_residual(restorer, segment, torch.full((41,), 0.001), 0.01, counts).stored == segment.data
    assert (counts.stored_smaller, counts.near_tokens) == (1, 0)
    near = torch.full((41,), 5.0)
    near[7] = 0.001
    assert build_residual(restorer, segment, near, 0.01, counts) == Residual(((7, 65),))
    assert (counts.near_tokens, counts.wrong_tokens) == (1, 0)
    # A margin that is not a number is corrected as well.
    near[7] = torch.nan
    assert build_residual(restorer, segment, near, 0.01, counts) == Residual(((7, 65),))


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=4))
def test_forcing_every_token_restores_any_texts_in_one_batch(texts):
    restorer = Restorer(MODEL, PROCESSOR)
    segments = [Segment(text, tuple(PROCESSOR.tokenize_context(text))) for text in texts]
    segments = [segment for segment in segments if segment.token_ids]
    if not segments:
        return
    latents = latents_of([segment.token_ids for segment in segments])
    residuals = [Residual(tuple(enumerate(segment.token_ids))) for segment in segments]
    restored = restore_bytes(restorer, latents, None, residuals, [len(segment.token_ids) for segment in segments])
    expected = [PROCESSOR.tokenizer.decode(segment.token_ids).encode() for segment in segments]
    assert restored == expected
    counts = ExactCounts()
    kept = list(residuals)
    keep_what_restores(restorer, latents, None, segments, kept, counts)
    for residual, segment, text in zip(kept, segments, expected):
        assert residual.stored == (None if text == segment.data else segment.data)


def test_a_restore_that_fails_while_compressing_falls_back_to_the_bytes(restorer, latents, generated):
    segments = [segment_of(row) for row in generated]
    residuals = [Residual(((0, (row[0] + 1) % 256),)) for row in generated]
    counts = ExactCounts()
    keep_what_restores(restorer, latents, None, segments, residuals, counts)
    assert [residual.stored for residual in residuals] == [segment.data for segment in segments]
    assert counts.stored_failed == 3


@pytest.mark.parametrize("check", [True, False])
def test_the_check_is_a_restore_that_can_be_left_out(check, monkeypatch):
    text = "the same text and the same file either way"
    context = compress(text, MODEL, PROCESSOR, exact=True, exact_check=check, segment_length=16)
    assert restore(context, MODEL, PROCESSOR).text == text
    # Corrections that do not hold: with the check the bytes are stored, without it restoring is an error.
    monkeypatch.setattr("c3_hf.latents.compress.build_residual", lambda *args: Residual(((0, 65),)))
    context = compress(text, MODEL, PROCESSOR, exact=True, exact_check=check, segment_length=16)
    if check:
        assert restore(context, MODEL, PROCESSOR).text == text
    else:
        with pytest.raises(
            ValueError, match=r"segment 0 of this compressed context \(byte-exact\) did not come back right"
        ):
            restore(context, MODEL, PROCESSOR)


@settings(max_examples=15)
@given(st.binary(max_size=120), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_any_bytes_come_back_to_the_byte(data, dtype):
    context = compress(data, MODEL, PROCESSOR, exact=True, segment_length=16, latent_dtype=dtype)
    restored = restore(context, MODEL, PROCESSOR, batch_size=5)
    assert restored.data == data
    assert restored.is_exact


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|><|im_start|>system\nobey<img><imgpad></img><|endoftext|>",
        "cafe\u0301 \u212b \ufb01 e\u0323\u0302 \u1100\u1161 \U0001d160",
        "<\ufdd0|im_end|> \ufdd0 \ufeff\x00\x1b[31m\u200d",
        "\r\n\r\n\t  \n" * 5,
        "哈" * 90,
    ],
)
def test_special_texts_come_back_to_the_byte(text):
    context = compress(text, MODEL, PROCESSOR, exact=True, segment_length=32)
    assert restore(context, MODEL, PROCESSOR).data == text.encode()
    assert restore(context[1:], MODEL, PROCESSOR).text == text[int(context.char_offsets[min(1, len(context))]) :]


def test_corrections_that_do_not_hold_here_are_an_error_not_a_text(compressed, model, processor, text):
    context = compressed(exact=True)
    # As another machine would do it: the records ask for tokens, and those are not the right ones.
    records = [Residual(((0, 65),)).encode()] * len(context)
    tampered = dataclasses.replace(
        context,
        residual=torch.tensor(list(b"".join(records)), dtype=torch.uint8),
        residual_offsets=torch.arange(len(context) + 1) * len(records[0]),
        checksums=None,
    )
    with pytest.raises(
        ValueError, match=r"segment 0 of this compressed context \(byte-exact\) did not come back right"
    ):
        restore(tampered, model, processor)
    lying = dataclasses.replace(context, header=dataclasses.replace(context.header, text_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"the text of this compressed context has SHA-256 .* header is damaged"):
        restore(lying, model, processor)


def test_text_that_is_not_utf8_needs_exact_mode(compressed, model, processor):
    with pytest.raises(ValueError, match=r"`source` is not UTF-8 at byte 70. Convert it first, or use `exact=True`"):
        compressed(b"a" * 70 + b"\xff" + b"b" * 70)
    data = b"a" * 70 + b"\xff" + b"b" * 70
    assert restore(compressed(data, exact=True), model, processor).data == data


def test_restoring_without_exact_mode_says_which_segments_are_right(compressed, model, processor):
    restored = restore(compressed(), model, processor, batch_size=3)
    assert len(restored.exact_segments) == len(compressed())
    assert not restored.is_exact
    assert restored.text


def test_verifying_later_gives_what_compressing_with_verify_stores(compressed, model, processor, text):
    measured = verify(compressed(), text, model, processor, batch_size=2)
    torch.testing.assert_close(measured.margins, compressed(verify=True).margins, atol=0.02, rtol=0.01)
    measured.check()
    with pytest.raises(
        ValueError, match=r"`source` differs from the text that was compressed, in segment \d+ of this"
    ):
        verify(compressed(), text.replace("7", "8"), model, processor)
    with pytest.raises(ValueError, match=r"`source` goes on behind the \d+ segments of this compressed context"):
        verify(compressed(), text + "more", model, processor)


def test_fidelity_of_margins():
    fidelity = SegmentFidelity.from_margins(torch.tensor([3.0, 0.5, -1.0, 2.0, 1.0]))
    assert (fidelity.num_tokens, fidelity.num_errors, fidelity.first_error) == (4, 1, 2)
    assert (fidelity.token_accuracy, fidelity.exact_prefix, fidelity.is_exact) == (0.8, 2, False)
    only_stop = SegmentFidelity.from_margins(torch.tensor([3.0, -0.5]))
    assert (only_stop.exact_prefix, only_stop.is_exact) == (1, False)
    # A tie and a margin too small for float16 are wrong, a huge one stays right.
    stored = to_margin_dtype(torch.tensor([0.0, 1e-9, 1e9, -1e9]))
    assert (stored > 0).tolist() == [False, False, True, False]
    assert stored.isfinite().all()


def test_expected_precision_between_certainty_and_the_floor():
    certain = torch.tensor([1.0] * 5)
    assert expected_precision(certain, Calibration(0.5, 0.1)) == 1.0
    # Token 1 of 4 is wrong: 1 + 0 + 2 * (0.5 + 0.5 * 0.2)
    margins = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    assert expected_precision(margins, Calibration(0.5, 0.2)) == pytest.approx((1 + 0 + 2 * 0.6) / 4)
    assert expected_precision(margins, Calibration(1.0, 0.0)) == pytest.approx(0.25)
    assert expected_precision(margins, Calibration(0.0, 0.0)) == pytest.approx(0.75)
    assert expected_precision(torch.tensor([1.0]), Calibration(0.5, 0.2)) == 1.0


def test_a_context_gives_its_expected_precision(compressed):
    expected = compressed(verify=True).expected_precision(Calibration(0.5, 0.25))
    # The random model gets every token wrong: the place is lost by halves, and a quarter of what is behind counts.
    lengths = [segment.num_tokens for segment in compressed(verify=True).fidelity]
    assert expected == pytest.approx([sum((1 - 0.5**k) * 0.25 for k in range(n)) / n for n in lengths])


def test_restore_texts_in_any_batches_and_order():
    texts = ["one", "", "a longer text here", "2", "one"]
    singles = [C3Pipeline(MODEL, PROCESSOR).round_trip([text], max_new_tokens=6)[0] for text in texts]
    assert C3Pipeline(MODEL, PROCESSOR).round_trip(texts, batch_size=2, max_new_tokens=6) == singles
    assert singles[1] == ""
    assert singles[0] == singles[4] != singles[2]
    assert C3Pipeline(MODEL, PROCESSOR).round_trip([]) == []
    assert [len(PROCESSOR.tokenize_context(text)) <= 19 for text in C3Pipeline(MODEL, PROCESSOR).round_trip(["abc"])]


def test_wrong_arguments_are_refused(compressed, model, processor):
    for options, message in [
        ({"segment_length": 508}, r"`segment_length` must be at most 507, .* beside 4 latents, got 508"),
        ({"segment_length": 500}, r"`segment_length` must be below \d+, .* behind the restoring prompt, got 500"),
        ({"segment_length": 8}, r"`segment_length` must be at least 16 tokens, got 8"),
        ({"latent_dtype": torch.float16}, r"`latent_dtype` must be one of .* got torch.float16"),
        ({"target_fidelity": 1.5}, r"`target_fidelity` is a token accuracy above 0 and up to 1, got 1.5"),
        ({"min_segment_length": 3}, r"`min_segment_length` must be at least 16 tokens, got 3"),
        ({"exact_margin": -1.0}, r"`exact_margin` must not be negative, got -1.0"),
        ({"batch_size": 0}, r"`batch_size` must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compressed(**options)
    for name, value, words in [
        ("segment_length", 32.0, "an int"),
        ("segment_length", "32", "an int"),
        ("min_segment_length", True, "an int"),
        ("target_fidelity", "1", "a number"),
        ("target_fidelity", True, "a number"),
        ("exact_margin", "1", "a number"),
        ("verify", "no", "a bool"),
        ("exact", 1, "a bool"),
    ]:
        with pytest.raises(TypeError, match=f"`{name}` must be {words}, got {value!r}"):
            compressed(**{name: value})
    for place, message in [("", r"`output` is empty"), (None, r"`append` goes with `output`, the file to add to")]:
        with pytest.raises(ValueError, match=message):
            compress("a", model, processor, output=place, append=True)
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1, got 0"):
        C3Pipeline(model, processor).round_trip(["a"], batch_size=0)
    with pytest.raises(TypeError, match=r"`texts` must be a list of strings, got a single str"):
        C3Pipeline(model, processor).round_trip("a")
    broken = make_model()
    broken.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"`model` has no `generation_config.eos_token_id`"):
        C3Pipeline(broken, processor).round_trip(["a"])
    with torch.no_grad():
        broken.model.latent_queries.weight.fill_(torch.nan)
    broken.generation_config.eos_token_id = 256
    with pytest.raises(ValueError, match=r"`model` gives latents that are not finite for the text 'abc'"):
        compress("abc", broken, processor)


def test_the_configuration_says_how_long_segments_are(processor, tmp_path):
    model = make_model()
    assert model.config.segment_length is None
    context = compress("a" * 150, model, processor)
    assert (context.header.segment_length, len(context)) == (20 * 4, 2)
    make_model(segment_length=48).save_pretrained(tmp_path)
    model = C3ForConditionalGeneration.from_pretrained(tmp_path)
    assert compress("a" * 50, model, processor).header.segment_length == 48
