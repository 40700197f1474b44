from __future__ import annotations

import re

import numpy as np
import pytest

from c3_hf import C3Processor, tiny_model_path
from c3_hf.data.tasks import FACT_TOKENS, FIND_PROMPT, TASKS, retrieval_questions, saved_prompts


FACT = re.compile(r"The (?:access code|number of crates|keeper) o[nf] the \w+ (?:at|to) \w+ is [\w ]+\. ")
TEXT = "The first sentence is here. The second one follows it! Is there a third? Yes, and a last one."


def parts(example):
    user, assistant = example.messages
    return user["content"][0]["text"], user["content"][1]["text"], assistant["content"][0]["text"]


def test_restore_wants_the_context_back():
    context, prompt, reply = parts(TASKS["restore"](np.random.default_rng(0), TEXT))
    assert context == reply == TEXT
    assert prompt == "Repeat the text: "


@pytest.mark.parametrize("seed", range(5))
def test_continue_splits_the_text(seed):
    context, _, reply = parts(TASKS["continue"](np.random.default_rng(seed), TEXT))
    assert context + reply == TEXT
    assert context
    assert reply


@pytest.mark.parametrize("text", [TEXT * 3, "他从北京来，到上海去。明天再说吧。", "word"])
def test_pieces_are_all_of_the_text_in_another_order(text):
    orders = set()
    for seed in range(20):
        context, prompt, reply = parts(TASKS["pieces"](np.random.default_rng(seed), text))
        assert context == text
        assert prompt == "Find the sentence: "
        assert sorted(reply) == sorted(text)
        orders.add(reply)
    assert len(orders) > 8 or text == "word"


def test_pieces_begin_with_the_blank_of_their_first_word():
    _, _, reply = parts(TASKS["pieces"](np.random.default_rng(1), TEXT))
    # No word is torn, and none is glued to another but the first of the text, which has no blank in front of it.
    assert sorted(re.sub(r"The(?= first)", " The", reply).split()) == sorted(TEXT.split())


@pytest.mark.parametrize(
    ("task", "text", "is_open"),
    [
        ("restore", TEXT, False),
        ("continue", TEXT, False),
        ("answer", TEXT, False),
        ("answer_segments", TEXT, False),
        ("find", TEXT, False),
        ("find", "a text without any end of a sentence", True),
        ("pieces", TEXT, True),
    ],
)
def test_what_only_its_length_ends_stays_open(task, text, is_open):
    assert TASKS[task](np.random.default_rng(0), text).is_open is is_open


@pytest.mark.parametrize("seed", range(12))
def test_answer_hides_facts_and_asks_for_one(seed):
    context, prompt, reply = parts(TASKS["answer"](np.random.default_rng(seed), TEXT))
    assert prompt == "Find the sentence: "
    question, value = reply.split(" is ")
    assert value.endswith(".")
    assert context.count(reply) == context.count(question) == 1
    assert reply not in TEXT
    facts = FACT.findall(context)
    assert 1 <= len(facts) <= 3
    for fact in facts:
        context = context.replace(fact, "")
    assert context == TEXT
    cities = [fact.split(" is ")[0].split()[-1] for fact in facts]
    assert len(set(cities)) == len(cities)


@pytest.mark.parametrize("seed", range(12))
def test_a_question_over_segments_has_its_fact_in_one_of_them(seed):
    example = TASKS["answer_segments"](np.random.default_rng(seed), TEXT)
    *contexts, prompt = example.messages[0]["content"]
    assert {part["type"] for part in contexts} == {"context"}
    assert 2 <= len(contexts) <= 4
    assert all(part["text"] for part in contexts)
    assert prompt == {"type": "text", "text": "Find the sentence: "}
    reply = example.messages[1]["content"][0]["text"]
    assert [reply in part["text"] for part in contexts].count(True) == 1
    assert reply not in TEXT
    whole = "".join(part["text"] for part in contexts)
    assert FACT.sub("", whole) == TEXT
    # Facts and places are those of the question over one context.
    assert whole == parts(TASKS["answer"](np.random.default_rng(seed), TEXT))[0]


def test_a_text_of_one_word_is_cut_into_the_segments_it_has():
    example = TASKS["answer_segments"](np.random.default_rng(3), "word")
    contexts = [part["text"] for part in example.messages[0]["content"][:-1]]
    assert contexts[-1].endswith("word")
    assert len(contexts) >= 2


def test_facts_fit_into_the_room_that_is_kept_for_them():
    processor = C3Processor.from_pretrained(tiny_model_path())
    for seed in range(200):
        facts = "".join(
            f"{question} {value}. " for question, value in retrieval_questions(np.random.default_rng(seed))
        )
        assert len(processor.tokenize_context(facts)) <= FACT_TOKENS


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (TEXT, {"The first sentence is here.", "The second one follows it!", "Is there a third?"}),
        ("He paid 3.50 for it, and “went.” He came to the town", {"He paid 3.50 for it, and “went.”"}),
        (
            "话说天下大势，分久必合，合久必分，话说天下大势分久必合。周末七国分争，并入于秦",
            {"话说天下大势，分久必合，合久必分，话说天下大势分久必合。"},
        ),
        ("No end to it", {"No end to it"}),
        ("", {""}),
    ],
)
def test_find_wants_a_whole_sentence(text, sentences):
    found = set()
    for seed in range(40):
        context, prompt, reply = parts(TASKS["find"](np.random.default_rng(seed), text))
        assert (context, prompt) == (text, "Find the sentence: ")
        found.add(reply)
    assert found - {"Yes, and a last one."} == sentences - {"Is there a third?"}


def test_a_model_says_what_its_tasks_trained_it_to_be_asked():
    assert saved_prompts({"restore": 1.0, "find": 0.0}) == {}
    for task in ("find", "answer", "answer_segments"):
        assert saved_prompts({"restore": 1.0, task: 0.5}) == {"find": FIND_PROMPT}
