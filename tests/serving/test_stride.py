"""A model whose latents have a stride, served: each context keeps its own stride, also beside other requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

from c3_hf import C3Pipeline  # noqa: E402
from factories import make_model, make_processor  # noqa: E402

from .conftest import ask  # noqa: E402


# With 4 latents and a stride of up to 4; the last one has two segments.
TEXTS = ("abc", "abcdefg", "abcdefghijklmnop", "abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module")
def strided():
    return C3Pipeline(make_model(latent_stride=4, segment_length=16), make_processor(), name="strided")


@pytest.fixture
def live(start, strided):
    return start(strided)


@pytest.fixture
def say(live, client):
    create = client(live).chat.completions.create
    return lambda messages: create(model="strided", messages=messages, max_tokens=12).choices[0].message.content


def context(text):
    return {"type": "context", "text": text}


def test_stored_and_given_contexts_are_read_at_their_own_strides(live, strided, say, http):
    for texts in ([TEXTS[0]], TEXTS[:2], TEXTS[::-1]):
        stored = [http(live).post("/v1/contexts", json={"text": text, "dtype": "float32"}).json() for text in texts]
        by_id = [{"type": "context", "id": answer["id"]} for answer in stored]
        expected = strided(ask(*map(context, texts), "?"), max_new_tokens=12)
        assert say(ask(*by_id, "?")) == expected
        assert say(ask(*map(context, texts), "?")) == expected
    strides = {int(stride) for text in TEXTS for stride in strided.compress(text).strides}
    assert strides == {1, 2, 3, 4}


def test_a_batch_of_several_strides_and_of_none(live, strided, say, hold):
    chats = [ask("?"), ask(context(TEXTS[0]), "?"), ask(*map(context, TEXTS), "?"), ask(context(TEXTS[2]), "??")]
    with ThreadPoolExecutor(len(chats)) as threads:
        with hold(live.thread):
            replies = [threads.submit(say, chat) for chat in chats]
        # What came meanwhile is one batch or several; each row is as alone.
        assert [reply.result() for reply in replies] == [strided(chat, max_new_tokens=12) for chat in chats]


def test_a_text_comes_back(live, strided, http):
    answer = http(live).post("/v1/contexts", json={"text": TEXTS[3], "dtype": "float32"}).json()
    restored = http(live).get(f"/v1/contexts/{answer['id']}/text").text
    assert restored == strided.restore(strided.compress(TEXTS[3])).text


def test_positions_that_latents_skip_count(live, strided, client):
    create = client(live).chat.completions.create
    messages = ask(*map(context, TEXTS), "?")
    taken = strided.positions_taken(messages)
    tokens = create(model="strided", messages=messages, max_tokens=1).usage.prompt_tokens
    assert taken == tokens + 5 * 4 * 3
    room = strided.model.config.text_config.max_position_embeddings - taken
    assert create(model="strided", messages=messages, max_tokens=room).choices
    with pytest.raises(openai.BadRequestError, match=f"the prompt takes {taken} positions and the reply may take"):
        create(model="strided", messages=messages, max_tokens=room + 1)
    # 24 contexts take 24 x 6 tokens and 24 x 12 positions more, of 512.
    with pytest.raises(openai.BadRequestError, match="a context of 29 segments takes 522 positions, the model has"):
        create(model="strided", messages=ask(context("a" * 16 * 29)), max_tokens=1)
