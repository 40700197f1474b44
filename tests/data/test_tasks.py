from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from c3_hf import C3Processor, tiny_model_path
from c3_hf.data.tasks import FACT_TOKENS, FIND_PROMPT, TASKS, TEXT_KINDS, Draw, retrieval_questions, saved_prompts


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


def test_scripts_are_words_of_one_script_or_of_many(processor):
    seen = []
    for seed in range(40):
        text = TEXT_KINDS["scripts"](Draw(np.random.default_rng(seed), TEXT, 60, processor.tokenizer))
        assert text.encode().decode() == text
        assert len(text.split()) > 5
        assert len(processor.tokenize_context(text)) >= 60
        seen.append({unicodedata.name(letter, "UNASSIGNED").split()[0] for letter in text if letter != " "})
    # Of one script whose letters all begin alike, such as "CYRILLIC SMALL LETTER A"; of several otherwise.
    assert 5 < sum(len(names) <= 2 for names in seen) < 30
    assert {"CYRILLIC", "ARABIC", "THAI", "HANGUL", "CJK"} < set().union(*seen)


def test_a_few_tokens_stand_at_many_places(processor):
    different, often = [], []
    for seed in range(60):
        text = TEXT_KINDS["few_tokens"](Draw(np.random.default_rng(seed), TEXT, 300, processor.tokenizer))
        assert "\ufffd" not in text
        ids = processor.tokenize_context(text)[:300]
        assert len(ids) == 300
        different.append(len(set(ids)))
        often.append(sum(count for _, count in Counter(ids).most_common(64)) / 300)
    # Of nothing but a few, and of a few between others.
    assert min(different) <= 4
    assert max(different) > 64
    assert min(often) > 0.3


def test_the_words_of_prompts_stand_between_others(processor):
    asked = set(processor.tokenize_context(FIND_PROMPT))
    shares = []
    for seed in range(60):
        text = TEXT_KINDS["prompt_words"](Draw(np.random.default_rng(seed), TEXT, 300, processor.tokenizer))
        assert "\ufffd" not in text
        ids = processor.tokenize_context(text)[:300]
        assert len(ids) == 300
        shares.append(sum(token in asked for token in ids) / 300)
    # Tokens of one of four prompts, drawn evenly from all of theirs.
    assert all(shares)
    assert max(shares) > 0.1


def test_code_has_names_of_its_own_in_each_text(processor):
    in_texts = Counter()
    for seed in range(80):
        text = TEXT_KINDS["code_like"](Draw(np.random.default_rng(seed), "", 300, processor.tokenizer))
        in_texts.update(set(re.findall(r"[^\W\d_]{2,}", text)))
    # The words of statements alone return; a word of the vocabulary stands in few texts.
    often = {word for word, count in in_texts.items() if count > 12}
    assert {"def", "range", "return", "int"} <= often <= {"def", "define", "for", "if", "in", "int", "range", "return"}
    assert len(in_texts) > 500


def test_a_model_says_what_its_tasks_trained_it_to_be_asked():
    assert saved_prompts({"restore": 1.0, "find": 0.0}) == {}
    for task in ("find", "answer", "answer_segments"):
        assert saved_prompts({"restore": 1.0, task: 0.5}) == {"find": FIND_PROMPT}


def test_scripts_have_every_first_byte_of_a_character_there_is():
    tokenizer = C3Processor.from_pretrained(tiny_model_path()).tokenizer
    seen = set()
    for seed in range(200):
        text = TEXT_KINDS["scripts"](Draw(np.random.default_rng(seed), TEXT, 300, tokenizer))
        seen.update(unicodedata.normalize("NFC", text).encode())
    # 0xEE begins private characters, 0xF1 and above what Unicode has not assigned or keeps for machines.
    assert set(range(0xC2, 0xF1)) - {0xEE} <= seen
