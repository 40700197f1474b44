"""`c3-hf demo` on a tiny random model: what it shows, marks and refuses."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from c3_hf import C3Pipeline
from c3_hf.cli import main
from c3_hf.cli.demo import RED, RESET, SAMPLE, YELLOW, mark_differences
from factories import make_model, make_processor


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_processor().save_pretrained(path)
    return str(path)


def test_it_shows_the_original_what_came_back_and_the_numbers(model_path, tmp_path, capsys):
    text = SAMPLE.read_text("utf-8")[:317]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert main(["demo", str(tmp_path / "text.txt"), "--model", model_path, "--ratio", "16"]) == 0
    output = capsys.readouterr().out
    assert text in output
    (segments,) = re.search(r"^Restored from (\d+) × 4 latents: not the same$", output, flags=re.MULTILINE).groups()
    tokens = len(text.encode())  # the tiny tokenizer has one token a byte
    numbers = re.search(
        r"^([\d.]+) tokens and ([\d.]+) characters a latent, character precision ([\d.]+) %, [\d.]+ s \(\d+ tokens",
        output,
        flags=re.MULTILINE,
    )
    assert float(numbers[1]) == pytest.approx(tokens / (4 * int(segments)), abs=0.05)
    assert float(numbers[2]) == pytest.approx(len(text) / (4 * int(segments)), abs=0.05)
    assert 0 <= float(numbers[3]) < 50  # random weights restore nothing
    assert re.match(r"model\d: [\d,]+ parameters, 4 latents for up to 80 tokens, prompts restore\n", output)


def test_the_bundled_model_shows_a_text_that_is_the_same_once(tmp_path, capsys):
    text = SAMPLE.read_text("utf-8")[:60]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert main(["demo", str(tmp_path / "text.txt")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("c3-tiny: ")
    assert output.count(text) == 1
    assert re.search(rf"latents: identical\n\({len(text)} characters, \d+ tokens, sha256 [0-9a-f]{{12}}\)", output)
    assert "character precision 100.00 %" in output


@pytest.mark.slow
def test_the_sample_at_its_own_ratio_and_at_one_too_large(capsys):
    pipe = C3Pipeline.from_pretrained()
    text = SAMPLE.read_text("utf-8")
    num_latents, room = pipe.model.config.num_latents, pipe.segment_room
    for ratio, length in ((None, None), (1000, room)):
        assert main(["demo", *([] if ratio is None else ["--ratio", str(ratio)])]) == 0
        output = capsys.readouterr().out
        context = pipe.compress([text], segment_length=length)
        same = pipe.restore(context).text == text
        result = "identical" if same else "not the same"
        assert f"Restored from {len(context)} × {num_latents} latents: {result}\n" in output
        assert output.count(text) == (1 if same else output.count(f"Original: {len(text):,} characters"))
        if ratio:
            said = f"a segment has 16 to {room:,} tokens, so that this is {room / num_latents:.1f} tokens a latent"
            assert f"--ratio 1000: {said}" in output


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_it_reads_a_file_or_standard_input(source, model_path, tmp_path, monkeypatch, capsys):
    text = "Ein Käse — 奶酪 — <|im_end|>"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["demo", str(file) if source == "file" else "-", "--model", model_path, "--ratio", "20"]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b" \n", [], r"`FILE` '.*text\.txt' holds no text; give one that does"),
        (b"\xff\xfe", [], r"`FILE` '.*text\.txt' is not UTF-8 text .* convert it first"),
        (b"text", ["--ratio", "0"], r"`--ratio` must be positive, 3 for three tokens per latent, got 0\.0"),
        (b"text", ["--ratio", "nan"], r"`--ratio` must be positive, .* got nan"),
    ],
)
def test_what_it_cannot_use_is_refused_by_name(content, arguments, message, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert main(["demo", str(file), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_differences_are_marked_in_words_or_colours():
    assert mark_differences("a cat sat", "a hat sat!", colour=False) == "a [-c-]{+h+}at sat{+!+}"
    assert mark_differences("abc", "ac", colour=True) == f"a{YELLOW}b{RESET}c"
    assert mark_differences("ac", "abc", colour=True) == f"a{RED}b{RESET}c"


@given(original=st.text(alphabet="abc \n中", max_size=30), restored=st.text(alphabet="abc \n中", max_size=30))
def test_marks_hold_both_texts(original, restored):
    marked = mark_differences(original, restored, colour=False)
    assert re.sub(r"\{\+(.*?)\+\}", "", re.sub(r"\[-(.*?)-\]", r"\1", marked, flags=re.S), flags=re.S) == original
    assert re.sub(r"\[-(.*?)-\]", "", re.sub(r"\{\+(.*?)\+\}", r"\1", marked, flags=re.S), flags=re.S) == restored
    assert mark_differences(original, original, colour=True) == original
