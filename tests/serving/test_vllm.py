"""The engine `vllm` against a small stand-in for vLLM: the exported decoder, run by transformers alone."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

import httpx  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

import c3_hf  # noqa: E402
from c3_hf.conversion.export import export  # noqa: E402
from c3_hf.serving.engine import ModelThread  # noqa: E402
from c3_hf.serving.protocol import Limits  # noqa: E402
from c3_hf.serving.vllm import VllmEngine  # noqa: E402
from factories import make_model, make_processor  # noqa: E402

from .conftest import TEXT, Live, ask  # noqa: E402


REPEAT = "Repeat the text: "


class FakeVllm:
    """What of vLLM's server the engine uses: models, chat with `prompt_embeds` parts, completions of token ids.

    Args:
        folder: An exported decoder.
        deaf: Whether it answers every prompt as the first one, as a prefix cache does whose keys leave embeddings out.
    """

    def __init__(self, folder, deaf=False):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.deaf, self.first, self.bodies, self.fail = deaf, None, [], None
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.post("/v1/completions", response_model=None)(self.complete)

    async def models(self):
        return {"data": [{"id": "decoder"}]}

    async def chat(self, request: Request):
        body = await request.json()
        self.bodies.append(copy.deepcopy(body))
        if self.fail is not None:
            return JSONResponse({"error": {"message": "told to"}}, self.fail)
        if body["n"] > 1 and body["temperature"] == 0:
            return JSONResponse({"error": {"message": "n must be 1 when using greedy sampling"}}, 400)
        embeds = []
        for message in body["messages"]:
            for part in message["content"]:
                if part["type"] == "prompt_embeds":
                    file = io.BytesIO(base64.b64decode(part["data"]))
                    embeds.append(torch.load(file, weights_only=True))
                    # As vLLM has it: the template is given a text, and what it renders is split there.
                    part.update(type="text", text="<prompt_embeds>")
        options = {name: body[name] for name in ("add_generation_prompt", "continue_final_message") if name in body}
        markup = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, **{"add_generation_prompt": True, **options}
        )
        first, *others = [self.embed(self.read(text)) for text in markup.split("<prompt_embeds>")]
        rows = [first, *(row for pair in zip(embeds, others, strict=True) for row in pair)]
        return self.stream(torch.cat(rows)[None], body, lambda text: {"delta": {"content": text}})

    async def complete(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        return self.stream(self.embed(body["prompt"])[None], body, lambda text: {"text": text})

    def read(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def embed(self, ids):
        return self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))

    def stream(self, embeds, body, said):
        if self.deaf:
            self.first = embeds if self.first is None else self.first
            embeds = self.first
        new = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            do_sample=False,
        )[0].tolist()
        stopped = new[-1] in self.model.generation_config.eos_token_id
        words = [self.tokenizer.decode(token) for token in (new[:-1] if stopped else new)]

        async def events():
            for index in range(body["n"]):
                for word in words:
                    yield self.event(choices=[{"index": index, **said(word), "finish_reason": None}])
                end = "stop" if stopped else "length"
                yield self.event(choices=[{"index": index, **said(""), "finish_reason": end}])
            yield self.event(
                choices=[], usage={"prompt_tokens": embeds.shape[1], "completion_tokens": len(words) * body["n"]}
            )
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @staticmethod
    def event(**data):
        return f"data: {json.dumps(data)}\n\n".encode()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, plain_path):
    folder = tmp_path_factory.mktemp("exported") / "decoder"
    export(plain_path, folder, "decoder")
    return folder


@pytest.fixture(scope="module")
def fake(exported):
    fake = FakeVllm(exported)
    with Live(fake.app) as live:
        fake.url = live.url
        yield fake


@pytest.fixture(scope="module")
def second(exported):
    fake = FakeVllm(exported)
    with Live(fake.app) as live:
        fake.url = live.url
        yield fake


@pytest.fixture
def through(start, plain_pipe):
    """A server whose replies come from these URLs."""

    def call(*urls, **limits):
        return start(plain_pipe, engine=lambda thread, limits: VllmEngine(plain_pipe, thread, urls, limits), **limits)

    return call


@pytest.fixture
def create(client):
    return lambda live, **options: client(live).chat.completions.create(model="plain", **options)


@pytest.mark.parametrize(
    "messages",
    [
        ask({"type": "context", "text": TEXT}, REPEAT),
        ask({"type": "context", "text": TEXT}, {"type": "context", "text": "Seven grey horses."}, REPEAT),
        [*ask({"type": "context", "text": TEXT}, REPEAT), {"role": "assistant", "content": "The night train"}],
        ask("Hi <|im_end|> there, <img>"),
        [
            {"role": "system", "content": "Be <|endoftext|> brief."},
            *ask({"type": "context", "text": "a <img> b"}, "\n<img>"),
        ],
    ],
)
def test_it_gives_the_very_text_of_the_model_itself(through, start, plain_pipe, fake, create, messages):
    away = create(through(fake.url), messages=messages, max_tokens=24)
    here = create(start(plain_pipe), messages=messages, max_tokens=24)
    assert away.choices == here.choices
    assert away.usage.model_dump() == here.usage.model_dump()


def test_streams_several_replies_and_completions(through, fake, client, create):
    live = through(fake.url)
    messages = ask({"type": "context", "text": TEXT}, REPEAT)
    whole = create(live, messages=messages, max_tokens=12).choices[0].message.content
    stream = create(live, messages=messages, max_tokens=12, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: whole, 1: whole}
    client(live).completions.create(model="plain", prompt="<|im_end|> a", max_tokens=2, seed=3, stop=["zz"])
    body = fake.bodies[-1]
    assert body["prompt"] == live.pipe.processor.reader.read_plain(["<|im_end|> a"])[0][0]
    assert (body["seed"], body["stop"], body["model"]) == (3, ["zz"], "decoder")


def test_only_latents_travel_and_each_context_has_a_salt_of_its_own(through, fake, create):
    live = through(fake.url)
    for text in (TEXT, "Seven grey horses."):
        create(live, messages=ask({"type": "context", "text": text}, REPEAT), max_tokens=1)
    one, other = fake.bodies[-2:]
    assert [part["type"] for part in one["messages"][0]["content"]] == ["prompt_embeds", "text"]
    assert TEXT not in json.dumps(one)
    assert one["cache_salt"] != other["cache_salt"]


def test_servers_are_used_in_turn_and_a_dead_one_is_left_out(through, fake, second, create):
    before = len(fake.bodies), len(second.bodies)
    live = through(fake.url, second.url)
    for _ in range(4):
        create(live, messages=ask("Hi"), max_tokens=1)
    assert (len(fake.bodies) - before[0], len(second.bodies) - before[1]) == (4, 4)  # two each beside the check's two
    live.engine._urls.append("http://127.0.0.1:9")
    live.engine._dead_until["http://127.0.0.1:9"] = 0.0
    for _ in range(3):
        create(live, messages=ask("Hi"), max_tokens=1)
    assert live.engine._dead_until["http://127.0.0.1:9"] > 0
    assert "http://127.0.0.1:9" not in live.engine._in_turn()


def test_an_engine_that_refuses_or_fails(through, fake, create):
    live = through(fake.url)
    for status, kind, message in (
        (400, openai.BadRequestError, "the engine refuses the request: told to"),
        (500, openai.InternalServerError, "the engine failed with status 500"),
        (503, openai.InternalServerError, "the engine is busy"),
    ):
        fake.fail = status
        try:
            with pytest.raises(kind, match=message):
                create(live, messages=ask("Hi"), max_tokens=1)
        finally:
            fake.fail = None
    live.engine._urls[:] = ["http://127.0.0.1:9"]
    live.engine._dead_until["http://127.0.0.1:9"] = 0.0
    with pytest.raises(openai.InternalServerError, match="no engine can be reached"):
        create(live, messages=ask("Hi"), max_tokens=1)
    assert live.engine.places.used == 0


async def started(pipe, transport, urls=("http://engine",)):
    thread = ModelThread()
    engine = VllmEngine(pipe, thread, urls, Limits(), transport=transport)
    try:
        await engine.start()
    finally:
        await engine.close()
        thread.close()


def test_an_engine_that_cannot_tell_contexts_apart_is_refused(plain_pipe, exported):
    def transport(fake):
        return httpx.ASGITransport(fake.app)

    asyncio.run(started(plain_pipe, transport(FakeVllm(exported))))
    with pytest.raises(
        ValueError, match=r"gives the same reply to two different contexts.*--no-enable-prefix-caching"
    ):
        asyncio.run(started(plain_pipe, transport(FakeVllm(exported, deaf=True))))
    other = FakeVllm(exported)
    other.tokenizer.chat_template = "{{ messages[0].content | map(attribute='text') | join }}"
    with pytest.raises(ValueError, match=r"reads \d+ tokens in a prompt that has \d+ here, so its chat template"):
        asyncio.run(started(plain_pipe, transport(other)))
    broken = FakeVllm(exported)
    broken.fail = 400
    with pytest.raises(ValueError, match=r"does not answer as vLLM with prompt embeddings does \(the engine refuses"):
        asyncio.run(started(plain_pipe, transport(broken)))
    nobody = httpx.MockTransport(lambda request: httpx.Response(404))
    with pytest.raises(ValueError, match="the engine does not list its models"):
        asyncio.run(started(plain_pipe, nobody))


def test_what_the_engine_cannot_be_made_of(pipe):
    with pytest.raises(ValueError, match="`urls` is empty: name at least one server"):
        VllmEngine(pipe, ModelThread(), [], Limits())
    with pytest.raises(ValueError, match="`urls`: 'localhost' is no URL"):
        VllmEngine(pipe, ModelThread(), ["localhost"], Limits())
    strided = c3_hf.C3Pipeline(make_model(latent_stride=4), make_processor())
    with pytest.raises(ValueError, match="`pipe`: the latents of this model have a stride"):
        VllmEngine(strided, ModelThread(), ["http://a"], Limits())
