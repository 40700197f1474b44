"""A compressed context in place of the text: forward(), generate() and the stock pipeline, and no encoder."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

from c3_hf import CompressedContext, compress
from factories import make_model, make_processor


GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUESTION = {"type": "text", "text": "Repeat the text: "}


def refuse(*_, **__):
    raise AssertionError("the encoder ran")


@pytest.fixture(scope="module")
def context(model, processor, text):
    context = compress(text, model, processor, segment_length=64, latent_dtype=torch.float32)
    assert len(context) > 2
    return context


@pytest.fixture(scope="module")
def blind():
    """The same model with an encoder that must not run."""
    model = make_model()
    model.model.encoder.forward = refuse
    with pytest.raises(AssertionError, match="the encoder ran"):
        model.get_context_features(torch.tensor([[1, 2]]))
    return model


@pytest.fixture(scope="module")
def messages(context):
    return [{"role": "user", "content": [*context.content_parts(), QUESTION]}]


@pytest.fixture(scope="module")
def expected(context, model, processor):
    """New ids by the way of tensors."""
    content = [*context.content_parts(model), QUESTION]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    return model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()


def test_generate_takes_a_context(context, blind, processor, messages, expected):
    inputs = processor.apply_chat_template([messages, messages])
    new_ids = blind.generate(**inputs, context_latents=context, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert new_ids.tolist() == [expected, expected]
    part = [{"role": "user", "content": [*context[1].content_parts(), QUESTION]}]
    inputs = processor.apply_chat_template(part)
    alone = blind.generate(**inputs, context_latents=context[1], **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert alone.tolist() != expected


def test_forward_takes_a_context(context, blind, processor, messages):
    inputs = processor.apply_chat_template(messages)
    with torch.no_grad():
        outputs = [blind(**inputs, context_latents=given) for given in (context, context.context_latents(blind))]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    with pytest.raises(TypeError, match="`context_latents` of the model without its head must be a tensor, got Comp"):
        blind.model(**inputs, context_latents=context)


@pytest.mark.parametrize("trust_remote_code", [True, False], ids=["remote code", "package"])
def test_the_stock_pipeline_takes_a_context(
    context, processor, messages, expected, tmp_path, trust_remote_code, monkeypatch
):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    context.save(tmp_path / "text.c3")
    stored = CompressedContext.load(tmp_path / "text.c3")
    pipe = pipeline("text-generation", model=str(tmp_path), trust_remote_code=trust_remote_code)
    monkeypatch.setattr(pipe.model.model.encoder, "forward", refuse)
    answer = processor.tokenizer.decode(expected, skip_special_tokens=True)
    chat = pipe(messages, context_latents=stored, **GREEDY)[0]["generated_text"]
    assert chat == [*messages, {"role": "assistant", "content": answer}]
    only_new = {**GREEDY, "return_full_text": False}
    batch = pipe([messages, messages], context_latents=stored, batch_size=2, **only_new)
    assert [row[0]["generated_text"] for row in batch] == [answer, answer]
    markup = processor.apply_chat_template(messages, tokenize=False)
    assert pipe(markup, context_latents=stored, **only_new)[0]["generated_text"] == answer


def test_an_empty_context_is_none(model, processor):
    context = compress("", model, processor)
    inputs = processor.apply_chat_template([{"role": "user", "content": [*context.content_parts(), QUESTION]}])
    plain = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, context_latents=context, **GREEDY), plain)


@pytest.mark.parametrize("wrong", ["text.c3", [[0.5]], CompressedContext])
def test_what_gives_no_latents_is_refused(blind, processor, messages, wrong):
    inputs = processor.apply_chat_template(messages)
    for call in (blind, blind.generate):
        with pytest.raises(
            TypeError, match=r"`context_latents` must be a tensor .* CompressedContext does, got \w+\. Open"
        ):
            call(**inputs, context_latents=wrong)


def test_a_context_of_another_model_or_without_a_place_is_refused(context, processor, messages, model):
    inputs = processor.apply_chat_template(messages)
    with pytest.raises(ValueError, match=r"`model` has the fingerprint .* latents mean nothing to another model"):
        make_model(seed=1).generate(**inputs, context_latents=context)
    bare = processor.apply_chat_template([{"role": "user", "content": "Which?"}])
    with pytest.raises(ValueError, match="row 0 of the prompts has 0 context placeholders"):
        model.generate(**bare, context_latents=context)
