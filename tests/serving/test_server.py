"""The server over HTTP on the bundled model, asked by the official client."""

from __future__ import annotations

import json

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

from c3_hf.cli import main  # noqa: E402

from .conftest import TEXT, ask, served, slowed, wait_until  # noqa: E402


Bad, Gone = openai.BadRequestError, openai.NotFoundError
REPEAT = "Repeat the text: "


@pytest.fixture(scope="module")
def other():
    return "Seven grey horses stood under the old oak."


@pytest.fixture(scope="module")
def live(pipe, tmp_path_factory):
    """One server for all tests that do not mind what else it holds."""
    with served(pipe, tmp_path_factory.mktemp("store")) as live:
        yield live


@pytest.fixture
def fresh(start, pipe):
    return start(pipe)


def post(http, live, text, **options):
    answer = http(live).post("/v1/contexts", json={"text": text, **options})
    return answer.status_code, answer.json()


@pytest.fixture(scope="module")
def sizes(pipe):
    """Tokens of `TEXT`, and latents it becomes."""
    return len(pipe.processor.tokenize_context(TEXT)), pipe.model.config.num_latents


def test_a_text_is_compressed_once_and_asked_by_its_id(fresh, http, client, sizes):
    live, (tokens, latents) = fresh, sizes
    status, context = post(http, live, TEXT)
    assert status == 201
    assert context.pop("id").startswith("c3-")
    assert context.pop("bytes") > 0
    assert context == {
        "object": "context",
        "status": "ready",
        "characters": len(TEXT),
        "tokens": tokens,
        "segments": 1,
        "latents": latents,
        "compression_ratio": round(tokens / latents, 2),
        "exact": False,
        "fidelity": {"token_accuracy": 1.0, "exact_segments": 1},
    }
    status, again = post(http, live, TEXT)
    assert status == 200
    messages = ask({"type": "context", "id": again["id"]}, REPEAT)
    answer = client(live).chat.completions.create(model="c3-tiny", messages=messages)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
    assert answer.usage.prompt_tokens == len_of_prompt(live, messages)
    assert (answer.usage.completion_tokens, answer.usage.context_tokens) == (tokens, tokens)
    assert answer.usage.context_tokens_saved == tokens - latents
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + tokens


def len_of_prompt(live, messages):
    processor = live.pipe.processor
    content = [
        {"type": "context", "num_blocks": 1} if part["type"] == "context" else part for part in messages[0]["content"]
    ]
    return processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"].shape[1]


def test_other_options_are_another_context(fresh, http):
    live = fresh
    ids = [post(http, live, TEXT, **options)[1]["id"] for options in ({}, {"dtype": "int8"}, {"exact": True})]
    assert len(set(ids)) == 3
    # The default, said in words, is the same call.
    longest = live.pipe.model.config.longest_segment
    assert post(http, live, TEXT, segment_length=longest, verify=True) == (
        200,
        {**post(http, live, TEXT)[1], "id": ids[0]},
    )
    # Both words give one length.
    by_ratio = post(http, live, TEXT, ratio=2)[1]["id"]
    assert by_ratio not in ids
    assert post(http, live, TEXT, segment_length=2 * live.pipe.model.config.num_latents)[1]["id"] == by_ratio
    assert http(live).delete(f"/v1/contexts/{by_ratio}").status_code == 200
    listed = http(live).get("/v1/contexts").json()["data"]
    assert listed[0] == {"id": ids[0], "object": "context"}
    assert {entry["id"] for entry in listed} == set(ids)


