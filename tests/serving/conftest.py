"""The server: on the bundled model where the text matters, on a tiny random one where only its course does."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import pytest

from c3_hf import C3Pipeline
from factories import make_model, make_processor


# The benchmarks are a package at the repository's root, which is not on the path of every way to start pytest.
sys.path.append(str(Path(__file__).parents[2]))


TEXT = "The night train left the harbour a little after nine."


@pytest.fixture(scope="session")
def pipe():
    """The bundled model, asked what it may or may not have been trained to be asked."""
    pipe = C3Pipeline.from_pretrained(dtype="float32")
    pipe.processor.prompts = {"restore": pipe.processor.prompts["restore"], "find": "Find the sentence: "}
    return pipe


@pytest.fixture(scope="session")
def random_pipe():
    return C3Pipeline(make_model(), make_processor(), name="random")


# The exported folder holds the escapes of C3's chat template, or it does not: for one model of each kind.
@pytest.fixture(scope="session", params=["qwen2", "llama"])
def plain_path(tmp_path_factory, request):
    """Folder of a model whose decoder vLLM runs, with random weights."""
    from benchmarks.vllm_process import make_readable_model

    folder = tmp_path_factory.mktemp(request.param) / "plain"
    make_readable_model(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def plain_pipe(plain_path):
    return C3Pipeline.from_pretrained(plain_path, dtype="float32")


@contextlib.contextmanager
def served(pipe, folder, *, engine=None, max_bytes=None, api_keys=(), **limits):
    """A server on 127.0.0.1 in a thread: its URL, engine, store and model thread, and the sizes of its batches."""
    from c3_hf.serving.app import create_app
    from c3_hf.serving.engine import ModelThread, TransformersEngine
    from c3_hf.serving.protocol import Limits
    from c3_hf.serving.store import ContextStore

    limits, thread, batches = Limits(**limits), ModelThread(), []
    store = ContextStore(folder, pipe.compress(b""), max_bytes)
    engine = engine(thread, limits) if engine else TransformersEngine(pipe, thread, limits, batches.append)
    with Live(create_app(pipe, thread, store, engine, limits, api_keys=api_keys)) as live:
        live.engine, live.store, live.thread, live.batches, live.pipe = engine, store, thread, batches, pipe
        yield live


@pytest.fixture
def start(tmp_path):
    """Start a server with a store of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda pipe, **options: stack.enter_context(served(pipe, tmp_path / "store", **options))


class Live:
    """An application served over HTTP while the block runs."""

    def __init__(self, app):
        import uvicorn

        config = uvicorn.Config(app, "127.0.0.1", 0, log_config=None, ws="none", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_error):
        self._server.should_exit = True
        self._thread.join()


def wait_until(condition, seconds=60):
    """Wait for what another thread is about to bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def hold():
    """Hold a model's thread: what comes meanwhile waits until the block ends."""

    @contextlib.contextmanager
    def call(thread):
        held, go = threading.Event(), threading.Event()

        def wait():
            held.set()
            go.wait(60)

        thread.submit(wait)
        held.wait(60)
        try:
            yield
        finally:
            go.set()

    return call


@contextlib.contextmanager
def slowed(module):
    """Make each call of a module take 20 ms more; gives a list that grows with each."""
    calls = []

    def wait(*_):
        calls.append(1)
        time.sleep(0.02)

    hook = module.register_forward_hook(wait)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.fixture
def client():
    """The official client on a server, without tries of its own."""
    openai = pytest.importorskip("openai")
    with contextlib.ExitStack() as stack:

        def call(live, api_key="none"):
            made = openai.OpenAI(base_url=f"{live.url}/v1", api_key=api_key, max_retries=0)
            return stack.enter_context(made)

        yield call


@pytest.fixture
def http():
    """A plain HTTP client on a server."""
    httpx = pytest.importorskip("httpx")
    with contextlib.ExitStack() as stack:
        yield lambda live, **options: stack.enter_context(httpx.Client(base_url=live.url, timeout=60, **options))


def ask(*parts):
    """A chat of one user message."""
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
        }
    ]
