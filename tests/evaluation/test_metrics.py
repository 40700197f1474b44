"""Each metric: range, source, edge cases, and the golden cases of the Fox tool."""

import json
import random
import time
import unicodedata

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from c3_hf.evaluation import catalogue
from c3_hf.evaluation.catalogue import score, score_restoration
from c3_hf.evaluation.metrics.answers import answer_f1, best_subspan_match, contains_answer
from c3_hf.evaluation.metrics.characters import (
    char_precision,
    character_error_rate,
    exact_match,
    first_error_position,
    length_ratio,
)
from c3_hf.evaluation.metrics.fox import fox, wordnet_available
from c3_hf.evaluation.metrics.tokens import accuracy_by_position, token_accuracy
from c3_hf.evaluation.metrics.words import bleu, rouge_l


TEXT_METRICS = [name for name in catalogue.names("metrics") if catalogue.find("metrics", name).inputs == "text"]
ENGLISH = "The ferry to Porto carries exactly 4803 crates of tea, and the keeper counts them twice."
CHINESE = "开往泉州的渡船载着箱茶叶，守门人把它们数了两遍。"
NFC, NFD = unicodedata.normalize("NFC", "café Åre"), unicodedata.normalize("NFD", "café Åre")


def results(name, prediction, reference):
    """The values of one metric as a dictionary, each with the best value it can have."""
    metric = catalogue.find("metrics", name)
    value = metric.function(prediction, reference)
    named = value if isinstance(value, dict) else {name: value}
    return {key: (number, 0.0 if key == "fox_edit_dist" else metric.best) for key, number in named.items()}


@pytest.mark.parametrize("name", TEXT_METRICS)
@pytest.mark.parametrize("text", ["", " ", "x", "好", "…", "👩‍👩‍👧", "two words", ENGLISH, CHINESE, NFD, "a\nb\r\n"])
def test_identical_texts_have_the_best_value(name, text):
    # Fewer than four words have no 4-gram: the tool's own unsmoothed BLEU is near 0 even for identical texts.
    for key, (value, best) in results(name, text, text).items():
        if key != "fox_bleu":
            assert value == pytest.approx(best, abs=1e-12), key


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_empty_prediction_and_empty_reference_have_a_value_that_is_not_the_best(name):
    for prediction, reference in (("", ENGLISH), ("", CHINESE), (ENGLISH, ""), (CHINESE, "")):
        for key, (value, best) in results(name, prediction, reference).items():
            assert value != best, (key, prediction, reference)


@pytest.mark.parametrize("name", TEXT_METRICS)
@settings(max_examples=60)
@given(prediction=st.text(max_size=40), reference=st.text(max_size=40))
def test_values_stay_in_the_declared_range(name, prediction, reference):
    info = catalogue.find("metrics", name)
    for key, (value, _) in results(name, prediction, reference).items():
        assert info.low <= value, key
        assert info.high is None or value <= info.high, key


@pytest.mark.parametrize("name", catalogue.names("metrics"))
def test_metric_states_its_source_and_its_best_value_lies_in_its_range(name):
    info = catalogue.find("metrics", name)
    assert len(info.source) > 20
    assert info.low <= info.best <= (info.best if info.high is None else info.high)


def test_char_precision_is_one_minus_the_edit_distance_over_the_longer_length():
    assert char_precision("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert char_precision("abcd", "ab") == char_precision("ab", "abcd") == 0.5
    assert char_precision("ab", "ba") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"), [("kitten", "sitting"), ("", "abc"), ("a b c d", "a c"), (CHINESE[3:], CHINESE)]
)
def test_character_error_rate_equals_jiwer(prediction, reference):
    as_given = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])
    expected = jiwer.cer(reference, prediction, reference_transform=as_given, hypothesis_transform=as_given)
    assert character_error_rate(prediction, reference) == pytest.approx(expected)


def test_character_error_rate_exceeds_one_when_the_text_runs_on():
    assert character_error_rate("abcabcabc", "abc") == 2.0
    assert character_error_rate("abc", "") == 3.0


