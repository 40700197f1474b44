"""Latents that keep the positions of their text: each context brings its stride along, on every way to the decoder."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from c3_hf import C3Pipeline, CompressedContext
from c3_hf.latents import decoding
from factories import NUM_LATENTS, make_model, make_processor


STRIDE = 12
TEXT = (
    "The keeper of the light counted the ships twice, as his father had. Eleven, he said, and wrote it down. It "
    "rained for a week.\n\nThen it stopped."
)


@pytest.fixture(scope="module")
def pipe():
    # What this one writes depends on its strides.
    return C3Pipeline(make_model(10, latent_stride=STRIDE), make_processor(prompts={"ask": "Repeat the text: "}))


@pytest.fixture(scope="module")
def context(pipe):
    return pipe.compress(TEXT, latent_dtype=torch.float32)


def by_generate(pipe, segment, max_new_tokens):
    """New tokens of one segment, by `generate()` with tensors alone."""
    content = [{"type": "context", "text": segment}, {"type": "text", "text": "Repeat the text: "}]
    inputs = pipe.processor.apply_chat_template([{"role": "user", "content": content}])
    stride = -(-len(segment.encode()) // NUM_LATENTS)
    output = pipe.model.generate(**inputs, context_strides=[[stride]], max_new_tokens=max_new_tokens, do_sample=False)
    return pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :])


def segments_of(context, text=TEXT):
    ends = context.char_offsets.tolist()
    return [text[start:end] for start, end in pairwise(ends)]


def test_each_segment_has_the_least_stride_that_covers_it(pipe, context):
    assert context.header.segment_length == STRIDE * NUM_LATENTS
    lengths = context.token_offsets.diff()
    assert context.strides.tolist() == (-(-lengths // NUM_LATENTS)).tolist()
    assert len(set(context.strides.tolist())) > 1
    for index, segment in enumerate(segments_of(context)):
        ids = torch.tensor([pipe.processor.tokenize_context(segment)])
        fresh = pipe.model.get_encoder_latents(ids, context_strides=context.strides[[index], None])[0, 0].detach()
        torch.testing.assert_close(context.latents[index], fresh, atol=1e-4, rtol=1e-4)


# Each way of guessing and each size of a batch once; their other combinations take long.
@pytest.mark.parametrize(
    ("batch_size", "block"),
    [
        pytest.param(size, block, marks=[] if (size, block) in {(1, 16), (2, 2), (16, None)} else pytest.mark.slow)
        for size in (1, 2, 16)
        for block in (2, 16, None)
    ],
)
def test_restoring_is_what_generate_does_with_the_strides(pipe, context, batch_size, block, monkeypatch):
    # In blocks of two tokens half of the guesses of a random model are confirmed, so that rows leave the batch.
    monkeypatch.setattr(decoding, "_STRETCH", 4)
    if block is None:
        monkeypatch.setattr(decoding.Restorer, "_can_guess", lambda _: False)
    else:
        monkeypatch.setattr(decoding, "_FIRST_BLOCK", block)
        monkeypatch.setattr(decoding, "_BLOCK_TOKENS", block)
    fresh = C3Pipeline(pipe.model, pipe.processor)
    restored = fresh.restore([context, context[1:]], batch_size=batch_size, max_new_tokens=25)
    alone = [by_generate(pipe, segment, 25) for segment in segments_of(context)]
    assert restored[0].text == "".join(alone)
    assert restored[1].text == "".join(alone[1:])
    assert len(set(alone)) > 2
    wrong = dataclasses.replace(context, strides=torch.full_like(context.strides, STRIDE))
    assert fresh.restore(wrong, max_new_tokens=25).text != "".join(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_byte_exact_files_keep_the_strides(pipe, tmp_path, dtype):
    options = {"exact": True, "verify": True, "latent_dtype": dtype}
    pipe.compress(TEXT, output=tmp_path / "text.c3", **options)
    pipe.compress(b"\xffmore", output=tmp_path / "text.c3", append=True, **options)
    loaded = CompressedContext.load(tmp_path / "text.c3")
    assert pipe.restore(loaded).data == TEXT.encode() + b"\xffmore"
    assert loaded[1:].strides.tolist() == loaded.strides.tolist()[1:]
    assert (loaded[:1] + loaded[1:]).strides.tolist() == loaded.strides.tolist()


def test_fidelity_is_measured_at_the_stride_of_each_segment(pipe, context):
    margins = pipe.verify(context, TEXT, batch_size=2).margins
    torch.testing.assert_close(
        pipe.compress(TEXT, latent_dtype=torch.float32, verify=True).margins, margins, atol=0.02, rtol=0.01
    )
    ids = torch.tensor(
        [[*pipe.restorer.prompt_ids.tolist(), *pipe.processor.tokenize_context(segments_of(context)[-1])]]
    )
    last = context[-1]
    with torch.no_grad():
        logits = pipe.model(input_ids=ids, context_latents=last).logits[0]
    margin = logits[-2, ids[0, -1]] - logits[-2].index_fill(0, ids[0, -1:], -torch.inf).max()
    assert margins[-2].item() == pytest.approx(margin.item(), abs=0.05, rel=0.01)


def test_a_context_gives_its_strides_with_its_latents(pipe, context):
    content = [*context.content_parts(), {"type": "text", "text": "Repeat the text: "}]
    inputs = pipe.processor.apply_chat_template([{"role": "user", "content": content}])
    latents, strides = context.context_latents(pipe.model), context.context_strides(pipe.model)
    with torch.no_grad():
        given = pipe.model(**inputs, context_latents=context).logits
        torch.testing.assert_close(
            given, pipe.model(**inputs, context_latents=latents, context_strides=strides).logits
        )
        assert not torch.allclose(given, pipe.model(**inputs, context_latents=latents).logits, atol=1e-3)
    options = {"max_new_tokens": 8, "do_sample": False}
    by_tensors = pipe.model.generate(**inputs, context_latents=latents, context_strides=strides, **options)
    assert torch.equal(pipe.model.generate(**inputs, context_latents=context, **options), by_tensors)
    # The same in a chat, where each context stands in its message.
    message = {"role": "user", "content": [{"type": "context", "context": context}, content[-1]]}
    reply = pipe.processor.batch_decode(by_tensors[:, inputs["input_ids"].shape[1] :])[0]
    assert pipe([[message], [message]], **options) == [reply, reply]
    by_text = {"role": "user", "content": [{"type": "context", "text": TEXT}, content[-1]]}
    assert pipe([by_text], **options) == reply


def test_questions_are_asked_with_the_strides(pipe, context):
    content = [
        *(part for segment in context for part in segment.content_parts()),
        {"type": "text", "text": "Repeat the text: Who?"},
    ]
    inputs = pipe.processor.apply_chat_template([{"role": "user", "content": content}])
    output = pipe.model.generate(**inputs, context_latents=context, max_new_tokens=8, do_sample=False)
    reply = pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :])
    assert str(pipe.ask(context, "Who?", max_new_tokens=8)) == reply
    # Each block takes num_latents * stride positions: fewer of them fit than there are placeholders for.
    long = pipe.compress(TEXT * 4)
    assert 0 < len(pipe.ask(long, "Who?", max_new_tokens=8).segments) < len(long)


def test_the_ratio_is_the_highest_stride(pipe):
    context = pipe.compress(TEXT, ratio=5)
    assert (context.header.segment_length, int(context.strides.max())) == (5 * NUM_LATENTS, 5)
    plain = C3Pipeline(make_model(), make_processor())
    assert plain.compress(TEXT, ratio=7).header.segment_length == 7 * NUM_LATENTS
    assert plain.compress(TEXT).strides is None
    assert plain.compress(TEXT, ratio=7, segment_length=20).header.segment_length == 20
    for options, message in [
        ({"ratio": 13}, r"`ratio` must be at most 12, the model's `latent_stride`, got 13"),
        ({"ratio": 0}, r"`ratio` must be at least 1, got 0"),
        ({"ratio": 2}, r"`ratio` 2 gives a segment of 8 tokens, it must be at least 16 tokens, got 8"),
        ({"ratio": 5, "segment_length": 21}, r"`segment_length` must be at most 20, 5 tokens for each of 4 latents"),
        ({"segment_length": 49}, r"`segment_length` must be at most 48, 12 tokens for each of 4 latents, got 49"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.compress(TEXT, **options)


def test_a_target_takes_the_highest_stride_that_holds(pipe, monkeypatch):
    def right_up_to_7(_, latents, sequences, strides):
        return [torch.full((len(ids) + 1,), 1.0 if stride <= 7 else -1.0) for ids, stride in zip(sequences, strides)]

    monkeypatch.setattr("c3_hf.latents.compress.measure_margins", right_up_to_7)
    context = pipe.compress("x" * 400, target_fidelity=0.9)
    assert int(context.strides.max()) == 7
    # No more latents than the stride of 7 needs by itself: the strides tried before leave no short rests behind.
    assert len(context) == -(-400 // (7 * NUM_LATENTS))
    assert all(fidelity.num_errors == 0 for fidelity in context.fidelity)


def test_strides_of_another_model_are_damage(pipe, context, tmp_path):
    model = pipe.model
    for strides in (context.strides + STRIDE, None):
        damaged = dataclasses.replace(context, strides=strides)
        for call in (
            lambda damaged=damaged: pipe.restore(damaged),
            lambda damaged=damaged: damaged.context_strides(model),
        ):
            with pytest.raises(ValueError, match=r"`strides` of this compressed context are .*, the model has 12"):
                call()
    dataclasses.replace(context, strides=context.strides * 0).save(tmp_path / "text.c3")
    with pytest.raises(ValueError, match=r"contradicts itself \(`strides` are not positive\)"):
        CompressedContext.load(tmp_path / "text.c3")
