"""Every system restores and answers through the same small interface."""

import sys

import pytest
import torch

from c3_hf.evaluation import catalogue
from c3_hf.evaluation.system import SystemSettings, SystemUnavailable, load_meter
from c3_hf.evaluation.systems import c3, deepseek_ocr, full_text, llmlingua2, mean_pool, truncation
from c3_hf.pipeline import C3Pipeline


TEXTS = ["The lamp goes", "好的", "Two boats."]
OWN_DECODER = ["c3", "full_text", "mean_pool", "truncation"]


@pytest.fixture(scope="module")
def settings(tiny_checkpoint):
    return SystemSettings(
        model=str(tiny_checkpoint), meter=load_meter(tiny_checkpoint, 32), batch_size=2, answer_tokens=4
    )


@pytest.mark.parametrize("name", OWN_DECODER)
def test_batch_gives_what_single_texts_give(name, settings):
    system = catalogue.find("systems", name)(settings)
    assert system.restore(TEXTS) == [system.restore([text])[0] for text in TEXTS]


@pytest.mark.parametrize("name", OWN_DECODER)
def test_answer_depends_on_the_contexts_alone(name, settings):
    system = catalogue.find("systems", name)(settings)
    answer = system.answer(["The code is 11. " * 5, "Nothing here."], "Which code?")
    assert answer == system.answer(["The code is 11. " * 5, "Nothing here."], "Which code?")
    assert settings.meter.count(answer) <= 4 * 3


def test_slots_tell_what_a_text_costs(settings):
    text = "x" * 30
    assert c3.load(settings).slots(text) == 4
    assert truncation.load(settings).slots(text) == 4
    assert mean_pool.load(settings).slots(text) == 4
    assert full_text.load(settings).slots(text) == 30


def test_c3_restores_through_the_shared_restoring(settings):
    system = c3.load(settings)
    restored = system.restore(TEXTS)
    assert restored == C3Pipeline(system.model, system.processor).round_trip(TEXTS)
    assert len(set(restored)) > 1


def test_c3_answer_sees_every_context(settings):
    system = c3.load(settings)
    other = "The boats."
    answers = {system.answer([other, text], "?") for text in ("a" * 30, "Z9 " * 10, "雨" * 9, "\n\t" * 12, "=+" * 15)}
    assert len(answers) > 1


@pytest.mark.parametrize("name", ["c3", "full_text"])
def test_what_the_model_has_no_positions_for_is_refused(name, settings):
    system = catalogue.find("systems", name)(settings)
    alone, refused = system.restore(["ab", "x" * 600])
    assert refused is None
    assert [alone] == system.restore(["ab"])
    assert system.answer(["x" * 4000], "?") is None


def test_contexts_in_segments_longer_than_the_encoder_reads_are_refused(settings, tiny_checkpoint):
    long_segments = SystemSettings(**{**vars(settings), "meter": load_meter(tiny_checkpoint, 600)})
    system = c3.load(long_segments)
    assert system.answer(["x" * 600], "?") is None
    assert system.answer(["x" * 100], "?") is not None


def test_truncation_keeps_the_first_tokens(settings):
    assert truncation.load(settings).restore(TEXTS) == ["The ", "好", "Two "]


def test_mean_pool_averages_equal_spans(settings):
    system = mean_pool.load(settings)
    weight = system.model.get_input_embeddings().weight
    ids = settings.meter.encode("abcdefgh")
    expected = weight[ids].reshape(4, 2, -1).mean(dim=1)
    torch.testing.assert_close(system.pooled(["abcdefgh"])[0], expected)
    assert system.pooled(["", "a"]).shape == (2, 4, 32)
    assert not system.pooled([""]).any()


def test_restore_limit_follows_the_text(settings):
    assert settings.restore_limit("x" * 80) == 80 + 10 + 16


def test_llmlingua2_without_its_package_says_why(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(SystemUnavailable, match="the package `llmlingua` is not installed"):
        llmlingua2.load(settings)


def test_llmlingua2_without_its_weights_says_why(settings):
    pytest.importorskip("llmlingua", reason="the optional package llmlingua is not installed")
    with pytest.raises(SystemUnavailable, match="the weights 'no/such-weights' cannot be reached"):
        llmlingua2.load(SystemSettings(**{**vars(settings), "system_model": "no/such-weights"}))


def test_ocr_without_weights_says_why(settings):
    with pytest.raises(SystemUnavailable, match="no OCR checkpoint is given"):
        deepseek_ocr.load(settings)
    with pytest.raises(SystemUnavailable, match="the weights 'no/such-weights' cannot be reached"):
        deepseek_ocr.load(SystemSettings(**{**vars(settings), "system_model": "no/such-weights"}))
