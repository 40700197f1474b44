from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import factories
from c3_hf.data.collator import C3DataCollator
from c3_hf.data.lengths import SampleKey
from c3_hf.data.samples import Sample
from c3_hf.data.tasks import restore
from c3_hf.training.losses import count_right, distillation_loss, token_loss


@pytest.fixture(scope="module")
def model():
    return factories.make_model()


@pytest.fixture(scope="module")
def batch():
    collator = C3DataCollator(factories.make_processor(), teacher_inputs=True)
    batch = collator([Sample(restore(None, text), SampleKey(0, 0)) for text in ("short", "rather longer")])
    batch.pop("outcome_counts")
    return batch


def split(batch):
    teacher = {name: value for name, value in batch.items() if name.startswith("teacher_")}
    inputs = {name: value for name, value in batch.items() if name not in teacher and name != "labels"}
    return inputs, teacher, batch["labels"]


def test_token_loss_equals_the_models_own(model, batch):
    inputs, _, labels = split(batch)
    outputs = model(**inputs)
    whole = model(**{**inputs, "logits_to_keep": 0}, labels=labels)
    torch.testing.assert_close(token_loss(outputs, labels), whole.loss)
    assert outputs.logits.shape[1] < whole.logits.shape[1]
    num_labels = int((labels != -100).sum())
    torch.testing.assert_close(token_loss(outputs, labels, 2 * num_labels), whole.loss / 2)


def test_counting_right_tokens():
    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 3] = logits[0, 1, 2] = logits[0, 2, 1] = 1
    labels = torch.tensor([[-100, -100, 3, 4, -100]])
    # Kept are the last four positions, which predict the last three labels.
    assert count_right(logits, labels).tolist() == [1, 2]


def test_a_teacher_that_agrees_costs_nothing(batch):
    inputs, teacher, labels = split(batch)
    table = torch.randn(264, 264)

    def same_logits(input_ids, attention_mask):
        return SimpleNamespace(logits=table[input_ids])

    kept = inputs["logits_to_keep"]
    student = table[inputs["input_ids"]][:, -kept:]
    # The logits of a token depend on the token before it alone; that is the same for both, but for each first one.
    extra = distillation_loss(same_logits, student, labels, teacher)
    assert extra.item() == pytest.approx(0, abs=1e-4)
    worse = distillation_loss(same_logits, torch.randn_like(student), labels, teacher)
    assert worse.item() > 0.1


def test_distillation_teaches_the_student_only(model, batch):
    inputs, teacher, labels = split(batch)
    outputs = model(**inputs)
    loss = distillation_loss(model, outputs.logits, labels, teacher)
    (gradient,) = torch.autograd.grad(loss, outputs.logits, retain_graph=True)
    assert gradient[:, :-1][labels[:, 1 - inputs["logits_to_keep"] :] == -100].abs().max() == 0
    assert gradient.abs().max() > 0
    torch.testing.assert_close(
        distillation_loss(model, outputs.logits, labels, teacher, 10) * 10,
        loss * int((labels != -100).sum()),
    )