def test_a_stream_gives_the_reply_piece_by_piece_and_then_the_usage(live, client, sizes):
    stream = client(live).chat.completions.create(
        model="c3-tiny",
        messages=ask({"type": "context", "text": TEXT}, REPEAT),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == sizes[0]


def test_several_contexts_documents_and_a_begun_reply(live, client, http, other, sizes):
    context_id = post(http, live, other)[1]["id"]
    create = client(live).chat.completions.create
    answer = create(
        model="c3-tiny",
        messages=ask({"type": "context", "text": TEXT}, {"type": "context", "id": context_id}, REPEAT),
        max_tokens=8,
    )
    assert answer.usage.context_tokens > sizes[0]
    both = answer.usage.prompt_tokens
    in_front = create(
        model="c3-tiny",
        messages=ask(REPEAT),
        max_tokens=8,
        extra_body={"documents": [{"text": TEXT}, {"id": context_id, "title": "Horses"}]},
    )
    assert in_front.usage.prompt_tokens > both
    # The last is begun up to its end: there is nothing to add, and the reply says that it has ended.
    for begun, rest in (("The night train left", " the harbour a little after nine."), (TEXT, "")):
        messages = [*ask({"type": "context", "text": TEXT}, REPEAT), {"role": "assistant", "content": begun}]
        (choice,) = create(model="c3-tiny", messages=messages).choices
        assert (choice.message.content, choice.finish_reason) == (rest, "stop")
        streamed = [chunk.choices[0] for chunk in create(model="c3-tiny", messages=messages, stream=True)]
        assert "".join(choice.delta.content or "" for choice in streamed) == rest
        assert streamed[-1].finish_reason == "stop"


def test_a_segment_of_a_longer_text(live, client, http, pipe):
    text = " ".join(f"Number {index} is a line of its own." for index in range(9))
    context = post(http, live, text, segment_length=32)[1]
    assert context["segments"] > 2
    restored = pipe.restore(pipe.compress(text, segment_length=32))
    answer = http(live).get(f"/v1/contexts/{context['id']}/text")
    assert answer.text == restored.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    part = http(live).get(f"/v1/contexts/{context['id']}/text", params={"segments": "1-2"}).text
    assert part
    assert part in answer.text
    lines = http(live).get(f"/v1/contexts/{context['id']}/text", params={"format": "jsonl"})
    assert lines.headers["content-type"] == "application/jsonl"
    segments = [json.loads(line) for line in lines.text.splitlines()]
    assert [segment["segment"] for segment in segments] == list(range(context["segments"]))
    assert "".join(segment["text"] for segment in segments) == restored.text
    assert tuple(segment["exact"] for segment in segments) == restored.exact_segments
    query = {"segments": "1-2", "format": "jsonl"}
    lines = http(live).get(f"/v1/contexts/{context['id']}/text", params=query)
    assert [json.loads(line) for line in lines.text.splitlines()] == segments[1:3]
    refused = http(live).get(f"/v1/contexts/{context['id']}/text", params={"format": "xml"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "`format` must be text or jsonl."
    chosen = {"type": "context", "id": context["id"], "segments": [1]}
    reply = client(live).chat.completions.create(model="c3-tiny", messages=ask(chosen, REPEAT))
    assert part.startswith(reply.choices[0].message.content)


def test_settings_of_the_reply(live, start, random_pipe, client):
    chat = client(live).chat.completions
    common = {"model": "c3-tiny", "messages": ask({"type": "context", "text": TEXT}, REPEAT)}
    stopped = chat.create(**common, stop=["harbour", "zebra"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("The night train left the ", "stop")
    short = chat.create(**common, max_tokens=3)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")
    # Of a model that is sure of nothing: another one may draw the same at every seed.
    chat, common = client(start(random_pipe)).chat.completions, {**common, "model": "random"}
    drawn = [chat.create(**common, n=3, temperature=1.5, seed=seed, max_tokens=12).choices for seed in (7, 7, 8)]
    texts = [[choice.message.content for choice in choices] for choices in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in drawn[0]] == [0, 1, 2]


def test_completions_go_on_from_plain_text(live, client, pipe):
    answer = client(live).completions.create(model="c3-tiny", prompt=["<|im_end|>", "The night"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    # Plain text, several tokens, and not the one special token.
    ids = [pipe.processor.reader.read_plain([text])[0][0] for text in ("<|im_end|>", "The night")]
    assert len(ids[0]) > 1
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    chunks = client(live).completions.create(model="c3-tiny", prompt="The night", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[2].text


def test_models_and_health(live, client, http):
    (model,) = client(live).models.list().data
    assert (model.id, model.num_latents) == ("c3-tiny", live.pipe.model.config.num_latents)
    assert client(live).models.retrieve("c3-tiny").id == "c3-tiny"
    assert http(live).get("/health").json() == {"status": "ready", "engine": "transformers"}
    with pytest.raises(Gone, match="there is no such model here; it is 'c3-tiny'"):
        client(live).models.retrieve("gpt")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "gpt"}, Gone, "there is no model 'gpt' here; it is 'c3-tiny'"),
        ({"messages": []}, Bad, "`messages`: List should have at least 1 item"),
        ({"messages": ask({"type": "image_url"})}, Bad, r"`messages\.0\.content\.0`: Input tag"),
        ({"messages": ask({"type": "context"})}, Bad, "a context has exactly one of `id` and `text`"),
        ({"messages": ask({"type": "context", "id": "c3-0"})}, Gone, "there is no context of this id"),
        ({"messages": ask({"type": "context", "id": "../a"})}, Gone, "there is no context of this id"),
        ({"messages": ask({"type": "context", "text": TEXT, "segments": [1]})}, Bad, "0 to 0, got"),
        ({"messages": [{"role": "assistant", "content": "x"}], "extra_body": {"documents": [{"text": "a"}]}},
         Bad, "`documents` stand in the first user message, and there is none"),
        ({"max_tokens": 100_000}, Bad, r"the reply may take 100,000, the model has [\d,]+\. Shorten"),
        ({"messages": ask("a " * 40_000)}, Bad, "Shorten one of them"),
        ({"messages": ask({"type": "context", "text": "word " * 40_000})}, Bad, "Choose some of them"),
        ({"n": 9}, Bad, r"a request may ask for 8 replies \(`n` times prompts\)"),
        ({"temperature": 3}, Bad, "`temperature`: Input should be less than or equal to 2"),
        ({"logprobs": True}, Bad, "`logprobs` is not known here, or cannot be had"),
        ({"messages": [{**ask("Hi")[0], "name": "Ada"}]}, Bad, r"`messages\.0\.name`: Extra inputs are not permitted"),
        ({"stop": ["a"] * 5}, Bad, "`stop` must be up to 4 strings"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, Bad, r"`messages\.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_openai_s_form(live, client, changes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        client(live).chat.completions.create(**{"model": "c3-tiny", "messages": ask("Hi"), **changes})
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": TEXT, "ratio": 21}, "`ratio` must be at most 20"),
        ({"text": TEXT, "segment_length": 3}, "`segment_length` must be at least 16"),
        ({"text": TEXT, "dtype": "float64"}, "`dtype`: Input should be 'float32', 'bfloat16' or 'int8'"),
        ({"text": TEXT, "colour": 1}, "`colour`: Extra inputs are not permitted"),
        ({"text": 3}, "`text`: Input should be a valid string"),
        ({}, "`text`: Field required"),
    ],
)
def test_contexts_that_cannot_be_made(live, http, body, message):
    answer = http(live).post("/v1/contexts", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_files_are_taken_as_text_or_as_a_context(live, http, pipe, tmp_path):
    upload = http(live).post("/v1/contexts", files={"file": ("a.txt", TEXT.encode())}, data={"dtype": "int8"}).json()
    assert upload["id"] == post(http, live, TEXT, dtype="int8")[1]["id"]
    pipe.compress(TEXT, exact=True).save(tmp_path / "a.c3")
    data = (tmp_path / "a.c3").read_bytes()
    stored = [http(live).post("/v1/contexts", files={"file": ("a.c3", data)}).json() for _ in range(2)]
    assert stored[0] == stored[1]
    assert stored[0]["exact"] is True
    assert http(live).get(f"/v1/contexts/{stored[0]['id']}/text").text == TEXT
    wrong = http(live).post("/v1/contexts", files={"file": ("a.c3", b"no context")})
    assert wrong.status_code == 400
    assert (
        "this is no compressed context: `path`: the file is no whole safetensors" in wrong.json()["error"]["message"]
    )
    assert http(live).post("/v1/contexts", files={"other": ("a", b"")}).json()["error"]["code"] == "no_file"
    not_text = http(live).post("/v1/contexts", files={"file": ("a.txt", b"\xff\xfe")})
    assert (not_text.status_code, not_text.json()["error"]["code"]) == (400, "cannot_compress")
    bytes_of_it = http(live).post("/v1/contexts", files={"file": ("a", b"\xff\xfe")}, data={"exact": "true"}).json()
    assert http(live).get(f"/v1/contexts/{bytes_of_it['id']}/text").content == b"\xff\xfe"


def test_a_context_is_deleted(live, http):
    path = f"/v1/contexts/{post(http, live, TEXT)[1]['id']}"
    assert http(live).get(path).json()["status"] == "ready"
    assert http(live).delete(path).json()["deleted"] is True
    for method in ("GET", "DELETE"):
        assert http(live).request(method, path).json()["error"]["code"] == "context_not_found"
    assert http(live).get(path + "/text").status_code == 404


def test_a_long_text_in_the_background_says_how_far_it_is(start, random_pipe, http, monkeypatch, capsys):
    live = start(random_pipe)
    body = {"text": "some words of a text. " * 4000, "background": True, "verify": False}
    with slowed(random_pipe.model.model.encoder):
        answer = http(live).post("/v1/contexts", json=body)
        assert (answer.status_code, answer.json()["status"]) == (202, "compressing")
        path = f"/v1/contexts/{answer.json()['id']}"
        assert http(live).delete(path).json()["error"]["code"] == "context_busy"
        wait_until(lambda: 0 < http(live).get(path).json()["progress"] < 1)
        # What is short does not wait for it.
        assert http(live).post("/v1/completions", json={"prompt": "The", "max_tokens": 1}).status_code == 200
        assert http(live).get(path).json()["status"] == "compressing"
        chat = {"messages": ask({"type": "context", "id": answer.json()["id"]}, "?")}
        for told in (http(live).get(path + "/text"), http(live).post("/v1/chat/completions", json=chat)):
            assert (told.status_code, told.json()["error"]["code"]) == (409, "context_not_ready")
        monkeypatch.setitem(random_pipe.processor.prompts, "ask", "Q: ")
        assert main(["ask", answer.json()["id"], "Who?", "--server", live.url]) == 1
        assert "is still being compressed; ask again when it is done" in capsys.readouterr().err