def test_nfc_and_nfd_spellings_differ_for_raw_metrics_and_agree_for_rouge():
    assert exact_match(NFD, NFC) == 0.0
    assert 0.0 < char_precision(NFD, NFC) < 1.0
    assert rouge_l(NFD, NFC) == 1.0


def test_exact_match_sees_every_code_point():
    assert exact_match("a\n", "a") == 0.0
    assert exact_match("A", "a") == 0.0


def test_length_ratio():
    assert length_ratio("ab", "abcd") == 0.5
    assert length_ratio("abcdab", "abcd") == 1.5
    assert length_ratio("", "abcd") == 0.0


def test_first_error_position_is_the_common_prefix_over_the_reference():
    assert first_error_position("abXd", "abcd") == 0.5
    assert first_error_position("abcd and more", "abcd") == 1.0
    assert first_error_position("ab", "abcd") == 0.5
    assert first_error_position("xbcd", "abcd") == 0.0


def test_token_accuracy_compares_position_by_position():
    assert token_accuracy([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert token_accuracy([9, 1, 2, 3], [1, 2, 3]) == 0.0
    assert token_accuracy([], []) == 1.0
    assert token_accuracy([], [1]) == 0.0


def test_forgetting_curve_is_not_spoiled_by_an_early_insertion():
    reference = list(range(100))
    assert accuracy_by_position([777, *reference], reference) == [1.0] * 10
    assert token_accuracy([777, *reference], reference) == 0.0


def test_forgetting_curve_shows_where_the_text_is_lost():
    reference = list(range(100))
    assert accuracy_by_position(reference[:50], reference) == [1.0] * 5 + [0.0] * 5
    assert accuracy_by_position(reference[:5] + reference[10:], reference) == [0.5] + [1.0] * 9
    assert accuracy_by_position([-1] * 100, reference, num_bins=4) == [0.0] * 4


def test_forgetting_curve_of_few_tokens_leaves_slices_empty():
    assert accuracy_by_position([1, 2], [1, 2], num_bins=4) == [1.0, None, 1.0, None]
    assert accuracy_by_position([1], [], num_bins=2) == [None, None]


def test_forgetting_curve_refuses_no_slices():
    with pytest.raises(ValueError, match="`num_bins` is 0, expected at least 1"):
        accuracy_by_position([1], [1], num_bins=0)


@settings(max_examples=60)
@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=60), drop=st.integers(0, 59), bins=st.integers(1, 12))
def test_forgetting_curve_counts_every_reference_token_once(tokens, drop, bins):
    """Weighted by the slices' sizes, a curve is the share of tokens kept, here all but the dropped one."""
    drop %= len(tokens)
    curve = accuracy_by_position(tokens[:drop] + tokens[drop + 1 :], tokens, num_bins=bins)
    sizes = [sum(1 for i in range(len(tokens)) if i * bins // len(tokens) == slot) for slot in range(bins)]
    kept = sum(value * size for value, size in zip(curve, sizes) if value is not None)
    assert kept == pytest.approx(len(tokens) - 1)


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l_equals_the_rouge_score_package_on_ascii(seed):
    generator = random.Random(seed)
    words = ENGLISH.split()
    prediction = " ".join(generator.choices(words, k=30))
    reference = " ".join(generator.choices(words, k=25))
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_and_bleu_see_chinese():
    assert rouge_l(CHINESE[:12], CHINESE) == pytest.approx(2 * 12 / (12 + 22))
    assert 0.3 < bleu(CHINESE[:16], CHINESE) < 1.0
    assert rouge_l("完全不同", CHINESE) == 0.0


def test_bleu_is_sacrebleu_over_100():
    from sacrebleu import sentence_bleu

    prediction = "The ferry to Porto carries 4803 crates of tea"
    assert bleu(prediction, ENGLISH) == pytest.approx(sentence_bleu(prediction, [ENGLISH]).score / 100)


def golden_cases(shared_dir):
    return json.loads((shared_dir / "data/fox/metric_golden.json").read_text(encoding="utf-8"))["cases"]


def test_fox_equals_every_golden_case(shared_dir):
    cases = golden_cases(shared_dir)
    assert len(cases) == 16
    for case in cases:
        values = fox(prediction=case["answer"], reference=case["label"])
        for key, expected in case["expected"].items():
            assert values[f"fox_{key}"] == pytest.approx(expected, rel=1e-12, abs=1e-200), (case["id"], key)


def test_fox_precision_is_the_recall_of_the_reference():
    page = "one two three four five six seven eight"
    values = fox(prediction="one two three four", reference=page)
    assert values["fox_precision"] == 0.5
    assert values["fox_recall"] == 1.0


def test_fox_rewards_shuffled_text_and_char_precision_does_not():
    words = ENGLISH.split()
    shuffled = " ".join(random.Random(0).sample(words, k=len(words)))
    assert fox(shuffled, ENGLISH)["fox_precision"] == 1.0
    assert char_precision(shuffled, ENGLISH) < 0.5


def test_fox_meteor_takes_the_prediction_as_reference():
    if not wordnet_available():
        pytest.skip("nltk's WordNet corpus is not installed")
    from nltk.translate.meteor_score import meteor_score

    prediction, reference = ENGLISH[:40], ENGLISH
    expected = meteor_score([prediction.split()], reference.split())
    assert fox(prediction, reference, meteor=True)["fox_meteor"] == expected
    assert expected != meteor_score([reference.split()], prediction.split())


def test_fox_meteor_without_wordnet_says_so(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(LookupError, match="`meteor` is True but nltk finds no WordNet corpus"):
        fox("a b", "a b", meteor=True)


def test_contains_answer_is_literal():
    assert contains_answer("The code is 776214.", ["776214"]) == 1.0
    assert contains_answer("The code is 776,214.", ["776214"]) == 0.0
    assert contains_answer("", ["776214"]) == 0.0
    assert contains_answer("b", ["a", "b"]) == 1.0


def test_best_subspan_match_normalises_as_squad():
    assert best_subspan_match("It was the Rolling-Stones!", ["rollingstones"]) == 1.0
    assert best_subspan_match("nobody", ["The Who"]) == 0.0
    assert best_subspan_match("nobody", ["The"]) == 0.0


def test_answer_f1_punishes_length():
    assert answer_f1("the 18 episodes", ["18 episodes"]) == 1.0
    assert answer_f1("there were 18 episodes", ["18 episodes"]) == pytest.approx(2 * 2 / (4 + 2))
    assert answer_f1("", ["18"]) == 0.0
    assert answer_f1("十八集", ["十八"]) == pytest.approx(2 * 2 / (3 + 2))


def test_a_page_is_scored_in_milliseconds():
    generator = random.Random(0)
    vocabulary = [f"w{number}" for number in range(500)]
    page = generator.choices(vocabulary, k=1300)
    damaged = [word if generator.random() < 0.9 else "x" for word in page]
    scored = {}
    score("text", " ".join(damaged), " ".join(page))
    for name in catalogue.names("metrics"):
        metric = catalogue.find("metrics", name)
        if metric.inputs != "answer":
            pair = (" ".join(damaged), " ".join(page)) if metric.inputs == "text" else (damaged, page)
            begin = time.process_time()
            metric.function(*pair)
            scored[name] = time.process_time() - begin
    # Plain loops over both texts take ten seconds and more: the bound tells them on any machine.
    assert max(scored.values()) < 2, scored


def test_scoring_a_restoration_gives_every_text_and_token_metric():
    values = score_restoration("a b", "a b c", encode=lambda text: [ord(character) for character in text])
    expected = {name for name in catalogue.names("metrics") if catalogue.find("metrics", name).inputs != "answer"} - {
        "fox"
    }
    assert expected < set(values)
    assert {"fox_precision", "fox_recall", "fox_f_measure", "fox_bleu", "fox_edit_dist"} < set(values)


def test_unknown_metric_lists_those_there_are():
    with pytest.raises(ValueError, match="`metrics` has no 'presicion', expected one of: accuracy_by_position, "):
        catalogue.find("metrics", "presicion")
