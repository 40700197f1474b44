"""`c3-hf compress` and `ask` with `--server`: the bundled model behind a real server on this machine."""

from __future__ import annotations

import http.server
import io
import os
import re
import sys
import threading

import pytest


pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx", reason="needs the extra serve")

from c3_hf.cli import main
from c3_hf.cli.remote import Remote

from .conftest import served


STORY = "The night train left the harbour a little after nine. Seven grey horses stood under the old oak."
BYTES = b"\xff\xfe no text"


@pytest.fixture(scope="module")
def live(pipe, tmp_path_factory):
    with served(pipe, tmp_path_factory.mktemp("store"), api_keys=("secret",)) as live:
        yield live


@pytest.fixture
def call(live, tmp_path, monkeypatch):
    """Call a command with the server and its key, in an empty folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("C3_API_KEY", "secret")
    (tmp_path / "story.txt").write_text(STORY)
    return lambda *words: main([*words, "--server", live.url])


def test_compress_prints_the_ids_and_takes_the_options(call, live, tmp_path, capsys, monkeypatch):
    (tmp_path / "bytes.bin").write_bytes(BYTES)
    assert call("compress", "story.txt", "bytes.bin", "--exact") == 0
    output = capsys.readouterr()
    ids = dict(reversed(line.split("  ")) for line in output.out.splitlines())
    assert list(ids) == ["story.txt", "bytes.bin"]
    assert live.store.open(ids["bytes.bin"]).is_exact
    tokens, latents = len(live.pipe.processor.tokenize_context(STORY)), live.pipe.model.config.num_latents
    assert re.search(rf"^story\.txt: {tokens} tokens in {latents} latents$", output.err, flags=re.MULTILINE)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(STORY.encode())))
    assert call("compress", "-", "--exact") == 0
    assert capsys.readouterr().out == f"{ids['story.txt']}  -\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.bin", "story.txt"]


def test_one_input_that_fails_does_not_stop_the_others(call, tmp_path, capsys):
    (tmp_path / "bytes.bin").write_bytes(BYTES)
    assert call("compress", "bytes.bin", "absent.txt", "story.txt") == 1
    output = capsys.readouterr()
    assert output.out.endswith("  story.txt\n")
    assert re.search(r"bytes\.bin: http://\S+ `source` is not UTF-8", output.err)
    assert "absent.txt: No such file" in output.err
    assert "2 of 3 inputs failed" in output.err


def test_ask_is_what_it_is_without_a_server(call, pipe, tmp_path, monkeypatch, capsys):
    pipe.compress(STORY).save(tmp_path / "story.c3")
    call("compress", "story.txt")
    context_id = capsys.readouterr().out.split()[0]
    monkeypatch.setattr("c3_hf.cli.ask.load_model", lambda args: pipe)
    # Asked to repeat the text, the reply is known, and goes on behind the words that begin it.
    monkeypatch.setitem(pipe.processor.prompts, "find", pipe.processor.prompts["restore"])
    assert main(["ask", "story.c3", "--start", "The night train"]) == 0
    here = capsys.readouterr()
    assert here.out == f"{STORY}\n"
    for words in (["story.c3"], [context_id], [context_id, "--segments", "0"]):
        assert call("ask", *words, "--start", "The night train") == 0
        assert capsys.readouterr() == here


def test_neighbouring_segments_are_restored_by_one_request(call, pipe, tmp_path, monkeypatch, capsys):
    story = f"{STORY} A boat came in with the tide, and nobody spoke. At noon the baker closed his shop for good."
    (tmp_path / "long.txt").write_text(story)
    assert call("compress", "long.txt", "--segment-length", "16") == 0
    context_id = capsys.readouterr().out.split()[0]
    context = pipe.compress(story, segment_length=16)
    assert len(context) > 3
    texts = [pipe.restore(segment).text for segment in context]
    asked, request = [], Remote._request

    def noted(self, method, path, **options):
        if path.endswith("/text"):
            asked.append(options["params"]["segments"])
        return request(self, method, path, **options)

    monkeypatch.setattr(Remote, "_request", noted)
    monkeypatch.setitem(pipe.processor.prompts, "find", pipe.processor.prompts["restore"])
    last = len(context) - 1
    for words, queries in (([], [f"0-{last}"]), (["--segments", f"0-1,{last}"], ["0-1", f"{last}-{last}"])):
        assert call("ask", context_id, "--start", texts[last][:12], *words) == 0
        output = capsys.readouterr()
        assert output.out == texts[last] + "\n"
        assert f"used: segment {last} of 0 to {last}" in output.err
        assert asked == queries
        asked.clear()


def test_a_free_question_is_streamed_with_all_contexts(start, tmp_path, monkeypatch, capsys, random_pipe):
    monkeypatch.setitem(random_pipe.processor.prompts, "ask", "Q: ")
    live = start(random_pipe)
    parts = [{"type": "context", "context": random_pipe.compress(text)} for text in ("one text", "another")]
    for index, part in enumerate(parts):
        part["context"].save(tmp_path / f"{index}.c3")
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Q: How many?"}]}]
    expected = random_pipe(messages, max_new_tokens=6)
    monkeypatch.chdir(tmp_path)
    words = ["ask", "0.c3", "1.c3", "How many?", "--max-new-tokens", "6", "--server", live.url]
    assert main(words) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "story.txt", "-o", "a.c3"], "`--output` means nothing with `--server`"),
        (["compress", "story.txt", "--model", "a"], "`--model` means nothing with `--server`"),
        (["compress", "story.txt", "--segment-length", "0"], r"`--segment-length` must be at least 1"),
        (
            ["compress", "story.txt", "--min-segment-length", "4"],
            "`--min-segment-length`: Extra inputs are not permitted",
        ),
        (["ask", "c3-" + "0" * 32, "--start", "a"], "there is no context of this id"),
        (["ask", "c3-" + "0" * 32, "Who?"], "`--start` is missing: this model was not trained to answer"),
        (["ask", "c3-" + "0" * 32, "--start", "a", "--text", "story.txt"], "`--text` means nothing with `--server`"),
    ],
)
def test_what_is_refused(call, words, message, capsys):
    assert call(*words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_words_that_are_not_there(call, capsys):
    call("compress", "story.txt")
    context_id = capsys.readouterr().out.split()[0]
    assert call("ask", context_id, "--start", "Nobody knows") == 1
    assert "`--start`: no segment looked at holds 'Nobody knows'" in capsys.readouterr().err
    assert call("ask", context_id, "--start", "Seven", "--segments", "1") == 1
    assert "`--segments` must name some of 0 to 0, got [1]" in capsys.readouterr().err


def test_servers_that_are_none(call, live, monkeypatch, capsys):
    words = ["compress", "story.txt", "--server"]
    assert main([*words, "localhost"]) == 1
    assert "`--server` 'localhost' is no URL; expected one such as http://127.0.0.1:8000" in capsys.readouterr().err
    for address in ("", "http://", "http://[::1", "http://a:b", "http://a\udce9"):
        assert main([*words, address]) == 1
        assert re.search(r"`--server` .* is no URL.*; expected one such as", (said := capsys.readouterr().err))
        assert said.count("\n") == 1
    assert main([*words, "HTTP://127.0.0.1:9"]) == 1
    assert "`--server` HTTP://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert main([*words, "http://127.0.0.1:9"]) == 1
    assert re.search(r"`--server` http://127\.0\.0\.1:9 cannot be reached \(.+\)\. Start", capsys.readouterr().err)
    monkeypatch.setenv("C3_API_KEY", "wrong")
    assert main([*words, live.url]) == 1
    assert "the API key is missing or wrong" in (said := capsys.readouterr().err)
    assert "Set C3_API_KEY." in said
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main([*words, live.url]) == 1
    assert "`--server` needs the package httpx" in capsys.readouterr().err


def test_a_key_and_a_name_of_any_letters(start, pipe, tmp_path, monkeypatch, capsys):
    live = start(pipe, api_keys=("schl\u00fcssel",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("C3_API_KEY", "schl\u00fcssel")
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(STORY)
    assert main(["compress", name, "--server", live.url]) == 0
    assert capsys.readouterr().out.startswith("c3-")
    monkeypatch.setenv("C3_API_KEY", "caf\udce9")
    assert main(["compress", name, "--server", live.url]) == 1
    assert "`C3_API_KEY` is not UTF-8 at character 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "sign"),
    [(b"<html>", "its answer is no JSON"), (b"[]", "its answer has no "), (b'{"data": [{}]}', "")],
    ids=["page", "list", "models of others"],
)
def test_another_program_behind_the_address(body, sign, tmp_path, monkeypatch, capsys):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *words):
            pass

    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(STORY)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for words in (["compress", "story.txt"], ["ask", "c3-" + "0" * 32, "--start", "a"]):
            assert main([*words, "--server", url]) == 1
            said = capsys.readouterr().err
            assert f"`--server` {url} is no `c3-hf serve` ({sign}" in said
            assert said.count("\n") == 1
        server.shutdown()
