"""What is measured on the server, at toy size: what is asked, counted, recorded, and that it tells what goes wrong."""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch


uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs the extra serve")

from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks import latents_setup, serving, serving_soak  # noqa: E402
from c3_hf.cli import main  # noqa: E402
from factories import make_model, make_processor  # noqa: E402


class ServerThread(serving.ServerProcess):
    """The command in a thread of the tests: a second instead of many, but a kill lets it finish what it has begun."""

    def start(self):
        self.process = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
        handler = logging.FileHandler(self._log)
        logging.getLogger("c3_hf.serving").addHandler(handler)
        self._thread = threading.Thread(target=main, args=(self._words,))
        self._thread.start()
        while not (uvicorn.servers and uvicorn.servers[-1].started):
            assert self._thread.is_alive(), self._log.read_text()
            time.sleep(0.01)

    def stop(self, how=signal.SIGINT):
        if self._thread.is_alive():
            (server,) = uvicorn.servers
            server.should_exit = True
            self._thread.join()
            uvicorn.servers.clear()


@pytest.fixture
def in_thread(monkeypatch):
    """The server in a thread, and the log of the process, which is that of the tests, as it was before."""
    made = uvicorn.Server.__init__

    def remember(server, config):
        made(server, config)
        uvicorn.servers.append(server)

    monkeypatch.setattr(uvicorn, "servers", [], raising=False)
    monkeypatch.setattr(uvicorn.Server, "__init__", remember)
    monkeypatch.setattr(serving, "ServerProcess", ServerThread)
    log = logging.getLogger("c3_hf.serving")
    handlers, level = list(log.handlers), log.level
    yield
    for handler in set(log.handlers) - set(handlers):
        handler.close()
    log.handlers[:] = handlers
    log.setLevel(level)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Arguments of both: a tiny random model, a few lines of text, a folder for the record."""
    monkeypatch.setattr(latents_setup, "clean_commit", lambda allow_changes: "0" * 40)
    # Of the process, which is that of the tests.
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for part in (make_model(), make_processor()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "eval").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "eval" / "passages_en.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": " ".join(f"The {number}th night train left." for number in range(40))}) + "\n")
    return [
        *("--data", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--name", "toy"),
        *("--output", str(tmp_path / "record")),
    ]


def record(tmp_path, name):
    return json.loads((tmp_path / "record" / f"{name}.toy.cpu.json").read_text())


def rates(words):
    return serving.main([*words, "--clients", "1", "3", "--requests", "4", "--segments", "1", "--new-tokens", "3"])


def soak(words):
    return serving_soak.main([*words, "--clients", "3", "--requests", "40", "--characters", "20"])


def check_rates(rows):
    assert [(row["clients"], row["prompt"], row["requests"]) for row in rows] == [
        (1, "stored", 4),
        (1, "text", 4),
        (3, "stored", 6),
        (3, "text", 6),
    ]
    for row in rows:
        assert row["requests_per_s"] > 0
        assert 0 < row["first_token_s"]["p50"] <= row["reply_s"]["p50"] <= row["reply_s"]["p95"]
        assert 1 <= row["reply_tokens"] <= 3
    stored, text = rows[:2]
    assert stored["prompt_tokens"] < text["prompt_tokens"]


def check_soak(summary, rows):
    assert summary["failures"] == 0
    assert summary["problems"] == {}
    # What comes in front, so that there is something to ask.
    assert summary["requests"] == 40 + 4 == sum(row["requests"] for row in rows)
    assert {row["kind"] for row in rows} >= {"chat", "stream", "bad body", "restore", "leave in a stream"}


@pytest.mark.usefixtures("in_thread")
def test_rates_of_stored_contexts_and_of_their_text(words, tmp_path):
    assert rates(words) == 0
    made = record(tmp_path, "serving")
    check_rates(made["measurements"])
    assert made["settings"]["tokens"] > 0
    assert made["settings"]["compress_s"] > 0


@pytest.mark.usefixtures("in_thread")
def test_a_soak_loses_nothing(words, tmp_path):
    assert soak(words) == 0
    check_soak(*split(record(tmp_path, "serving_soak")))


def split(made):
    summary, *rows = made["measurements"]
    return summary, rows


@pytest.mark.slow
def test_both_with_processes(words, tmp_path):
    assert rates(words) == soak(words) == 0
    check_rates(record(tmp_path, "serving")["measurements"])
    summary, rows = split(record(tmp_path, "serving_soak"))
    check_soak(summary, rows)
    assert summary["repeated_because_of_the_kill"] > 0


@pytest.mark.usefixtures("in_thread")
def test_a_soak_tells_of_what_is_lost(words, tmp_path, monkeypatch):
    """A server that loses a context at its restart, and one whose log tells of an error."""
    start = ServerThread.start

    def lose(server):
        if hasattr(server, "_thread"):
            folder = server._log.with_name("store")
            next(folder.glob("*.c3")).unlink()
            server._log.write_text("2026-11-26 08:00:00,000 the engine failed: ValueError at engine.py:1\n")
        start(server)

    monkeypatch.setattr(ServerThread, "start", lose)
    assert soak(words) == 1
    summary, _ = split(record(tmp_path, "serving_soak"))
    assert summary["problems"]["contexts lost"] == 1
    assert summary["problems"]["errors in the server's log"] == 1


@pytest.fixture
def serving_walk():
    """The module, which needs packages that the other two do without."""
    pytest.importorskip("openai", reason="needs the extra test")
    pytest.importorskip("rapidfuzz", reason="needs the extra eval")
    return importlib.import_module("benchmarks.serving_walk")


@pytest.mark.usefixtures("in_thread")
def test_the_walk_writes_what_every_step_gave(words, tmp_path, serving_walk):
    text = " ".join(f"The {number}th night train left." for number in range(40))
    (tmp_path / "data" / "long").mkdir()
    with gzip.open(tmp_path / "data" / "long" / "books_and_code.jsonl.gz", "wt") as file:
        file.write(json.dumps({"title": "Trains", "text": text}) + "\n")
    sizes = ["--characters", "900", "--segment", "1", "--ratio", "4"]
    assert serving_walk.main([*words, "--book", "Trains", *sizes]) == 0
    made = record(tmp_path, "serving_walk")
    steps = {row["step"]: row for row in made["measurements"]}
    assert (steps["upload"]["status"], steps["the same upload"]["status"]) == (201, 200)
    assert steps["upload"]["answer"] == steps["the same upload"]["answer"]
    assert steps["upload"]["answer"]["characters"] == 900
    assert steps["upload at a low ratio"]["answer"]["segments"] > steps["upload"]["answer"]["segments"] > 1
    assert steps["asked after kill -9"]["same"]
    assert steps["asked for the segment"]["usage"]["context_tokens"] > 0
    # A random model gives nothing back, and the words asked for do not stand in the text.
    assert steps["the whole text"]["differences"]
    assert steps["c3-hf ask"]["status"] == 1
    assert steps["c3-hf ask"]["said"][0].startswith("c3-hf ask: ")


def test_words_that_differ_are_told_in_pairs(serving_walk):
    assert serving_walk.differences("He got up and\n looked.", "He quickly up and\n looked.") == [["got ", "quickly "]]
    assert serving_walk.differences("a b", "a b") == []


def test_the_page_shows_what_the_walk_gave(repository, serving_walk):
    path = repository / "benchmarks" / "results" / "serving_walk.tiny.cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    steps = {row["step"]: row for row in rows}
    page = (repository / "docs" / "serving.md").read_text(encoding="utf-8")
    flowing = " ".join(page.split())
    stored, low = steps["upload"]["answer"], steps["upload at a low ratio"]
    assert json.loads(re.search(r'```json\n(\{"id".+?)```', page, re.DOTALL)[1]) == stored
    assert set(re.findall(r"c3-[0-9a-f]{32}", page)) == {stored["id"]}
    reply = steps["asked for the segment"]
    shown = "{prompt_tokens} tokens read for {context_tokens} of text".format(**reply["usage"])
    assert f"{reply['reply']}\n{shown}" in page
    assert f"the upload took {steps['upload']['seconds']:.0f} s" in flowing
    assert f"the same again {steps['the same upload']['seconds']:.2f} s" in flowing
    assert steps["asked after kill -9"]["same"]
    assert steps["the whole text"]["differences"] == [["got ", "quickly "]]
    assert "“He got up” as “He quickly up”" in flowing
    assert steps["asked for all"]["status"] == 400
    assert "All 59 take 37,878 of its 8,192 positions" in flowing
    assert "a context of 59 segments takes 37,878 positions, the model has 8,192" in steps["asked for all"]["message"]
    begun = re.search(r"^it goes on with `(.+?)…`", page, re.MULTILINE)[1]
    assert steps["begun with its beginning"]["reply"].startswith(begun)
    assert steps["begun in the middle"]["reply"] == steps["begun with its beginning"]["reply"]
    assert steps["to be found"]["reply"].startswith(" and and to self, and in the")
    size = f"{low['answer']['segments']} segments, {low['seconds']:.0f} s, {low['answer']['bytes'] / 1e6:.0f} MB"
    assert f"`-F ratio=2` ({size})" in flowing
    assert "the model does not find how the text goes on" in steps["c3-hf ask"]["said"][0]
    assert f"`{steps['c3-hf ask at a low ratio']['printed'].rstrip(chr(10))}`" in page
    middle = steps["c3-hf ask at a low ratio, in the middle"]["printed"]
    assert middle == f"{serving_walk.MIDDLE} a promotion, Fyodor Pavlovitch, you \n"
    assert "` a promotion, Fyodor Pavlovitch, you`" in page
