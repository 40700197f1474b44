from __future__ import annotations

import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from c3_hf import C3Processor, tiny_model_path
from c3_hf.data.tasks import FIND_PROMPT
from c3_hf.data.text_kinds import TEXT_KINDS, Draw


TEXT = "The first sentence is here. The second one follows it! Is there a third? Yes, and a last one."


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


def test_scripts_have_every_first_byte_of_a_character_there_is():
    tokenizer = C3Processor.from_pretrained(tiny_model_path()).tokenizer
    seen = set()
    for seed in range(200):
        text = TEXT_KINDS["scripts"](Draw(np.random.default_rng(seed), TEXT, 300, tokenizer))
        seen.update(unicodedata.normalize("NFC", text).encode())
    # 0xEE begins private characters, 0xF1 and above what Unicode has not assigned or keeps for machines.
    assert set(range(0xC2, 0xF1)) - {0xEE} <= seen
