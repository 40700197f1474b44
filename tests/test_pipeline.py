"""The public object, on the bundled model and on one of random weights."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import factories
from c3_hf import C3Pipeline, C3Processor, CompressedContext, CompressionOptions, tiny_model_path
from c3_hf.latents.measure import Calibration


TEXT = "The night train left the harbour a little after nine, and nobody on the pier looked up. It was raining."


@pytest.fixture(scope="module")
def pipe():
    """The bundled model, asked what it may or may not have been trained to be asked."""
    pipe = C3Pipeline.from_pretrained(dtype="float32")
    pipe.processor.prompts = {"restore": pipe.processor.prompts["restore"], "find": "Find the sentence: "}
    return pipe


@pytest.fixture(scope="module")
def context(pipe):
    return pipe.compress(TEXT)


def test_text_and_back_in_four_lines(pipe, context):
    restored = pipe.restore(context)
    assert str(restored) == TEXT
    assert restored.is_exact
    assert b"".join(data for data, _ in pipe.iter_restored(context)) == TEXT.encode()
    assert pipe.verify(context, TEXT).fidelity[0].is_exact


def test_what_it_is(pipe):
    assert (pipe.name, pipe.dtype) == ("c3-tiny", torch.float32)
    # Its weights are stored in bfloat16, its configuration says in which dtype to compute; so may whoever loads it.
    assert C3Pipeline.from_pretrained().dtype == torch.float32
    assert C3Pipeline.from_pretrained(dtype="bfloat16").dtype == torch.bfloat16
    mine = C3Pipeline(factories.make_model(), factories.make_processor(), name="mine")
    assert repr(mine) == "C3Pipeline(mine: 4 latents for up to 80 tokens, torch.float32, cpu)"
    size = sum(weights.numel() for weights in mine.model.parameters())
    assert mine.describe() == f"mine: {size:,} parameters, 4 latents for up to 80 tokens, prompts restore"


def test_asking_goes_on_from_words_of_the_text(pipe, context, monkeypatch):
    begun = "nobody on the pier"
    content = [{"type": "context", "context": context}, {"type": "text", "text": pipe.processor.prompts["find"]}]
    said = pipe([{"role": "user", "content": content}, {"role": "assistant", "content": begun}], max_new_tokens=16)
    seen = []
    # What the model says is its weights' business; that it is asked for, and how much of it counts, is ours.
    monkeypatch.setattr(
        C3Processor, "decode", lambda self, ids, **options: seen.append(ids.tolist()) or " looked up. And"
    )
    answer = pipe.ask(context, start=begun, text=[TEXT], max_new_tokens=16)
    assert (str(answer), answer.cut, answer.segments) == ("nobody on the pier looked up. ", "And", (0,))
    assert pipe.processor.tokenizer.decode(seen[-1], skip_special_tokens=True) == said
    with pytest.raises(ValueError, match="`start` is missing: this model was not trained to answer questions"):
        pipe.ask([context], "Who looked up?")


def test_a_context_without_text_is_not_asked(pipe):
    with pytest.raises(ValueError, match="`contexts` holds no text"):
        pipe.ask(pipe.compress(""), start="nobody")


@pytest.mark.parametrize("segments", [[], [-1], [1]])
def test_segments_that_are_not_there(pipe, context, segments):
    with pytest.raises(ValueError, match=r"`segments` must name some of 0 to 0, got"):
        pipe.ask(context, start="nobody", segments=segments)


def test_chat_takes_text_and_compressed_contexts(pipe, context):
    ask = {"type": "text", "text": "Repeat the text: "}
    by_text = [{"role": "user", "content": [{"type": "context", "text": TEXT}, ask]}]
    by_latents = [{"role": "user", "content": [{"type": "context", "context": context}, ask]}]
    assert pipe(by_text, max_new_tokens=64) == TEXT
    assert pipe([by_text, by_latents], max_new_tokens=64) == [TEXT, TEXT]
    assert isinstance(pipe("Hello", max_new_tokens=1), str)
    begun = [*by_text, {"role": "assistant", "content": "The night"}]
    with pytest.raises(ValueError, match="either every conversation ends with a begun reply or none does"):
        pipe([begun, by_text])


def test_one_object_for_eight_threads():
    """As each text alone, special strings in it too, beside somebody who uses the tokenizer in his own way."""
    pipe = C3Pipeline(factories.make_model(), factories.make_processor())
    texts = [f"{number}<|im_end|>{number}<img>" * (number % 2 + 1) for number in range(8)]

    def there_and_back(text):
        context = pipe.compress(text, segment_length=32)
        chat = [{"role": "user", "content": [{"type": "context", "text": text}, {"type": "text", "text": text}]}]
        ids = pipe.processor.apply_chat_template(chat)["input_ids"].tolist()
        return context.num_tokens, len(context), str(pipe.restore(context)), ids

    expected = [there_and_back(text) for text in texts]
    beside = {"padding": "max_length", "max_length": 50, "truncation": True, "split_special_tokens": True}
    with ThreadPoolExecutor(9) as pool:
        other = pool.submit(lambda: [pipe.processor.tokenizer("a<|im_end|>", **beside) for _ in range(400)])
        found = list(pool.map(there_and_back, texts))
    assert found == expected
    assert {len(encoding["input_ids"]) for encoding in other.result()} == {50}


def test_a_model_in_hand():
    pipe = C3Pipeline(factories.make_model(), factories.make_processor(), name="mine")
    assert isinstance(pipe.compress("a text of some length", segment_length=16), CompressedContext)
    assert pipe.name == "mine"


def test_what_is_no_c3_model(tmp_path):
    plain = AutoModelForCausalLM.from_config(
        Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1)
    )  # fmt: skip
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'qwen2', not a C3 model"):
        C3Pipeline.from_pretrained(tmp_path)
    model, processor = factories.make_model(), factories.make_processor()
    for other in (plain, "c3-tiny", processor):
        with pytest.raises(TypeError, match="`model` must be a C3ForConditionalGeneration, got"):
            C3Pipeline(other, processor)
    with pytest.raises(TypeError, match="`processor` must be a C3Processor, got"):
        C3Pipeline(model, processor.tokenizer)
    with pytest.raises(ValueError, match="`processor` writes 8 placeholders for a context, `model` has 4 latents"):
        C3Pipeline(model, factories.make_processor(num_latents=8))


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"`pretrained_model_name_or_path` .*: no C3 model can be loaded from there \("
    ):
        C3Pipeline.from_pretrained(tmp_path)
    # Nothing is not the model in the package.
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is empty"):
        C3Pipeline.from_pretrained("")
    with pytest.raises(ValueError, match=r"`dtype` must be the name of a torch dtype, .* got 'float7'"):
        C3Pipeline.from_pretrained(dtype="float7")


@pytest.mark.parametrize("other", ["text.c3", Path("text.c3"), None, [5]], ids=repr)
def test_what_is_no_compressed_context(pipe, other):
    for call in (pipe.restore, pipe.iter_restored, pipe.ask):
        with pytest.raises(TypeError, match=r"`contexts` must be compressed contexts, got .*CompressedContext\.load"):
            call(other)
    with pytest.raises(TypeError, match="`contexts` must be compressed contexts"):
        pipe([{"role": "user", "content": [{"type": "context", "context": other or 5}]}])


@pytest.mark.parametrize("messages", [None, 5, [5], [[]]])
def test_what_is_no_chat(pipe, messages):
    with pytest.raises(ValueError, match="`conversation` "):
        pipe(messages)


def test_segments_as_long_as_the_model_has_positions_for(pipe):
    room = pipe.segment_room
    assert room >= pipe.model.config.longest_segment
    text = "word " * (room + 100)
    with pytest.raises(ValueError, match=f"`segment_length` must be at most {room}"):
        pipe.compress(text, segment_length=room + 1)
    assert pipe.compress(text, segment_length=room).header.segment_length == room


@pytest.mark.parametrize("device", ["meta", "foo"])
def test_what_is_no_device(device):
    with pytest.raises(ValueError, match=f"`device` '{device}' cannot be used here"):
        C3Pipeline.from_pretrained(device=device)


def test_a_device_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="`device` 'cuda' cannot be used here"):
        C3Pipeline.from_pretrained(device="cuda")


def test_several_contexts_share_batches_and_come_back_one_by_one(pipe, context):
    other = pipe.compress("Another text, shorter.")
    empty = pipe.compress("")
    restored = pipe.restore([context, empty, other], batch_size=2)
    assert [str(text) for text in restored] == [TEXT, "", "Another text, shorter."]
    assert all(text.is_exact for text in restored)
    assert pipe.restore([]) == []


def test_the_options_are_one_object(pipe):
    options = CompressionOptions(segment_length=16, latent_dtype=torch.float32)
    context = pipe.compress(TEXT, options, verify=True)
    assert (context.header.segment_length, context.latents.dtype) == (16, torch.float32)
    assert context.margins is not None
    digest = context.header.text_sha256
    assert pipe.would_make(context, digest, options, verify=True)
    assert not pipe.would_make(context, digest, options)
    assert not pipe.would_make(context, "0" * 64, options, verify=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'segment_size'"):
        pipe.compress(TEXT, segment_size=16)


def test_calibration_lies_beside_the_weights(pipe, tmp_path):
    bundled = json.loads(Path(tiny_model_path(), "processor_config.json").read_text(encoding="utf-8"))
    assert pipe.calibration == Calibration(**bundled["calibration"])
    said = {"derail": 0.25, "floor": 0.125}
    saying = C3Pipeline(factories.make_model(), factories.make_processor(calibration=said))
    assert saying.calibration == Calibration(derail=0.25, floor=0.125)
    header = saying.compress(TEXT, verify=True).header
    assert (header.derail, header.floor) == (0.25, 0.125)
    saying.processor.save_pretrained(tmp_path)
    assert C3Processor.from_pretrained(tmp_path).calibration == said
    # A checkpoint that says nothing: nothing behind an error counts.
    silent = C3Pipeline(factories.make_model(), factories.make_processor())
    assert silent.calibration == Calibration(derail=1.0, floor=0.0)
    assert silent.compress("a text").header.derail is None
    for said, message in [
        ({"derail": 2.0}, "`derail` of a calibration must be a number from 0 to 1, got 2.0"),
        ({"other": 1.0}, "`processor.calibration` must give `derail` and `floor`"),
    ]:
        wrong = C3Pipeline(silent.model, factories.make_processor(calibration=said))
        with pytest.raises(ValueError, match=message):
            wrong.compress("a text")
