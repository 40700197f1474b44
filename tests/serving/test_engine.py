"""The engine: replies that wait are made together, nobody holds others up, and who leaves frees a place."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


pytest.importorskip("fastapi", reason="needs the extra serve")

import httpx

from c3_hf.serving.engine import ModelThread, TransformersEngine, describe_error
from c3_hf.serving.protocol import ApiError, Limits
from c3_hf.serving.replies import Prompt, Settings

from .conftest import ask, slowed, wait_until


@pytest.fixture
def thread():
    thread = ModelThread()
    yield thread
    thread.close()


@pytest.fixture
def make(random_pipe, thread):
    """An engine on the random model, and the sizes of its batches."""

    def call(**limits):
        batches = []
        return TransformersEngine(random_pipe, thread, Limits(**limits), batches.append), batches

    return call


@pytest.fixture
def prompts(random_pipe):
    """Prompts of several lengths, with none, one and two contexts."""
    made = []
    for index, texts in enumerate(([], ["a text"], ["another", "and one more"], ["last of them"])):
        content = [{"type": "context", "num_blocks": 1} for _ in texts] + [{"type": "text", "text": "x" * 3 * index}]
        ids = random_pipe.processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"][0]
        latents = [
            random_pipe.compress([text], latent_dtype=torch.float32).project(random_pipe.model) for text in texts
        ]
        made.append(Prompt(ids.tolist(), torch.cat(latents) if latents else None))
    return made


async def collect(engine, prompt, settings):
    return [piece async for piece in engine.reply(prompt, settings)]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_what_waits_is_made_together_and_comes_out_as_alone(make, prompts, thread, hold):
    """Each row with its own length and way to choose tokens."""
    settings = [
        Settings(12),
        Settings(5, temperature=1.0, seed=3),
        Settings(9, temperature=0.7, top_p=0.9, seed=4),
        Settings(7),
    ]
    engine, batches = make()

    async def alone():
        return [await collect(engine, *pair) for pair in zip(prompts, settings)]

    async def together():
        tasks = [asyncio.create_task(collect(engine, *pair)) for pair in zip(prompts, settings)]
        with hold(thread):
            await asyncio.sleep(0.05)
        return await asyncio.gather(*tasks)

    singles = asyncio.run(alone())
    assert batches == [1, 1, 1, 1]
    batched = asyncio.run(together())
    assert batches[4:] == [4]
    assert [text_of(pieces) for pieces in batched] == [text_of(pieces) for pieces in singles]
    assert [pieces[-1].tokens for pieces in batched] == [12, 5, 9, 7]


def test_batches_are_bounded_in_rows_and_in_positions(make, prompts, thread, hold):
    async def sizes(engine, settings):
        tasks = [asyncio.create_task(collect(engine, prompts[0], setting)) for setting in settings]
        with hold(thread):
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)

    engine, batches = make(max_batch=2)
    asyncio.run(sizes(engine, [Settings(2)] * 5))
    assert batches == [2, 2, 1]
    engine, batches = make()
    # The second prompt is longer by more than the first leaves of the model's 512 positions.
    long = Prompt(prompts[0].ids * 3)
    room = 512 - len(prompts[0].ids)

    async def both():
        with_long = [(prompts[0], Settings(room)), (long, Settings(1)), (prompts[0], Settings(1))]
        tasks = [asyncio.create_task(collect(engine, *pair)) for pair in with_long]
        with hold(thread):
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)

    asyncio.run(both())
    assert batches == [2, 1]


def test_a_seed_draws_the_same_and_top_p_leaves_the_likeliest(make, prompts):
    engine, _ = make()

    def draw(**settings):
        return text_of(asyncio.run(collect(engine, prompts[1], Settings(8, **settings))))

    assert draw(temperature=1.0, seed=5) == draw(temperature=1.0, seed=5) != draw(temperature=1.0, seed=6)
    assert draw(temperature=2.0, top_p=1e-9, seed=1) == draw()
    assert len({draw(temperature=2.0) for _ in range(4)}) > 1


def test_draws_have_the_model_s_probabilities(random_pipe):
    from c3_hf.serving.engine import _Row

    logits = torch.tensor([0.0, 1.0, 2.0, -5.0])
    row = _Row(Prompt([1]), Settings(1, temperature=2.0, top_p=0.95, seed=0), 0, random_pipe, print)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[row.draw(logits).argmax()] += 1
    expected = torch.softmax(logits / 2, -1)
    expected = torch.where(torch.tensor([True, True, True, False]), expected, 0)
    torch.testing.assert_close(counts / 4000, expected / expected.sum(), atol=0.03, rtol=0)


def test_a_queue_has_an_end_and_no_place_is_lost(make, prompts, thread, hold):
    engine, _ = make(max_waiting=2)

    async def call():
        with hold(thread):
            tasks = [asyncio.create_task(collect(engine, prompts[0], Settings(2))) for _ in range(3)]
            with pytest.raises(ApiError, match="all 2 places for replies of the server are taken"):
                await tasks[2]
        await asyncio.gather(*tasks[:2])
        await collect(engine, prompts[0], Settings(2))

    asyncio.run(call())
    assert engine.places.used == 0


def test_time_is_limited_in_the_queue(make, prompts, thread, hold):
    engine, batches = make(seconds=0.2)

    async def call():
        with hold(thread), pytest.raises(ApiError, match="the time for one request is over") as caught:
            await collect(engine, prompts[0], Settings(2))
        assert (caught.value.status, caught.value.headers()) == (503, {"x-should-retry": "false"})
        await thread.run(lambda: None)

    asyncio.run(call())
    assert (batches, engine.places.used) == ([], 0)


def test_a_model_that_fails_fails_its_batch_and_nothing_else(make, prompts, random_pipe, monkeypatch, caplog):
    engine, _ = make()
    generate = type(random_pipe.model).generate

    def fail_once(self, *args, **kwargs):
        monkeypatch.setattr(type(random_pipe.model), "generate", generate)
        raise RuntimeError("out of memory at the user's secret text")

    monkeypatch.setattr(type(random_pipe.model), "generate", fail_once)
    with pytest.raises(ApiError, match="the model failed on this batch of requests") as caught:
        asyncio.run(collect(engine, prompts[0], Settings(2)))
    assert caught.value.status == 500
    assert asyncio.run(collect(engine, prompts[0], Settings(2)))


def test_the_log_has_the_kind_and_place_of_an_error_and_not_its_message():
    with pytest.raises(ValueError, match="a secret") as caught:
        raise ValueError("a secret")
    assert describe_error(caught.value).startswith("ValueError at ")
    assert "test_engine.py" in describe_error(caught.value)
    assert "secret" not in describe_error(caught.value)


def test_short_work_passes_between_the_pieces_of_long_work(thread):
    begun, order = threading.Event(), []

    def long():
        begun.set()
        wait_until(lambda: thread._short)
        thread.let_short_work_pass()
        order.append("long")

    future = thread.submit_long(long)
    begun.wait(60)
    thread.submit(lambda: order.append("short")).result(60)
    future.result(60)
    assert order == ["short", "long"]


def test_a_client_that_leaves_frees_its_place_and_the_model(start, random_pipe, client):
    live = start(random_pipe)
    with slowed(random_pipe.model) as steps:
        stream = client(live).chat.completions.create(
            model="random", messages=ask("Hi"), max_tokens=400, temperature=1, seed=1, stream=True
        )
        next(iter(stream))
        assert live.engine.places.used == 1
        stream.close()
        wait_until(lambda: live.engine.places.used == 0)
        live.thread.submit(lambda: None).result(60)
    assert len(steps) < 400


def test_a_client_that_leaves_before_its_answer_frees_its_place_too(start, random_pipe, http):
    live = start(random_pipe)
    body = {"prompt": "Hi", "max_tokens": 400, "temperature": 1, "seed": 1}
    with slowed(random_pipe.model) as steps:
        with pytest.raises(httpx.ReadTimeout):
            http(live).post("/v1/completions", json=body, timeout=0.5)
        wait_until(lambda: live.engine.places.used == 0)
        live.thread.submit(lambda: None).result(60)
    assert len(steps) < 400


def test_a_slow_reader_holds_nobody_up(start, random_pipe, client):
    live = start(random_pipe)
    slow = iter(client(live).chat.completions.create(model="random", messages=ask("Hi"), max_tokens=100, stream=True))
    next(slow)
    # It does not read on; the others are answered.
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(
                lambda text: client(live).chat.completions.create(model="random", messages=ask(text), max_tokens=4),
                ("a", "b", "c", "d"),
            )
        )
    assert len(replies) == 4
    assert sum(1 for _ in slow) >= 1
