"""The metrics load as a module of Hugging Face `evaluate`, from the package and without a network."""

import warnings

import pytest

import c3_hf.evaluation.evaluate_metric as module
from c3_hf.evaluation.metrics.characters import char_precision


PAIRS = {"predictions": ["The lamp", "好的"], "references": ["The lamp went", "好的"]}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of the module by path, with its cache in a folder of its own."""
    import evaluate

    cache = str(tmp_path_factory.mktemp("evaluate"))

    def loaded(*names):
        with warnings.catch_warnings():
            # evaluate opens its lock and cache files without closing them.
            warnings.simplefilter("ignore", ResourceWarning)
            return evaluate.load(module.__file__, *names, cache_dir=cache)

    return loaded


def test_one_metric_by_name(load):
    metric = load("char_precision")
    expected = (char_precision("The lamp", "The lamp went") + 1.0) / 2
    assert metric.compute(**PAIRS) == {"char_precision": pytest.approx(expected)}
    assert "levenshtein" in metric.description.lower() or "edit distance" in metric.description


def test_every_metric_of_text_without_a_name(load):
    values = load().compute(**PAIRS)
    assert {"char_precision", "exact_match", "bleu", "rouge_l", "fox_precision", "fox_edit_dist"} < set(values)
    assert values["exact_match"] == 0.5
    assert "token_accuracy" not in values


def test_metrics_of_tokens_and_answers_take_their_own_inputs(load):
    values = load("token_accuracy").compute(predictions=[[1, 2]], references=[[1, 3]])
    assert values == {"token_accuracy": 0.5}
    curve = load("accuracy_by_position").compute(predictions=[[1, 2]], references=[[1, 2]])
    assert curve["accuracy_by_position"].count(1.0) == 2
    values = load("contains_answer").compute(predictions=["It is 12."], references=[["11", "12"]])
    assert values == {"contains_answer": 1.0}


def test_unknown_name_lists_the_known(load):
    with pytest.raises(ValueError, match="`metrics` has no 'accuracy', expected one of: accuracy_by_position"):
        load("accuracy")
