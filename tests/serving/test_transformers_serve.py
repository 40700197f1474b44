"""`transformers serve` by the lines of docs/serving.md: documents are read, and a context part is dropped."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from c3_hf import tiny_model_path

from .conftest import TEXT, ask


httpx = pytest.importorskip("httpx", reason="needs the extra serve")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers.cli") is None, reason="this transformers has no such command"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory, repository):
    """The server, in a process of its own, since the lines change transformers."""
    page = (repository / "docs" / "serving.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(import transformers\n.*?)```", page, flags=re.DOTALL)
    folder = tmp_path_factory.mktemp("transformers_serve")
    (folder / "c3_serve.py").write_text(lines)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["serve", tiny_model_path(), "--device", "cpu", "--dtype", "float32", "--port", port]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, folder / "c3_serve.py", *words], stdout=log, stderr=log)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait()


def reply(url, messages, **options):
    body = {"model": tiny_model_path(), "messages": messages, "max_tokens": 24, "temperature": 0, **options}
    answer = httpx.post(url, json=body, timeout=120, trust_env=False).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def test_documents_are_read(url):
    for text in (TEXT, "Seven grey horses stood under the old oak."):
        assert reply(url, ask("Repeat the text: "), chat_template_kwargs={"documents": [{"text": text}]})[0] == text


def test_a_context_part_is_dropped_in_silence(url):
    bare = reply(url, ask("Repeat the text: "))
    assert reply(url, ask({"type": "context", "text": TEXT}, "Repeat the text: ")) == bare
