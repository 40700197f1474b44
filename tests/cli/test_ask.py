"""`c3-hf ask` does what the checkpoint says its model was trained for, and refuses the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import c3_hf
from c3_hf.cli import main
from c3_hf.cli.ask import parse_segments, split_words
from c3_hf.latents import CompressedContext
from c3_hf.latents.ask import best_segments, choose_prompt, words_of
from c3_hf.modeling.processing_c3 import C3Processor
from factories import make_processor


FACTS = (
    "The harbour was empty. The access code of the depot at Bergen is 482913. Nobody knew why. The access code of the "
    "depot at Lyon is 107745. It rained. The keeper of the lighthouse at Rostock is Edith Parker. So the day went by "
    "us."
)


@pytest.fixture(scope="module")
def answering(tmp_path_factory, model):
    """A checkpoint that says it answers questions, put as "Q: "."""
    path = tmp_path_factory.mktemp("answering")
    model.save_pretrained(path)
    processor = make_processor()
    processor.prompts["ask"] = "Q: "
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture
def ask(here, answering):
    assert main(["compress", "a.txt", "-o", "a.c3", "--latent-dtype", "float32", "--model", answering]) == 0
    return lambda *words: main(["ask", *words, "--model", answering, "--max-new-tokens", "6"])


def expected(model, processor, parts, question, start=""):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    settings = {}
    if start:
        messages.append({"role": "assistant", "content": start})
        settings = {"add_generation_prompt": False, "continue_final_message": True}
    inputs = processor.apply_chat_template(messages, **settings)
    new_ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_ids[0], skip_special_tokens=True)


def test_a_saved_prompt_stands_in_front_of_the_question(ask, here, model, processor, capsys):
    capsys.readouterr()
    assert ask("a.c3", "a.c3", "How many?") == 0
    parts = CompressedContext.load(here / "a.c3").content_parts(model) * 2
    assert capsys.readouterr().out == expected(model, processor, parts, "Q: How many?") + "\n"
    assert ask("a.c3", "How many?", "--start", "There are") == 0
    shown = capsys.readouterr().out
    assert shown == "There are" + expected(model, processor, parts[:1], "Q: How many?", "There are") + "\n"


def test_a_long_context_is_cut_to_the_segments_that_match(ask, here, answering, model, processor, capsys):
    parts = [f"Part {number} says nothing much.\n\n" for number in range(200)]
    parts[70] = "The violin was played very badly.\n\n"
    (here / "long.txt").write_text("".join(parts))
    words = ["--segment-length", "40", "--latent-dtype", "float32", "--model", answering]
    assert main(["compress", "long.txt", "-o", "long.c3", *words]) == 0
    capsys.readouterr()
    assert ask("long.c3", "Who played the violin?", "--text", "long.txt") == 0
    used = re.search(r"used: segment ([\d, ]+) of 0 to (\d+) \(the best match of words", capsys.readouterr().err)
    numbers = [int(number) for number in used[1].split(", ")]
    context = CompressedContext.load(here / "long.c3")
    starts = [int(offset) for offset in context.char_offsets]
    place = "".join(parts).index("violin")
    wanted = next(index for index in range(len(context)) if starts[index] <= place < starts[index + 1])
    assert wanted in numbers
    assert numbers == sorted(numbers)
    assert int(used[2]) == len(context) - 1
    # By number, nothing has to be read for it.
    assert ask("long.c3", "Who?", "--segments", f"{wanted},0-1") == 0
    shown = capsys.readouterr()
    chosen = [part for index in (0, 1, wanted) for part in context[index].content_parts(model)]
    assert shown.out == expected(model, processor, chosen, "Q: Who?") + "\n"
    assert ask("long.c3", "Who?", "--segments", "0-90") == 1
    assert re.search(
        r"`--segments`: 91 segments and the question take [\d,]+ positions, the model has 512: room for "
        r"\d+ segments",
        capsys.readouterr().err,
    )


def test_a_question_that_leaves_no_room(ask, capsys):
    assert ask("a.c3", "Who? " * 200) == 1
    assert "`QUESTION`: 1 segments and the question take" in capsys.readouterr().err


def test_what_the_checkpoint_does_not_declare_is_refused(run, here, capsys):
    assert run("compress", "a.txt") == 0
    capsys.readouterr()
    for words in (["Who?"], ["Who?", "--start", "It was"], ["--start", "It was"]):
        assert run("ask", "a.txt.c3", *words) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert (
            "this model was not trained to answer questions; the prompts its checkpoint declares are ['restore']"
            in (shown.err)
        )


@pytest.fixture
def find(here, tmp_path_factory, model, monkeypatch):
    """Ask a checkpoint that goes on from words of the text; what it replies is given."""
    path = str(tmp_path_factory.mktemp("finding"))
    model.save_pretrained(path)
    make_processor(prompts={"find": "Find: "}).save_pretrained(path)
    (here / "facts.txt").write_text(FACTS)
    words = ["facts.txt", "-o", "facts.c3", "--segment-length", "96", "--model", path]
    assert main(["compress", *words]) == 0

    def ask(*words, reply):
        monkeypatch.setattr(C3Processor, "decode", lambda *_, **__: reply)
        return main(["ask", "facts.c3", *words, "--text", "facts.txt", "--model", path])

    return ask


def test_what_is_found_is_shown_with_where_it_stood(find, capsys):
    capsys.readouterr()
    assert find("Who keeps the light?", reply="") == 1
    shown = capsys.readouterr()
    assert "`--start` is missing: this model was not trained to answer questions. It goes on from words" in shown.err
    assert shown.out == ""
    assert find("--start", "The access code of the depot at Bergen is", reply=" 482913.") == 0
    shown = capsys.readouterr()
    assert shown.out == "The access code of the depot at Bergen is 482913.\n"
    assert "used: segment 0 of 0 to 2 (it holds the words of `--start`; --segments chooses others)" in shown.err
    # The question is nothing this model could use.
    assert find("Who?", "--start", "The keeper of the lighthouse at", reply=" Rostock") == 0
    shown = capsys.readouterr()
    assert shown.out == "The keeper of the lighthouse at Rostock\n"
    assert "used: segment 2 of 0 to 2" in shown.err


@pytest.mark.parametrize("start", ["The mayor of Paris is", "the Access Code"])
def test_what_the_text_does_not_hold_is_not_made_up(find, start, capsys):
    capsys.readouterr()
    assert find("--start", start, reply=" 482913.") == 1
    shown = capsys.readouterr()
    assert f"`--start`: no segment looked at holds {start!r}" in shown.err
    assert shown.out == ""


def test_a_reply_ends_where_it_leaves_the_text(find, capsys):
    capsys.readouterr()
    assert find("--start", "The access code of the depot at Bergen is", reply=" 4829xx") == 0
    shown = capsys.readouterr()
    assert shown.out == "The access code of the depot at Bergen is 4829\n"
    assert "cut where the reply leaves the text: 'xx'" in shown.err
    assert find("--start", "The access code of the depot at Bergen is", reply="rubbish") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "`--start`: the model does not find how the text goes on" in shown.err


def test_the_bundled_model_says_nothing_that_is_not_in_the_text(here, capsys):
    (here / "facts.txt").write_text(FACTS)
    assert main(["compress", "facts.txt", "-o", "facts.c3"]) == 0
    prompts = C3Processor.from_pretrained(c3_hf.tiny_model_path()).prompts
    for start in ("The access code of the depot at Lyon is", "The harbour was"):
        capsys.readouterr()
        status = main(["ask", "facts.c3", "--start", start, "--text", "facts.txt"])
        shown = capsys.readouterr()
        if status == 0:
            assert "find" in prompts
            assert shown.out.startswith(start)
            assert shown.out.removesuffix("\n") in FACTS
        else:
            wanted = "does not find how the text goes on" if "find" in prompts else "was not trained to answer"
            assert wanted in shown.err
            assert shown.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.c3"], r"`QUESTION` is missing"),
        (["absent.c3", "Who?"], r"there is no file absent.c3"),
        (["Who?"], r"there is no file Who\?\. Give a compressed context in front of a question"),
        (["a.c3", "Who?", "--segments", "7"], r"`--segments` must name some of 0 to 0, got \[7\]"),
        (["a.c3", "Who?", "--segments", "1-"], r"`--segments` must be numbers and ranges such as 0,4-7, got '1-'"),
        (["a.c3", "a.c3", "Who?", "--text", "a.txt"], r"`--text` goes with a single context, got 2"),
        (["empty.c3", "Who?"], r"`FILE.c3` holds no text \(.*empty.c3\)"),
    ],
)
def test_what_cannot_be_asked(ask, here, answering, capsys, words, message):
    (here / "empty.txt").touch()
    assert main(["compress", "empty.txt", "-o", "empty.c3", "--model", answering]) == 0
    capsys.readouterr()
    assert ask(*words) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_which_prompt():
    everything = {"restore": "", "find": "", "ask": ""}
    assert choose_prompt(everything, "Who?", "") == "ask"
    assert choose_prompt(everything, "Who?", "It was") == "ask"
    assert choose_prompt(everything, "", "It was") == "find"


def test_the_last_word_is_the_question_unless_it_names_a_file(here):
    assert split_words(["a.c3", "Who?"]) == (["a.c3"], "Who?")
    assert split_words(["a.c3", "b.c3"]) == (["a.c3", "b.c3"], "")
    assert split_words(["-"]) == (["-"], "")
    assert split_words(["x", "a.txt"]) == (["x", "a.txt"], "")


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "1,,2", "1-2-3", "1.5", "0-10000000000000"])
def test_lists_of_segments_that_are_none(text):
    with pytest.raises(ValueError, match=r"`--segments` must be numbers and ranges"):
        parse_segments(text)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_lists_of_segments(numbers):
    assert parse_segments(", ".join(map(str, numbers))) == sorted(numbers)
    assert parse_segments(f"{min(numbers)}-{max(numbers)}") == list(range(min(numbers), max(numbers) + 1))


def test_words_of_several_scripts():
    assert words_of("Who's 2nd? 数到第 한글 naïve_x") == [
        "who",
        "s",
        "2nd",
        "数",
        "到",
        "第",
        "한",
        "글",
        "naïve",
        "x",
    ]


def test_segments_that_share_the_rarest_words_are_chosen():
    texts = ["the ship and the sea", "the violin", "the ship and the violin, badly", "nothing", "the sea"]
    assert best_segments("Who played the violin badly?", texts, 1) == [2]
    assert best_segments("Who played the violin badly?", texts, 2) == [1, 2]
    # What shares nothing is not taken to fill up; unless nothing shares anything.
    assert best_segments("VIOLIN", texts, 4) == [1, 2]
    assert best_segments("xyz", texts, 2) == [0, 1]
    assert best_segments("第十一艘", ["十一月", "数到第十一艘", "艘"], 1) == [1]


def test_prompts_are_saved_with_the_processor(tmp_path):
    processor = make_processor()
    assert processor.prompts == {"restore": "Repeat the text: "}
    processor.prompts["ask"] = ""
    processor.save_pretrained(tmp_path)
    assert C3Processor.from_pretrained(tmp_path).prompts == {"restore": "Repeat the text: ", "ask": ""}
    bundled = C3Processor.from_pretrained(c3_hf.tiny_model_path())
    said = json.loads(Path(c3_hf.tiny_model_path(), "processor_config.json").read_text(encoding="utf-8"))["prompts"]
    assert bundled.prompts == said
    assert bundled.restore_messages("x")[0]["content"][1]["text"] == said["restore"]


@pytest.mark.parametrize("prompts", [["restore"], {"restore": None}, {1: "x"}])
def test_prompts_of_another_kind_are_refused(prompts):
    with pytest.raises(ValueError, match=r"`prompts` must give a string for each name, such as 'restore'"):
        C3Processor(make_processor().tokenizer, num_latents=4, prompts=prompts)
