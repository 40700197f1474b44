"""The engine `vllm` against vLLM itself: servers of the exported decoder in an environment of their own.

Run by `C3_VLLM_PYTHON=FOLDER/bin/python python -m pytest tests/serving/test_real_vllm.py`; see make_vllm_env.sh.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

from c3_hf import C3Pipeline  # noqa: E402
from c3_hf.conversion.export import export  # noqa: E402
from c3_hf.serving.engine import ModelThread  # noqa: E402
from c3_hf.serving.protocol import Limits  # noqa: E402
from c3_hf.serving.vllm import VllmEngine  # noqa: E402

from .conftest import TEXT, ask, served  # noqa: E402


pytestmark = pytest.mark.vllm
REPEAT = "Repeat the text: "
# Of up to 64 tokens, one segment each: a longer text the server cuts, and `generate()` does not.
TEXTS = [f"{number}: {TEXT}"[:120] for number in range(1, 11)]
CHATS = [
    ask({"type": "context", "text": TEXT * 3}, REPEAT),
    ask({"type": "context", "text": TEXT}, {"type": "context", "text": "Seven grey horses."}, REPEAT),
    [*ask({"type": "context", "text": TEXT}, REPEAT), {"role": "assistant", "content": "The night train"}],
    ask("Hi <|im_end|> there, <img>"),
    [
        {"role": "system", "content": "Be <|endoftext|> brief."},
        *ask({"type": "context", "text": "a <img> b"}, "\n<img>"),
    ],
]


@contextlib.contextmanager
def engines(kind, number, folder):
    """A model, the server of it through so many vLLM servers, these, and the server that computes here."""
    from benchmarks.vllm_process import VllmProcess, make_readable_model

    make_readable_model(folder / "plain", kind)
    export(folder / "plain", folder / "decoder", "decoder")
    pipe = C3Pipeline.from_pretrained(folder / "plain", dtype="float32")
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(number):
            log = folder / f"{index}.log"
            process = VllmProcess(os.environ["C3_VLLM_PYTHON"], folder / "decoder", log, "--enable-prompt-embeds")
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            process.wait()
        urls = [process.url for process in processes]
        away = stack.enter_context(
            served(pipe, folder / "a", engine=lambda thread, limits: VllmEngine(pipe, thread, urls, limits))
        )
        here = stack.enter_context(served(pipe, folder / "b"))
        yield pipe, away, processes, here


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two servers of a decoder whose folder cannot hold the escapes of the chat template."""
    with engines("qwen2", 2, tmp_path_factory.mktemp("qwen2")) as found:
        yield found


@pytest.fixture
def say(client):
    def call(live, messages, **options):
        options = {"max_tokens": 24, **options}
        return client(live).chat.completions.create(model="plain", messages=messages, **options)

    return call


def same(say, away, here, messages):
    there, own = say(away, messages), say(here, messages)
    assert there.choices == own.choices
    assert there.usage.model_dump() == own.usage.model_dump()
    return own.choices[0].message.content


def test_ten_contexts_give_the_very_text_of_generate(two, say):
    pipe, away, _, _ = two
    replies = []
    for text in TEXTS:
        messages = ask({"type": "context", "text": text}, REPEAT)
        replies.append(say(away, messages).choices[0].message.content)
        assert replies[-1] == pipe(messages, max_new_tokens=24, do_sample=False)
    assert len(set(replies)) == 10


@pytest.mark.parametrize("messages", CHATS)
def test_every_kind_of_chat_is_what_it_is_here(two, say, messages):
    _, away, _, here = two
    assert same(say, away, here, messages)


def test_log_probabilities_of_the_first_token(two):
    from benchmarks.vllm_engine import compare

    pipe, _, processes, _ = two

    async def differences():
        thread = ModelThread()
        engine = VllmEngine(pipe, thread, [processes[0].url], Limits())
        try:
            return [(await compare(pipe, engine, processes[0].url, text, 1)).difference for text in TEXTS]
        finally:
            await engine.close()
            thread.close()

    assert max(asyncio.run(differences())) < 1e-3


def test_settings_of_replies(two, say, client):
    _, away, _, here = two
    messages = ask({"type": "context", "text": TEXT}, REPEAT)
    whole = say(here, messages).choices[0].message.content
    both = say(away, messages, n=2)
    assert [choice.message.content for choice in both.choices] == [whole] * 2
    assert both.usage.completion_tokens == 2 * say(here, messages).usage.completion_tokens
    # What a seed draws is the engine's own business; the same is the same again.
    drawn = [say(away, messages, temperature=1.0, seed=seed).choices[0].message.content for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    stop = whole[5:8]
    stopped = say(away, messages, stop=[stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.split(stop)[0], "stop")
    chunks = list(say(away, messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    for live in (away, here):
        (choice,) = client(live).completions.create(model="plain", prompt="<|im_end|> a", max_tokens=8).choices
        assert (
            choice.text
            == client(here).completions.create(model="plain", prompt="<|im_end|> a", max_tokens=8).choices[0].text
        )


def test_a_prompt_that_is_too_long_is_refused_before_it_travels(two, say):
    _, away, _, _ = two
    with pytest.raises(openai.BadRequestError, match="Shorten one of them"):
        say(away, ask("word " * 2000))


def test_one_of_two_servers_is_killed(two, say):
    """The last test on the two: a reply that has begun is broken off and says so, all others come from the other."""
    pipe, away, processes, here = two
    messages = ask({"type": "context", "text": TEXT}, REPEAT)
    whole = say(here, messages).choices[0].message.content
    long = iter(say(away, messages, max_tokens=800, stream=True))
    next(long)
    # Which of the two makes it is told by what they are asked for next; one of them is killed under it.
    busy = away.engine._urls[away.engine._turn % 2]
    next(process for process in processes if process.url == busy).kill()
    with pytest.raises(openai.APIError, match="the engine broke off in the middle of a reply"):
        list(long)
    for _ in range(6):
        assert say(away, messages).choices[0].message.content == whole
    assert away.engine.places.used == 0
    with pytest.raises(ValueError, match=f"`urls`: {busy} does not answer as vLLM with prompt embeddings does"):
        asyncio.run(started(pipe, [busy]))


async def started(pipe, urls):
    thread = ModelThread()
    engine = VllmEngine(pipe, thread, urls, Limits())
    try:
        await engine.start()
    finally:
        await engine.close()
        thread.close()


def test_a_folder_that_holds_the_escapes_and_the_check_at_the_start(say, tmp_path, random_pipe):
    with engines("llama", 1, tmp_path) as (pipe, away, (process,), here):
        for messages in (ask({"type": "context", "text": TEXTS[-1]}, REPEAT), *CHATS):
            same(say, away, here, messages)
        # Another model's decoder is no engine of this one.
        with pytest.raises(ValueError, match="does not answer as vLLM with prompt embeddings does"):
            asyncio.run(started(random_pipe, [process.url]))
        # What the exported chat template keeps apart, vLLM's own clients get, too.
        body = {"model": str(tmp_path / "decoder"), "messages": ask("Hi <|im_end|> there"), "max_tokens": 1}
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none") as direct:
            usage = direct.chat.completions.create(**body).usage
        content = [{"role": "user", "content": "Hi <|im_end|> there"}]
        assert usage.prompt_tokens == pipe.processor.apply_chat_template(content)["input_ids"].shape[1]
