"""What `c3-hf serve` says and refuses before it listens; tests/serving/test_safety.py runs it as a process."""

from __future__ import annotations

import logging

import pytest
from transformers.utils import logging as transformers_logging

from c3_hf.cli import main


uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(autouse=True)
def logs_as_before():
    """The command sets up the log of its process, which here is that of the tests."""
    logs = [logging.getLogger(name) for name in ("c3_hf.serving", "uvicorn.error")]
    before = [(log, list(log.handlers), log.level) for log in logs]
    yield
    for log, handlers, level in before:
        log.handlers[:] = handlers
        log.setLevel(level)
    transformers_logging.enable_progress_bar()


def test_it_says_what_it_serves_and_where(tmp_path, monkeypatch, capsys):
    async def listen(server):
        server.started = True

    monkeypatch.setattr(uvicorn.Server, "serve", listen)
    store = tmp_path / "store"
    assert main(["serve", "--store", str(store), "--port", "8123", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().err
    assert f"c3-hf serve: c3-tiny on http://127.0.0.1:8123/v1, 0 contexts in {store}" in said


def test_handlers_of_others_stay_open(tmp_path, monkeypatch):
    async def listen(server):
        server.started = True

    class Others(logging.StreamHandler):
        closed = False

        def close(self):
            self.closed = True
            super().close()

    others = Others()
    monkeypatch.setattr(uvicorn.Server, "serve", listen)
    assert main(["serve", "--store", str(tmp_path / "store")]) == 0
    assert not others.closed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vllm"], "`--engine vllm` and `--engine-url` go together"),
        (["--engine-url", "http://a"], "`--engine vllm` and `--engine-url` go together"),
        (["--port", "65536"], "`--port` must be 0 to 65535, got 65536"),
        (["--port", "-1"], "`--port` must be 0 to 65535, got -1"),
        (["--store-size", "much"], "`--store-size` must be a size such as 500MB or 10GB, got 'much'"),
        (["--max-text", "0"], "`--max-text` must be a size such as 500MB or 10GB, got '0'"),
        (["--store-size", "9" * 400], "`--store-size` must be a size such as 500MB or 10GB"),
        (["--store", ""], "`--store` is empty. Name a folder"),
        (["--engine", "vllm", "--engine-url", "no url", "--store", "."], "`--engine-url`: 'no url' is no URL"),
        (["--host", " "], "`--host` is empty. Give an address, such as 127.0.0.1"),
        (["--api-key", ""], "`--api-key` is empty, which no client can give"),
        (["--api-key", "a", "--api-key", "caf\udce9"], "`--api-key` is not UTF-8 at character 3"),
        (["--time-limit", "nan"], "`--time-limit` must be above 0, got nan"),
        (["--max-batch", "0"], "`--max-batch` must be above 0, got 0"),
    ],
)
def test_what_it_refuses(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_cannot_be_used_and_a_store_that_is_a_file(capsys, tmp_path, monkeypatch):
    async def listen(server):
        # As uvicorn does after a line in its log; the log itself would hold on to the streams of this test.
        raise SystemExit(3)

    monkeypatch.setattr(uvicorn.Server, "serve", listen)
    assert main(["serve", "--store", str(tmp_path / "store"), "--host", "203.0.113.9"]) == 1
    (tmp_path / "file").touch()
    assert main(["serve", "--store", str(tmp_path / "file")]) == 1
    assert f"`--store` {tmp_path / 'file'} is a file; give a folder" in capsys.readouterr().err
