from __future__ import annotations

import numpy as np
import pytest

from c3_hf.data.synthetic import TEXT_KINDS, Draw
from c3_hf.data.tasks import TASKS


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


@pytest.mark.parametrize("seed", range(12))
def test_answer_hides_a_fact_that_holds_the_answer(seed):
    context, question, reply = parts(TASKS["answer"](np.random.default_rng(seed), TEXT))
    assert question.endswith("?")
    assert reply in context
    assert reply not in TEXT
    fact_length = len(context) - len(TEXT) - 1
    assert any(context[:at] + context[at + fact_length + 1 :] == TEXT for at in range(len(TEXT) + 1))


@pytest.mark.parametrize("kind", sorted(TEXT_KINDS))
@pytest.mark.parametrize("passage", [TEXT, "话说天下大势，分久必合，合久必分。", ""])
def test_kinds_of_text(kind, passage, processor):
    def make(seed):
        return TEXT_KINDS[kind](Draw(np.random.default_rng(seed), passage, 16, processor.tokenizer))

    assert make(0) == make(0)
    if passage or kind not in ("plain", "shuffled_words", "shuffled_tokens"):
        assert make(0)
    if kind not in ("plain", "shuffled_words", "shuffled_tokens"):
        assert make(0) != make(1)


@pytest.mark.parametrize("passage", [TEXT, "话说天下大势，分久必合，合久必分。"])
def test_shuffling_keeps_what_it_shuffles(passage, processor):
    shuffled = TEXT_KINDS["shuffled_words"](Draw(np.random.default_rng(0), passage, 99, processor.tokenizer))
    assert sorted(shuffled) == sorted(passage)
    assert shuffled != passage
