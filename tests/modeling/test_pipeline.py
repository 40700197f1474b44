"""The stock text-generation pipeline, unmodified, on a folder with remote code."""

from __future__ import annotations

import inspect

import pytest
from transformers import TextStreamer, pipeline
from transformers.pipelines.text_generation import TextGenerationPipeline

from factories import make_model, make_processor


GREEDY = {"max_new_tokens": 8, "do_sample": False}
MESSAGES = [{"role": "user", "content": [{"type": "context", "text": "hello"}, {"type": "text", "text": "Repeat"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c3")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("text-generation", model=str(folder), trust_remote_code=True)


def expected(messages):
    """What the model writes for a chat, by way of the processor."""
    model, processor = make_model(), make_processor()
    inputs = processor.apply_chat_template(messages)
    new_ids = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_ids[0], skip_special_tokens=True)


def test_it_is_the_stock_class(pipe):
    assert type(pipe) is TextGenerationPipeline


def test_chat_with_a_context_part(pipe):
    answer = pipe(MESSAGES, **GREEDY)[0]["generated_text"]
    assert answer[:-1] == MESSAGES
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"] == expected(MESSAGES)
    only_new = pipe(MESSAGES, **GREEDY, return_full_text=False)[0]["generated_text"]
    assert only_new == expected(MESSAGES)


def test_batches_of_chats_equal_single_ones(pipe):
    other = [{"role": "user", "content": [{"type": "context", "text": "a longer one"}, {"type": "text", "text": "Q"}]}]
    plain = [{"role": "user", "content": "no context at all"}]
    chats = [MESSAGES, other, plain]
    answers = pipe(chats, **GREEDY, batch_size=3, return_full_text=False)
    assert [answer[0]["generated_text"] for answer in answers] == [expected(chat) for chat in chats]


def test_plain_strings(pipe):
    model, processor = make_model(), make_processor()
    inputs = processor.tokenizer("once upon", return_tensors="pt")
    new_ids = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(new_ids[0], skip_special_tokens=True)
    assert pipe("once upon", **GREEDY)[0]["generated_text"] == "once upon" + text
    answers = pipe(["once upon", "two"], **GREEDY, batch_size=2, return_full_text=False)
    assert answers[0][0]["generated_text"] == text


def test_a_string_with_a_context_in_line(pipe):
    processor = make_processor()
    prompt = f"<|im_start|>user\n{processor.inline_context('hello')}\nRepeat<|im_end|>"
    inputs = processor(text="<|im_start|>user\n<imgpad>\nRepeat<|im_end|>", contexts="hello")
    new_ids = make_model().generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    answer = pipe(prompt, **GREEDY, return_full_text=False)[0]["generated_text"]
    assert answer == processor.tokenizer.decode(new_ids[0], skip_special_tokens=True)
    assert pipe(prompt, **GREEDY)[0]["generated_text"].endswith(answer)


def test_documents(pipe):
    question = [{"role": "user", "content": "Which?"}]
    documents = [{"title": "T", "text": "one"}]
    # In 4.57 what the chat template needs goes through `tokenizer_encode_kwargs`; 5.x has an argument for it.
    takes_documents = "documents" in inspect.signature(pipe._sanitize_parameters).parameters
    given = {"documents": documents} if takes_documents else {"tokenizer_encode_kwargs": {"documents": documents}}
    answer = pipe(question, **given, **GREEDY, return_full_text=False)
    processor = make_processor()
    inputs = processor.apply_chat_template(question, documents=documents)
    new_ids = make_model().generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == processor.tokenizer.decode(new_ids[0], skip_special_tokens=True)


def test_streaming(pipe, capsys):
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = pipe(MESSAGES, **GREEDY, streamer=streamer, return_full_text=False)[0]["generated_text"]
    assert capsys.readouterr().out.strip() == answer.strip()
