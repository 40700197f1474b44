"""What the page answers to each click, without a browser: results, figures, refusals, and nothing left behind."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from c3_hf import C3Pipeline
from c3_hf.files import write_json
from c3_hf.latents.ask import Answer
from c3_hf.latents.decoding import cache_bytes
from c3_hf.web import markup
from c3_hf.web.page import Page
from c3_hf.web.study import Limits, forget, ratio_range, ratios_to_try, recorded_trials
from factories import NUM_LATENTS, make_model, make_processor


TEXT = "The keeper of the light counted the ships twice, as his father had. Eleven, he said.\n\nIt rained."
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> {{value}} ${1+1} `x` \\n <|im_end|><imgpad> &lt; \u202eabc"
)


class Reader(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def last(steps):
    return list(steps)[-1]


@pytest.fixture(scope="module")
def pipe(model, processor):
    return C3Pipeline(model, processor)


@pytest.fixture(scope="module")
def page(pipe):
    return Page(pipe, Limits())


def test_what_comes_back_is_shown_step_by_step(page, pipe):
    steps = list(page.run(TEXT, 8))
    assert [bool(study and study.restored) for study, *_ in steps] == [False, False, True, True]
    study, status, figures, fidelity, differences = steps[-1]
    direct = pipe.compress([TEXT], ratio=8, verify=True)
    assert study.context.token_offsets.tolist() == direct.token_offsets.tolist()
    assert "".join(got for got, _ in study.restored) == pipe.restore(direct).text
    assert study.segments == [TEXT[a:b] for a, b in zip(direct.char_offsets, direct.char_offsets[1:])]
    shown = Reader(figures).text
    latents, tokens = len(direct) * NUM_LATENTS, direct.num_tokens
    slots = latents + 2 * len(direct)
    assert f"{len(TEXT) / latents:.1f}{tokens / latents:.1f} tokens" in shown
    assert f"{slots:,}in place of {tokens:,}" in shown
    cache = cache_bytes(pipe.model.config.text_config, 1, slots, 4)
    assert f"{cache / 1000:.3g} KBin place of" in shown
    assert f"0 of {len(direct)} segments exact" in shown
    assert f"{len(direct)} × {NUM_LATENTS} latents" in status
    assert TEXT in Reader(fidelity).text
    assert "original" in differences
    assert "at least expected" in shown


def test_a_text_that_came_back_is_not_repeated_and_one_that_did_not_is(page):
    text = " ".join(str(number) for number in range(100, 320))
    trained = Page(C3Pipeline.from_pretrained(dtype="float32"), Limits())
    kept, lost = last(trained.run(text, 2)), last(page.run(text, 20))
    assert kept[0].precision == 1
    assert re.search(r"segments came back identical, every character", kept[4])
    assert "310" not in Reader(kept[4]).text
    assert 'class="c3-sure"' in kept[3]
    assert "c3-wrong" not in kept[3].split("</p>", 1)[1]
    assert len(kept[4]) < 400
    assert lost[0].precision < 1
    assert "c3-wrong" in lost[3].split("</p>", 1)[1]
    assert "310" in Reader(lost[4]).text


def test_a_text_is_shown_to_the_letter_and_never_markup(page):
    study, _, figures, fidelity, differences = last(page.run(HOSTILE * 2, 20))
    for part in (figures, fidelity, differences, markup.segments_read(study.segments, [0])):
        assert Reader(part).tags <= {"p", "span", "div", "h3", "h4", "dl", "dt", "dd", "small", "mark", "b", "i", "u"}
        assert not set("{}$`") & set(part)
    assert HOSTILE * 2 in Reader(fidelity).text
    for refused in (page.run("\ud800" + HOSTILE, 1000), page.ask(HOSTILE, 8, None, "", HOSTILE)):
        assert Reader("".join(last(refused)[1:])).tags <= {"p"}


def test_each_kind_of_character_has_its_own_colour(pipe):
    study = last(Page(pipe, Limits()).run(TEXT, 8))[0]
    margins = study.context.margins.clone()
    ends = study.context.token_offsets[:2].tolist()
    margins[: ends[1] + 1] = 9
    margins[5], margins[3] = -1, 0.5
    changed = dataclasses.replace(study, context=dataclasses.replace(study.context, margins=margins, checksums=None))
    strip, shown = markup.fidelity(pipe, changed).split("</p>", 1)[1].split("c3-tall")
    kinds = re.findall(r'<i class="c3-(\w+)" style="flex:(\d+)">', strip)
    assert kinds[:4] == [("sure", "3"), ("expected", "1"), ("sure", "1"), ("wrong", "1")]
    assert sum(int(size) for _, size in kinds) == len(TEXT)
    spans = re.findall(r'<span class="c3-(\w+)">(.*?)</span>', shown)[:5]
    assert spans[:4] == [("sure", "The"), ("expected", " "), ("sure", "k"), ("wrong", "e")]
    assert spans[4][0] == "expected"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", r"There is no text yet\. Write or paste one"),
        ("a" * 101, r"The text has 101 characters; this page takes up to 100\. Give a part of it, or use"),
    ],
)
def test_no_text_and_too_much_are_refused(pipe, text, message):
    page = Page(pipe, Limits(characters=100))
    with pytest.raises(ValueError, match=message):
        page.limits.check(text)
    for answer in (last(page.run(text, 20))[1], last(page.ask(text, 20, None, "", ""))[1], last(page.forget(text))[0]):
        assert 'role="alert"' in answer
        assert re.search(message, Reader(answer).text)


def test_what_the_time_allows_is_shown_and_said(pipe):
    text = "Twelve ships. " * 600
    study, status, *_ = last(Page(pipe, Limits(seconds=1e-9)).run(text, 95))
    assert 0 < len(study.text) < len(text)
    assert text.startswith(study.text)
    assert 0 < len(study.restored) < len(study.context)
    assert re.search(rf"of {len(text):,} characters were compressed, \d+ of \d+ segments restored", status)


def test_a_file_goes_out_and_comes_in_and_is_gone(page, tmp_path):
    study = last(page.run(TEXT, 8))[0]
    data, status = page.file(study)
    assert "text.c3" in status
    file = tmp_path / "up.c3"
    file.write_bytes(base64.b64decode(data))
    text, opened, _, figures, _, differences = last(page.open(str(file), "as it was"))
    assert text == ""
    assert not file.exists()
    assert [got for got, _ in opened.restored] == [got for got, _ in study.restored]
    assert f"exact0 of {len(study.context)}" in Reader(figures).text
    assert "not exact" in differences
    file = tmp_path / "up.txt"
    file.write_text(TEXT, encoding="utf-8")
    text, opened, status, *_ = last(page.open(str(file), ""))
    assert (text, opened) == (TEXT, None)
    assert f"{len(TEXT)} characters read" in status
    assert list(tmp_path.iterdir()) == []
    assert page.file(None)[0] == ""
    assert list(page.open(None, "")) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "The file is neither UTF-8 text nor a .c3 file"),
        ("a.c3", b"no context", "the file"),
        ("a.txt", b"x" * 5001, "The file is larger than 5,000 bytes, which this page takes"),
        ("a.txt", b" ", "There is no text yet"),
    ],
)
def test_a_file_that_is_of_no_use_is_refused_and_gone(pipe, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    text, study, status, *_ = last(Page(pipe, Limits(file_bytes=5000)).open(str(tmp_path / name), "as it was"))
    assert (text, study) == ("as it was", None)
    assert message in Reader(status).text
    assert str(tmp_path) not in status
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_model_is_refused(page, processor, tmp_path):
    other = C3Pipeline(make_model(7), processor)
    other.compress([TEXT], output=tmp_path / "other.c3")
    status = last(page.open(str(tmp_path / "other.c3"), ""))[2]
    assert "its latents mean nothing to another model" in Reader(status).text


def test_asking_takes_what_the_checkpoint_declares(model):
    for prompts, question, start, refusal in (
        ({}, "Who?", "The", "was not trained to answer questions; the prompts its checkpoint declares"),
        ({"find": "Find: "}, "Who?", "", "The words is missing: this model was not trained to answer"),
        ({"ask": ""}, "", "", "The question is missing"),
        ({"find": "Find: "}, "", "No such words", "no segment looked at holds"),
    ):
        page = Page(C3Pipeline(model, make_processor(prompts=prompts)), Limits())
        _, answer, read = last(page.ask(TEXT, 8, None, question, start))
        assert refusal in Reader(answer).text
        assert read == ""


def test_an_answer_comes_piece_by_piece_with_the_segments_it_was_read_in(model):
    pipe = C3Pipeline(model, make_processor(prompts={"ask": ""}))
    page = Page(pipe, Limits())
    steps = list(page.ask(TEXT, 8, None, "Who?", ""))
    assert len(steps) > 3
    study, answer, read = steps[-1]
    direct = pipe.ask(study.context, "Who?", max_new_tokens=200)
    assert direct.text in Reader(answer).text
    assert Reader(read).text.count("read: segment") == len(study.context)
    marked = markup.segments_read(["One. " * 200, "A <b> & c. Two."], [1], "<b> & c")
    assert "<u>&lt;b&gt; &amp; c</u>" in marked
    assert "… 684 characters …" in marked
    assert "One. <span" in marked
    # The same text at the same ratio is not compressed again; another ratio is another study.
    assert last(page.ask(TEXT, 8, study, "Who?", ""))[0] is study
    assert last(page.ask(TEXT, 16, study, "Who?", ""))[0] is not study


def test_what_was_found_is_marked_in_its_segment_and_what_leaves_the_text_struck_out(model, monkeypatch):
    pipe = C3Pipeline(model, make_processor(prompts={"find": "Find: "}))
    found = Answer("Eleven, he said.", (2,), "it holds the words of `start`", " Twelve <b>!")
    monkeypatch.setattr(pipe, "ask", lambda *contexts, **options: found)
    study, answer, read = last(Page(pipe, Limits()).ask(TEXT, 8, None, "", "Eleven"))
    assert "Eleven, he said.<del> Twelve &lt;b&gt;!</del>" in answer
    assert f"Read: segment 2 of segments 0 to {len(study.context) - 1}, because it holds your words." in answer
    assert "`" not in answer
    assert "Eleven, he said." in study.segments[2]
    assert read.count("<mark") == 1
    assert "<u>Eleven, he said.</u>" in read


@pytest.mark.parametrize("stride", [None, 12])
def test_the_range_of_ratios_is_the_checkpoints(stride):
    pipe = C3Pipeline(make_model(4, latent_stride=stride), make_processor())
    least, most, usual = ratio_range(pipe)
    for ratio in (least, usual, most):
        assert len(pipe.compress([TEXT], ratio=ratio))
    for ratio in (least - 1, most + 1):
        with pytest.raises(ValueError, match=r"`ratio`|`segment_length`"):
            pipe.compress([TEXT], ratio=ratio)
    assert usual == (20 if stride is None else stride)
    assert (", its most." in markup.ratios(usual, most)) == (stride is not None)
    assert ratios_to_try(pipe)[-1] == most


def test_forgetting_is_tried_on_one_block_at_each_ratio(pipe, page):
    found = list(forget(pipe, TEXT, 1000))
    sizes = [trial.ratio for trial in found]
    assert sizes == sorted(set(sizes))
    assert sizes[:3] == [4, 8, 16]
    assert sizes[-1] == len(TEXT) / NUM_LATENTS
    assert all(0 <= trial.precision <= 1 and len(trial.by_position) == 10 for trial in found)
    assert len(list(forget(pipe, TEXT, 0))) == 1
    status, table, beside = last(page.forget(TEXT))
    assert table.count("<tr>") == len(found) + 2
    assert "No recorded curve" in beside
    assert "Each row is the beginning of the text" in status


def test_a_recorded_curve_counts_for_its_own_weights(pipe, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    mine = C3Pipeline.from_pretrained(tmp_path, dtype="float32")
    row = {"kind": "prose", "ratio": 4, "num_items": 3, "char_precision": 0.5, "accuracy_by_position": [0.5] * 10}
    write_json(tmp_path / "curve.json", {"weights": mine.restorer.fingerprints.model, "restoring": [row]})
    (trial,) = recorded_trials(mine)
    assert (trial.ratio, trial.precision, trial.what) == (4, 0.5, "prose, mean of 3 texts")
    assert "Recorded: prose, mean of 3 texts" in last(Page(mine, Limits()).forget(TEXT))[2]
    rows = [row, {**row, "ratio": 8, "num_items": 2}]
    write_json(tmp_path / "curve.json", {"weights": mine.restorer.fingerprints.model, "restoring": rows})
    assert {trial.what for trial in recorded_trials(mine)} == {"prose, mean of 2 to 3 texts"}
    write_json(tmp_path / "curve.json", {"weights": "0" * 64, "restoring": [row]})
    assert recorded_trials(mine) == []
    assert recorded_trials(pipe) == []


def test_the_bundled_model_has_its_recorded_curve():
    assert recorded_trials(C3Pipeline.from_pretrained())


def test_samples_are_of_several_kinds_in_both_languages(repository):
    lines = (repository / "src" / "c3_hf" / "web" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len({sample["kind"] for sample in samples}) >= 6
    assert {"en", "zh"} <= {sample["lang"] for sample in samples}
    assert len({sample["name"] for sample in samples}) == len(samples)
    assert all(sample["credit"] and sample["source"] for sample in samples)
    # What the box for the words offers stands in the sample that it names.
    name, words = re.fullmatch(r"In the sample “(.*)”, for example: (.*)", markup.BEGINNING).groups()
    assert words in next(sample["text"] for sample in samples if sample["name"] == name)
